"""Self-modifying linear layers in the place of an existing network's own, by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nested_learning._errors import unknown
from nested_learning.layers.drop_in.self_modifying_linear import (
    Mode,
    SelfModifyingLinear,
    SelfModifyingLinearState,
)
from nested_learning.memory import check


@dataclass(eq=False)
class CarriedStates:
    """The states of a network's drop-in layers while `carry_states` is active.

    Attributes:
        names: module name of each drop-in layer of the network.
        states: by module name, the state after the last call of each layer that has been called.
        mask: bool [B, T], True = real token, of the calls that follow; None: all are real. Assign to it
            where calls in one `with` block differ.
    """

    names: Mapping[DropInLinear, str]
    states: dict[str, SelfModifyingLinearState]
    mask: Tensor | None
    documents: Tensor | None = None
    position_ids: Tensor | None = None


# Scoped to the `with` block and to its thread or task: the modules themselves hold no state.
_carried: ContextVar[CarriedStates | None] = ContextVar("carried_states", default=None)


class DropInLinear(SelfModifyingLinear):
    """A `SelfModifyingLinear` that is called as the nn.Linear it replaces, y = layer(x).

    Each call starts from W_0, so rows are read as whole sequences; inside `carry_states`, from the state
    after the layer's previous call. A checkpoint of the nn.Linear fits: weight and bias keep their names.
    In a compiled network the layer itself runs eagerly: its states are looked up at each call, and its
    chunks would be compiled anew for each sequence length.

    Attributes:
        path: name in the network at the time of the replacement, for the messages of NESTED_LEARNING_CHECK.
    """

    path: str = "drop-in layer"

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, in_features] or [B, in_features] -> [..., out_features]."""
        carried = _carried.get()
        name = None if carried is None else carried.names.get(self)
        with check.scope(self.path):
            if carried is None or name is None:  # a layer outside of the network whose states are carried
                return super().forward(x)[0]
            said = carried.mask, carried.documents, carried.position_ids
            y, after = super().forward(x, carried.states.get(name), *said)
            assert after is not None  # they are tensors, which keep it
            carried.states[name] = after
            return y


@contextmanager
def carry_states(
    model: nn.Module,
    states: Mapping[str, SelfModifyingLinearState] | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Iterator[CarriedStates]:
    """Carry the states of a network's drop-in layers from call to call within a `with` block.

        with carry_states(model) as carried:
            model(first)
        with carry_states(model, carried.states) as carried:  # later: goes on where the first call ended
            model(second)

    Not together with activation checkpointing: its second forward pass would start from other states. The
    checkpointing of transformers is refused; do not use `torch.utils.checkpoint` around these layers either.

    Args:
        model: network in which `replace_linears` has put drop-in layers.
        states: state to start from by module name, as `carried.states` of an earlier block; a layer that is
            not in it starts from W_0. The mapping is copied, never written to.
        mask: bool [B, T], True = real token; None: all tokens are real.
        documents, position_ids: [B, T] int, where documents in a row begin, as in `SelfModifyingLinear`.

    Raises:
        ValueError: for a model without drop-in layers, one that checkpoints activations, or a state of a
            layer that the model does not have.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, DropInLinear)}
    if not names:
        raise ValueError(f"{type(model).__name__} has no drop-in layers; call replace_linears(model, ...)")
    if any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()
    ):
        raise ValueError(
            f"{type(model).__name__} checkpoints its activations, which would run the layers twice from "
            "different states; call model.activation_checkpointing_disable(), or do without carry_states"
        )
    for name in states or {}:
        if name not in names.values():
            raise unknown("drop-in layer", name, names.values())
    carried = CarriedStates(names, dict(states or {}), mask, documents, position_ids)
    token = _carried.set(carried)
    try:
        yield carried
    finally:
        _carried.reset(token)


def replace_linears(
    model: nn.Module,
    names: str | Iterable[str],
    *,
    mode: Mode = "normalised",
    chunk_size: int = 64,
    value_rank: int = 8,
    eta_max: float | None = None,
) -> list[str]:
    """Replace nn.Linear modules of `model` by self-modifying ones, in place.

    The network's outputs stay exactly what they were until it is trained (see `SelfModifyingLinear`). The
    weights and biases remain the same Parameter objects, so that ties between modules and an optimizer's
    references hold; what the layers add is new, and an optimizer built earlier does not know it.

    Args:
        model: any network that calls its linear layers as y = layer(x) on [B, T, D] or [B, D].
        names: module names as in `model.named_modules()`, or patterns of them: "*.down_proj",
            "model.layers.[01].*".
        mode, chunk_size, value_rank, eta_max: as in `SelfModifyingLinear`.

    Returns: the names of the replaced modules.

    Raises:
        ValueError: for a name or pattern that no nn.Linear has; the model is then unchanged. Subclasses of
            nn.Linear do not count: the replacement would lose what they do differently.
    """
    # Every name of a module that occurs more than once is replaced, by one and the same layer.
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and type(m) is nn.Linear}
    chosen: dict[str, nn.Linear] = {}
    for pattern in [names] if isinstance(names, str) else names:
        matched = {name: linears[name] for name in fnmatch.filter(linears, pattern)}
        if not matched:
            raise _no_such_linear(model, pattern, list(linears))
        chosen |= matched
    layers: dict[nn.Linear, DropInLinear] = {}
    for linear in dict.fromkeys(chosen.values()):
        sizes = linear.in_features, linear.out_features
        layer = DropInLinear(*sizes, False, chunk_size, mode, value_rank, eta_max)
        layer.to(device=linear.weight.device, dtype=linear.weight.dtype)
        layer.weight, layer.bias = linear.weight, linear.bias
        layers[linear] = layer.train(linear.training)
    replaced = {name: layers[linear] for name, linear in linears.items() if linear in layers}
    for name, layer in replaced.items():
        layer.path = name
        model.set_submodule(name, layer)
    return list(replaced)


def _no_such_linear(model: nn.Module, pattern: str, known: list[str]) -> ValueError:
    """The error for a pattern without a match: its module's kind if it has another, or the nearest name."""
    if pattern in dict(model.named_modules()):
        kind = type(model.get_submodule(pattern)).__name__
        return ValueError(f"{pattern!r} is a {kind}; only modules of the class nn.Linear itself are replaced")
    endings = {"*." + name.rpartition(".")[2] for name in known if "." in name}
    near = difflib.get_close_matches(pattern, [*known, *sorted(endings)], n=1, cutoff=0.0)
    hint = f"did you mean {near[0]!r}?" if near else "the model has none"
    return ValueError(f"no nn.Linear of {type(model).__name__} is named {pattern!r}; {hint}")
