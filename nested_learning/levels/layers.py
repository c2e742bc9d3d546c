"""Descriptions of this package's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from nested_learning.layers.attention import Attention
from nested_learning.layers.cms import ContinuumMemorySystem
from nested_learning.layers.cms.level import CMSLevel, learning_levels
from nested_learning.layers.low_rank_mlp import LowRankSelfModifyingMLP
from nested_learning.layers.memory_as_context import MemoryAsContext
from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.registry import MIXERS
from nested_learning.layers.self_modifying_linear import SelfModifyingLinear
from nested_learning.levels.registry import Described, Memory, Weights, describes
from nested_learning.levels.structure import ATTENTION_OBJECTIVE, ATTENTION_RULE, softmax_attention
from nested_learning.levels.system import INFINITE, Frequency, Transfer, every_tokens
from nested_learning.memory.description import MemorySystem

# By the objective's name; one that is not here is shown by its name.
OBJECTIVES = {
    "dot": "−⟨M(k), v̂⟩",
    "l2": "½‖M(k) − v̂‖²",
    "lp": "‖M(k) − v̂‖_p^p",
    "huber": "Huber's, of M(k) − v̂",
    "oja": "½‖k − Mᵀv‖² (Oja)",
}
DECAYS = {"none": "no decay", "constant": "constant decay", "gated": "decay α_t"}
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
    momentum = f"{prefix}: momentum of the writes"
    elements, itemsize = _elements(layer), _state_itemsize(layer)
    copies = 1 if system.exact else 2  # the current weights, and where it has one the anchor
    for memory, chunk_size in zip(system.memories, system.chunk_sizes, strict=True):
        yield Memory(
            name=names[memory],
            frequency=_frequency(system, memory, chunk_size),
            state_bytes=copies * elements * itemsize,
            context="tokens, as keys and values"
            + (" and targets of its own making" if system.self_targets else ""),
            objective=objective_of(system),
            rule=rule_of(system, chunk_size),
            output="its output" if memory == system.memories[-1] else "",
            needs=(momentum,) if system.momentum else (),
        )
    if system.momentum:
        yield Memory(
            name=momentum,
            frequency=every_tokens(),
            state_bytes=len(names) * elements * itemsize,
            context="gradients of the memories' objective",
            objective="−⟨S, write⟩",
            rule="S ← μ_t S + write, μ_t from the token",
            output="",
        )
        yield _passes((momentum,), tuple(names.values()), "the sum of writes")
    made = tuple(names[memory] for memory in system.generated)
    if made:
        yield Transfer(
            sources=made,
            targets=tuple(names.values()),
            kind="generation of context",
            what=", ".join(system.generated),
        )
    initial = list(layer.initial.parameters())
    every = tuple(names.values())
    yield Weights(f"{prefix}: initial memories", initial, initial_of=every)
    yield Weights(f"{prefix}: projections and gates", _others(layer, initial), generates=every)


def _frequency(system: MemorySystem, memory: str, chunk_size: int) -> Frequency:
    """How often what is read of a memory changes.

    The generating memories are read at their anchors. The memory that is read out may be read after every
    token's write.
    """
    by_token = memory == system.memories[-1] and system.read == "token"  # exact systems are read so too
    return every_tokens() if by_token else every_tokens(chunk_size)


def objective_of(system: MemorySystem) -> str:
    """The inner objective in a line; one per matrix where they differ."""
    names = {matrix: rule.objective.name for matrix, rule in system.rule.items()}
    return _per_matrix({matrix: OBJECTIVES.get(name, name) for matrix, name in names.items()})


def rule_of(system: MemorySystem, chunk_size: int) -> str:
    """The learning rule and retention in a line; the parts that differ by matrix one per matrix."""
    decay, form = system.retention.decay, system.retention.form
    kept = DECAYS.get(decay, decay)
    per_matrix = {
        matrix: ("delta gradient descent" if rule.erase else "gradient descent")
        + ("" if decay == "none" else f", {kept} towards {_kept_value(rule.retain)}")
        for matrix, rule in system.rule.items()
    }
    anchored = not system.exact and chunk_size > 1
    parts = [
        _per_matrix(per_matrix),
        f"gradients at an anchor set every {chunk_size} tokens" if anchored else "gradients at every token",
    ]
    if form != "linear":
        parts.append(f"retention {form}")
    return "; ".join(parts)


def _kept_value(retain: str) -> str:
    return "zero" if retain == "zero" else "the initial state"


def _per_matrix(texts: Mapping[str, str]) -> str:
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{matrix}: {text}" for matrix, text in texts.items())


def _elements(layer: MemoryLayer) -> int:
    """Numbers in one memory, over its heads and matrices."""
    return sum(weights[0].numel() for weights in layer.initial.values())


def _state_itemsize(layer: nn.Module) -> int:
    """States are float32, or float64 in a float64 model."""
    dtype = next(layer.parameters()).dtype
    return torch.promote_types(dtype, torch.float32).itemsize


def _registered_name(layer: nn.Module) -> str:
    """What `HopeConfig(mixer=…)` calls the layer; its class's name where nothing does."""
    registered = {factory: name for name, factory in MIXERS.items()}
    return registered.get(type(layer), type(layer).__name__)


