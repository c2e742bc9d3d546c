"""Descriptions of this package's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from nested_learning.layers.attention import Attention, MemoryAsContext
from nested_learning.layers.cms import ContinuumMemorySystem
from nested_learning.layers.cms.level import CMSLevel, learning_levels
from nested_learning.layers.drop_in import LowRankSelfModifyingMLP, SelfModifyingLinear
from nested_learning.layers.memory import MemoryLayer
from nested_learning.layers.registry import MIXERS
from nested_learning.levels.components import INFINITE, Frequency, Transfer, every_tokens
from nested_learning.levels.describe.registry import Described, DescribedMemory, DescribedWeights, describes
from nested_learning.levels.describe.structure import ATTENTION_OBJECTIVE, ATTENTION_RULE, softmax_attention
from nested_learning.memory.objective import L2, Dot
from nested_learning.memory.system import MemorySystem

DECAYS = {"constant": "constant decay", "gated": "decay α_t"}
RETAINED = {"zero": "zero", "initial": "the initial state"}  # what decay pulls the weights towards
CMS_OBJECTIVES = {"lm": "next-token loss", "regression": "½‖M(k) − v‖² on projections of its input"}
CMS_RULES = {
    "gd": "gradient descent on the sum over the chunk",
    "dgd": "delta gradient descent on the down projection, gradient descent on the rest",
    "momentum": "momentum on the sum over the chunk",
    "adam": "Adam's memory on the sum over the chunk",
    "adagrad": "AdaGrad's memory on the sum over the chunk",
}


@describes(MemoryLayer)
def _memory_layer(layer: MemoryLayer) -> Iterator[Described]:
    """The memories of the layer's `MemorySystem`, one each, and the momentum of their writes."""
    system, prefix = layer.system, _registered_name(layer)
    names = {memory: f"{prefix}: M_{memory}" for memory in system.memories}
    every = tuple(names.values())
    momentum = f"{prefix}: momentum of the writes"
    initial = list(layer.initial.parameters())
    # Of one memory, all its heads; by shape, as reading a sharded weight waits for all processes.
    elements = sum(weights.shape[1:].numel() for weights in layer.initial.values())
    one = elements * _state_itemsize(layer)
    for memory, chunk_size in zip(system.memories, system.chunk_sizes, strict=True):
        yield DescribedMemory(
            name=names[memory],
            frequency=_frequency(system, memory, chunk_size),
            state_bytes=one if system.exact else 2 * one,  # the current weights, and in chunks the anchor
            context="tokens, as keys and values"
            + (" and targets of its own making" if system.self_targets else ""),
            objective=objective_of(system),
            rule=rule_of(system, chunk_size),
            output="its output" if memory == system.memories[-1] else "",
            needs=(momentum,) if system.momentum else (),
        )
    if system.momentum:
        yield DescribedMemory(
            name=momentum,
            frequency=every_tokens(),
            state_bytes=len(names) * one,
            context="gradients of the memories' objective",
            objective="−⟨S, write⟩",
            rule="S ← μ_t S + write, μ_t from the token",
            output="",
        )
        yield Transfer(
            sources=(momentum,), targets=every, kind="conditioning on output", what="the sum of writes"
        )
    if system.generated:
        yield Transfer(
            sources=tuple(names[memory] for memory in system.generated),
            targets=every,
            kind="generation of context",
            what=", ".join(system.generated),
        )
    yield DescribedWeights(f"{prefix}: initial memories", initial, initial_of=every)
    yield DescribedWeights(f"{prefix}: projections and gates", _others(layer, initial), generates=every)


def _frequency(system: MemorySystem, memory: str, chunk_size: int) -> Frequency:
    """How often the weights of a memory that are read change.

    The generating memories are read at their anchors. The memory that is read out may be read after every
    token's write.
    """
    by_token = memory == system.memories[-1] and system.read == "token"  # exact systems are read so too
    return every_tokens(1 if by_token else chunk_size)


