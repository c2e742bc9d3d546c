"""The works that the speed benchmarks time, by name, on inputs by seed, built from public names alone.

With `--against FOLDER` a worker process runs this file with the package of another commit
(`benchmarks.worker`). So nothing of the package is imported here except `nested_learning`,
`nested_learning.layers` and `nested_learning.continual`, and nothing of the benchmarks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from nested_learning import HopeCache, HopeConfig, HopeForCausalLM, preset
from nested_learning.layers import MIXERS, SelfModifyingTitans, Titans

Shape = Mapping[str, int]
Works = dict[str, Callable[[], object]]

PEERS = {"titans": Titans, "self_modifying_titans": SelfModifyingTitans}
RULES: dict[str, dict[str, Any]] = {
    "none": {"cms_update": "none"},
    "regression": {"cms_update": "regression"},
    "lm, first order": {"cms_update": "lm", "cms_meta_gradient": "first_order"},
    "lm, exact": {"cms_update": "lm", "cms_meta_gradient": "exact"},
}


def slopes(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output of a mixer on x [B, T, D], and the gradients of its mean square to x and every parameter."""
    y = layer(x)[0]
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(y.square().mean(), leaves, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


def compiled(module: nn.Module) -> nn.Module:
    """A copy of a module through torch.compile, per shape; its memories' chunks are compiled too."""
    from nested_learning.layers import set_compile_step  # the package of another commit may lack it

    copied = copy.deepcopy(module)
    set_compile_step(copied, True)
    return torch.compile(copied, dynamic=False)  # type: ignore[return-value]


@torch.no_grad()
def forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Output of a mixer without gradients."""
    return layer(x)[0]


def inputs(shape: Shape) -> Tensor:
    """Random inputs [batch, tokens, width] that want gradients."""
    return torch.randn(shape["batch"], shape["tokens"], shape["width"], requires_grad=True)


# Layers -----------------------------------------------------------------------------------------------------


def mixer(name: str, shape: Shape) -> nn.Module:
    """A registered mixer with its defaults at this size; a window sees as far as a chunk."""
    accepted = inspect.signature(MIXERS[name]).parameters
    given = {"chunk_size": shape["chunk"], "window": shape["chunk"]}
    options = {option: value for option, value in given.items() if option in accepted}
    return MIXERS[name](hidden_size=shape["width"], num_heads=shape["heads"], **options)


def mixers(shape: Shape, only: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """All registered mixers, or those of `only` that there are; "memory" needs its parts and is left out."""
    torch.manual_seed(0)
    names = [name for name in sorted(MIXERS) if name != "memory" and (only is None or name in only)]
    return {name: mixer(name, shape) for name in names}


def layers(shape: Shape, only: Sequence[str] | None = None) -> Works:
    """Forward, and forward + backward, of each mixer."""
    return _both_passes(mixers(shape, only), inputs(shape))


def peers(shape: Shape) -> Works:
    """Forward + backward of the layers that are compared with another implementation's."""
    torch.manual_seed(0)
    built = {
        name: kind(shape["width"], shape["heads"], chunk_size=shape["chunk"]) for name, kind in PEERS.items()
    }
    x = inputs(shape)
    return {name: lambda layer=layer: slopes(layer, x) for name, layer in built.items()}


def roofline(shape: Shape) -> Works:
    """Both passes of self-modifying Titans."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    return _both_passes({"self_modifying_titans": layer}, inputs(shape))


def scaling(shape: Shape, lengths: Sequence[int]) -> Works:
    """Forward + backward of self-modifying Titans at each length, batch 1."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(shape["width"], shape["heads"], chunk_size=shape["chunk"])
    sequences = {length: torch.randn(1, length, shape["width"], requires_grad=True) for length in lengths}
    return {f"T {length}": lambda x=x: slopes(layer, x) for length, x in sequences.items()}


def _both_passes(built: Mapping[str, nn.Module], x: Tensor) -> Works:
    works: Works = {}
    for name, layer in built.items():
        works[f"{name}, forward"] = lambda layer=layer: forward(layer, x)
        works[f"{name}, forward + backward"] = lambda layer=layer: slopes(layer, x)
    return works


# Models -----------------------------------------------------------------------------------------------------


class Session:
    """A model that has read a context [1, S] and goes on greedily, one token a call."""

    @torch.no_grad()
    def __init__(self, model: HopeForCausalLM, context: Tensor, compiled: bool = False) -> None:
        cache = None
        for piece in context.split(2048, dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        assert isinstance(cache, HopeCache)
        self.cache, self.newest = cache, context[:, -1:]
        self.call: Callable[..., Any] = model.get_compiled_call(CompileConfig()) if compiled else model

    @torch.no_grad()
    def next(self) -> None:
        """Read the newest token and choose the one after it."""
        logits = self.call(self.newest, past_key_values=self.cache).logits
        self.newest = logits[:, -1].argmax(-1, keepdim=True)


def sessions(model: HopeForCausalLM, contexts: Sequence[int], compiled: bool = False) -> dict[int, Session]:
    """A session of `model` after each number of tokens, all of the same random bytes."""
    ids = torch.randint(0, 256, (1, max(contexts)))
    return {context: Session(model, ids[:, :context], compiled) for context in contexts}


def language_model(name: str) -> HopeForCausalLM:
    """A preset with random weights, for reading."""
    torch.manual_seed(0)
    return HopeForCausalLM(preset(name)).eval()


def decode(models: Sequence[str], contexts: Sequence[int]) -> Works:
    """A greedy token of each preset after each context, batch 1."""
    return {
        f"{name}, context {context}": session.next
        for name in models
        for context, session in sessions(language_model(name), contexts).items()
    }


def decode_compiled(models: Sequence[str], contexts: Sequence[int]) -> Works:
    """As `decode`, by compiled blocks where the package has them, plainly where it has not."""
    has = HopeForCausalLM.get_compiled_call.__module__.startswith("nested_learning.")
    return {
        f"{name}, context {context}": session.next
        for name in models
        for context, session in sessions(language_model(name), contexts, has).items()
    }


def cms(shape: Shape) -> Works:
    """A training step and reading of a model whose CMS learns by each rule."""
    torch.manual_seed(0)
    ids = torch.randint(256, (shape["batch"], shape["tokens"]))

    def train(model: HopeForCausalLM) -> None:
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    @torch.no_grad()
    def read(model: HopeForCausalLM) -> None:
        model.eval()
        model(input_ids=ids)

    works: Works = {}
    for name, options in RULES.items():
        model = _learning_model(shape, options)
        works[f"{name}, training step"] = lambda model=model: train(model)
        works[f"{name}, reading"] = lambda model=model: read(model)
    return works


def _learning_model(shape: Shape, options: Mapping[str, Any]) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=256,
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_heads=shape["heads"],
        mixer="titans",
        mixer_options={"titans": {"chunk_size": shape["fast"]}},
        cms_levels=[{"chunk_size": shape["fast"]}, {"chunk_size": shape["slow"]}],
        **options,
    )
    return HopeForCausalLM(config)


def continual(shape: Shape, dtype: str, window: int) -> Works:
    """A chunk by a Llama's forward and backward pass ("plain"), and by `observe` with three levels."""
    from nested_learning.continual import Level, stack_levels  # the package is younger than the layers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["ids"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=8 * shape["chunk"],
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    levels = [Level(chunk_size=factor * shape["chunk"], lr=0.01) for factor in (1, 4, 16)]
    base = LlamaForCausalLM(config).to(getattr(torch, dtype))
    learner = stack_levels(base, None, levels=levels, window=window)
    ids = torch.randint(shape["ids"], (1, shape["chunk"]))

    def plain() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, list(model.parameters()))

    return {"plain": plain, "observe": lambda: learner.observe(ids)}


CASES: dict[str, Callable[..., Works]] = {
    "layers": layers,
    "peers": peers,
    "roofline": roofline,
    "scaling": scaling,
    "decode": decode,
    "decode_compiled": decode_compiled,
    "cms": cms,
    "continual": continual,
}