@describes(MemoryAsContext)
def _memory_as_context(layer: MemoryAsContext) -> Iterator[Described]:
    """Attention in a segment, to the tokens and what the memory recalls; the memory describes itself."""
    name = f"softmax attention (segment {layer.segment})"
    itemsize = layer.qkv_proj.weight.dtype.itemsize
    yield Memory(
        name=name,
        frequency=INFINITE,
        state_bytes=2 * 2 * layer.segment * layer.hidden_size * itemsize,
        context="the tokens of a segment and what the memory recalls for them, as keys and values",
        objective=ATTENTION_OBJECTIVE,
        rule=ATTENTION_RULE,
    )
    modules = (layer.qkv_proj, layer.q_norm, layer.k_norm, layer.attention_out)
    projections = [p for module in modules for p in module.parameters()]
    yield Weights("attention projections", projections, generates=(name,))
    others = _others(layer, [*projections, *layer.memory.parameters()])
    yield Weights("MAC: recall, norms and persistent tokens", others)
    recalled = f"{_registered_name(layer.memory)}: M_{layer.memory.system.memories[-1]}"
    for source, target, what in ((recalled, name, "what it recalls"), (name, recalled, "its output")):
        yield Transfer(sources=(source,), targets=(target,), kind="generation of context", what=what)


def _others(module: nn.Module, taken: list[nn.Parameter]) -> list[nn.Parameter]:
    ids = {id(parameter) for parameter in taken}
    return [parameter for parameter in module.parameters() if id(parameter) not in ids]


def _passes(sources: tuple[str, ...], targets: tuple[str, ...], what: str) -> Transfer:
    return Transfer(sources=sources, targets=targets, kind="conditioning on output", what=what)


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
            yield Weights(names[index], parameters)
            continue
        yield Memory(
            name=memories[index],
            frequency=every_tokens(level.chunk_size),
            state_bytes=None,
            context=f"chunks of {level.chunk_size} tokens",
            objective=CMS_OBJECTIVES.get(cms.update, cms.update),
            rule=_cms_rule(level),
        )
        yield Weights(names[index], parameters, initial_of=(memories[index],))
        if cms.variant == "nested" and index + 1 in memories:
            yield Transfer(
                sources=(memories[index + 1],),
                targets=(memories[index],),
                kind="initial state",
                what=f"taken again every {cms.levels[index + 1].chunk_size} tokens",
            )
    yield from _weights_of_the_system_itself(cms)


def _cms_rule(level: CMSLevel) -> str:
    """How a level that learns in context writes, in a line."""
    clip, retention = level.option("clip"), level.option("retention")
    parts = [f"{CMS_RULES[level.option('rule')]} (eq 71)"]
    if level.option("lr") == 0:
        parts = ["writes nothing itself (lr 0)"]
    elif clip is not None:
        parts.append(f"clipped to norm {clip:g}")
    if retention != 1:
        parts.append(f"retention {retention:g} towards the initial state")
    return "; ".join(parts)


def _weights_of_the_system_itself(cms: ContinuumMemorySystem) -> Iterator[Weights]:
    """Parameters outside of the blocks, such as the weights of a sum over levels."""
    own = _others(cms, list(cms.blocks.parameters()))
    if own:
        yield Weights("CMS: parameters between the levels", own)


@describes(SelfModifyingLinear)
def _self_modifying_linear(layer: SelfModifyingLinear) -> Iterator[Described]:
    """The weight, which learns after every token, and drop-in layers of that kind."""
    memory = "self-modifying weight"
    normalised = layer.mode == "normalised"
    yield Memory(
        name=memory,
        frequency=every_tokens(),
        state_bytes=layer.weight.numel() * _state_itemsize(layer),
        context="tokens, with targets of the layer's own making",
        objective=OBJECTIVES["dot" if normalised else "l2"],
        rule=f"delta gradient descent, decay α_t towards {'the initial state' if normalised else 'zero'}",
    )
    initial = [dict(layer.named_parameters())["weight"]]
    yield Weights("self-modifying weight: initial", initial, initial_of=(memory,))
    others = _others(layer, initial)
    yield Weights("self-modifying weight: values and gates", others, generates=(memory,))


@describes(LowRankSelfModifyingMLP)
def _low_rank_mlp(mlp: LowRankSelfModifyingMLP) -> Iterator[Described]:
    """An average over what was read, from which the change of the output weights is generated."""
    memory = "context of the low-rank change"
    yield Memory(
        name=memory,
        frequency=every_tokens(),
        state_bytes=mlp.context_size * _state_itemsize(mlp),
        context="tokens",
        objective="½‖c − P x‖²",
        rule="decaying average, c ← α_t c + (1 − α_t) P x",
        output="",
    )
    generated = "MLPs that a memory changes"
    yield Weights(generated, [*mlp.up.parameters(), *mlp.down.parameters()])
    made = _others(mlp, [*mlp.up.parameters(), *mlp.down.parameters()])
    yield Weights("projections and generators of the low-rank change", made, generates=(memory,))
    yield Transfer(
        sources=(memory,), targets=(generated,), kind="generation of weights", what=f"ΔW of rank {mlp.rank}"
    )


@describes(Attention)
def _attention(attention: Attention) -> Iterator[Described]:
    """Keys, values and the position of every token in context."""
    width = 2 * attention.num_kv_heads * attention.head_dim
    bytes_per_token = width * attention.k_proj.weight.dtype.itemsize + torch.int64.itemsize
    yield from softmax_attention(attention, bytes_per_token, attention.window)