def objective_of(system: MemorySystem) -> str:
    """The inner objective in a line; one per matrix where they differ."""
    return _per_matrix({matrix: rule.objective.formula for matrix, rule in system.rule.items()})


def rule_of(system: MemorySystem, chunk_size: int) -> str:
    """The learning rule and retention in a line; the parts that differ by matrix one per matrix."""
    decay, form = system.retention.decay, system.retention.form
    descents = {}
    for matrix, rule in system.rule.items():
        descents[matrix] = "delta gradient descent" if rule.erase else "gradient descent"
        if decay != "none":
            descents[matrix] += f", {DECAYS.get(decay, decay)} towards {RETAINED[rule.retain]}"
    anchored = not system.exact and chunk_size > 1
    parts = [
        _per_matrix(descents),
        f"gradients at an anchor set every {chunk_size} tokens" if anchored else "gradients at every token",
    ]
    if form != "linear":
        parts.append(f"retention {form}")
    return "; ".join(parts)


def _per_matrix(texts: Mapping[str, str]) -> str:
    """The text that all matrices share, or a text per matrix."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{matrix}: {text}" for matrix, text in texts.items())


def _state_itemsize(layer: nn.Module) -> int:
    """Bytes of a number in a state: float32, or float64 in a float64 model."""
    dtype = next(layer.parameters()).dtype
    return torch.promote_types(dtype, torch.float32).itemsize


def _registered_name(layer: nn.Module) -> str:
    """The name by which `HopeConfig(mixer=…)` knows the layer; its class's name where nothing does."""
    registered = {factory: name for name, factory in MIXERS.items()}
    return registered.get(type(layer), type(layer).__name__)


def _others(module: nn.Module, taken: list[nn.Parameter]) -> list[nn.Parameter]:
    """The module's parameters but for those that are taken."""
    ids = {id(parameter) for parameter in taken}
    return [parameter for parameter in module.parameters() if id(parameter) not in ids]


@describes(MemoryAsContext)
def _memory_as_context(layer: MemoryAsContext) -> Iterator[Described]:
    """Attention in a segment to its tokens and to what the memory recalls; the memory describes itself."""
    name = f"softmax attention (segment {layer.segment})"
    itemsize = layer.qkv_proj.weight.dtype.itemsize
    yield DescribedMemory(
        name=name,
        frequency=INFINITE,
        state_bytes=2 * 2 * layer.segment * layer.hidden_size * itemsize,
        context="the tokens of a segment and what the memory recalls for them, as keys and values",
        objective=ATTENTION_OBJECTIVE,
        rule=ATTENTION_RULE,
    )
    modules = (layer.qkv_proj, layer.q_norm, layer.k_norm, layer.attention_out)
    projections = [p for module in modules for p in module.parameters()]
    yield DescribedWeights("attention projections", projections, generates=(name,))
    others = _others(layer, [*projections, *layer.memory.parameters()])
    yield DescribedWeights("MAC: recall, norms and persistent tokens", others)
    recalled = f"{_registered_name(layer.memory)}: M_{layer.memory.system.memories[-1]}"
    for source, target, what in ((recalled, name, "what it recalls"), (name, recalled, "its output")):
        yield Transfer(sources=(source,), targets=(target,), kind="generation of context", what=what)


@describes(ContinuumMemorySystem)
def _continuum_memory_system(cms: ContinuumMemorySystem) -> Iterator[Described]:
    """A level's block is weights; where it learns in context it is a memory too, which starts from them."""
    names = [f"CMS level {number} (chunk {level.chunk_size})" for number, level in enumerate(cms.levels, 1)]
    memories = {
        index: f"{names[index]} in context" for index in learning_levels(cms.levels, cms.variant, cms.update)
    }
    for index, (level, block) in enumerate(zip(cms.levels, cms.blocks, strict=True)):
        parameters = list(block.parameters())
        if index not in memories:
            yield DescribedWeights(names[index], parameters)
            continue
        yield DescribedMemory(
            name=memories[index],
            frequency=every_tokens(level.chunk_size),
            state_bytes=None,
            context=f"chunks of {level.chunk_size} tokens",
            objective=CMS_OBJECTIVES.get(cms.update, cms.update),
            rule=_cms_rule(level),
        )
        yield DescribedWeights(names[index], parameters, initial_of=(memories[index],))
        if cms.variant == "nested" and index + 1 in memories:
            yield Transfer(
                sources=(memories[index + 1],),
                targets=(memories[index],),
                kind="initial state",
                what=f"taken again every {cms.levels[index + 1].chunk_size} tokens",
            )
    between = _others(cms, list(cms.blocks.parameters()))  # such as the weights of a sum over levels
    if between:
        yield DescribedWeights("CMS: parameters between the levels", between)


def _cms_rule(level: CMSLevel) -> str:
    """How a level that learns in context writes, in a line."""
    rule, retention = CMS_RULES[level.option("rule")], level.option("retention")
    parts = written(f"{rule} (eq 71)", level.option("lr"), level.option("clip"))
    if retention != 1:
        parts.append(f"retention {retention:g} towards the initial state")
    return "; ".join(parts)


def written(rule: str, lr: float, clip: float | None) -> list[str]:
    """The write of a level in parts: its rule and clip, or that it writes nothing at lr 0."""
    if lr == 0:
        return ["writes nothing itself (lr 0)"]
    return [rule] if clip is None else [rule, f"clipped to norm {clip:g}"]


@describes(SelfModifyingLinear)
def _self_modifying_linear(layer: SelfModifyingLinear) -> Iterator[Described]:
    """A weight that learns after every token, here and in drop-in layers of that kind."""
    memory = "self-modifying weight"
    normalised = layer.mode == "normalised"
    yield DescribedMemory(
        name=memory,
        frequency=every_tokens(),
        state_bytes=layer.weight.numel() * _state_itemsize(layer),
        context="tokens, with targets of the layer's own making",
        objective=(Dot if normalised else L2).formula,
        rule=f"delta gradient descent, decay α_t towards {RETAINED['initial' if normalised else 'zero']}",
    )
    initial = [dict(layer.named_parameters())["weight"]]
    yield DescribedWeights("self-modifying weight: initial", initial, initial_of=(memory,))
    others = _others(layer, initial)
    yield DescribedWeights("self-modifying weight: values and gates", others, generates=(memory,))


@describes(LowRankSelfModifyingMLP)
def _low_rank_mlp(mlp: LowRankSelfModifyingMLP) -> Iterator[Described]:
    """An average over what was read, from which the change of the output weights is generated."""
    memory = "context of the low-rank change"
    yield DescribedMemory(
        name=memory,
        frequency=every_tokens(),
        state_bytes=mlp.context_size * _state_itemsize(mlp),
        context="tokens",
        objective="½‖c − P x‖²",
        rule="decaying average, c ← α_t c + (1 − α_t) P x",
        output="",
    )
    changed = "MLPs that a memory changes"
    maps = [*mlp.up.parameters(), *mlp.down.parameters()]
    yield DescribedWeights(changed, maps)
    others = _others(mlp, maps)
    yield DescribedWeights("projections and generators of the low-rank change", others, generates=(memory,))
    yield Transfer(
        sources=(memory,), targets=(changed,), kind="generation of weights", what=f"ΔW of rank {mlp.rank}"
    )


@describes(Attention)
def _attention(attention: Attention) -> Iterator[Described]:
    """Softmax attention that keeps keys, values and the position of every token in context."""
    width = 2 * attention.num_kv_heads * attention.head_dim
    bytes_per_token = width * attention.k_proj.weight.dtype.itemsize + torch.int64.itemsize
    yield from softmax_attention(attention, bytes_per_token, attention.window)
