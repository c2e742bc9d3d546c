"""The table of descriptions: modules and optimizers say by class which memories they are.

    @describes(MyLayer)
    def _(layer):
        yield DescribedMemory(name="my memory", frequency=every_tokens(), context="tokens", ...)
        yield DescribedWeights("my projections", [layer.proj.weight], generates=("my memory",))

A module without an entry is described by its structure (see `structure`). Entries hold for subclasses too,
the nearest class counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from nested_learning.levels.components import Frequency, Holder, Transfer
from nested_learning.optimizers.arithmetic import Group


@dataclass(frozen=True, kw_only=True)
class DescribedMemory:
    """A part of a module that changes, or remembers, while the module runs, without an optimizer.

    Attributes:
        name: memories of one name and description, in however many modules, become one component.
        frequency: how often it is updated. Optimizer steps mean training steps: never without training.
        state_bytes: bytes of the state in one such module; None where that is not known.
        state_per: what the bytes are for, see `Component`.
        context, objective, rule: see `Component`.
        output: what the weights after this module are conditioned on; "" where other memories of the module
            alone read it.
        needs: names of memories of the same module whose state at the same time its update needs.
    """

    name: str
    frequency: Frequency
    state_bytes: int | None
    state_per: Holder = "sequence"
    context: str
    objective: str
    rule: str
    output: str = "its output"
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class DescribedWeights:
    """Parameters that serve one purpose; the optimizer decides their frequency.

    Attributes:
        name: weights of one name, in however many modules, become one component per frequency.
        parameters: parameters of this module or the modules in it. Those that no description names are
            named by the structure of the model.
        initial_of: names of the module's memories whose initial state they are.
        generates: names of the module's memories whose context (keys, values, …) they make.
    """

    name: str
    parameters: Iterable[nn.Parameter]
    initial_of: tuple[str, ...] = ()
    generates: tuple[str, ...] = ()


# A transfer names memories and weights of the same module, or else any of the model.
Described = DescribedMemory | DescribedWeights | Transfer
Describer = Callable[[Any], Iterable[Described]]


@dataclass(frozen=True, kw_only=True)
class DescribedGradientMemory:
    """A memory of gradients that an optimizer holds for some of its parameters.

    Attributes:
        name: its name in the system, to which the optimizer's is added.
        keys: entries of `optimizer.state[p]` that hold it.
        state_bytes: bytes of the state once every parameter has had a gradient; None where not known.
        objective, rule: see `Component`.
        every: optimizer steps between two updates; None for a memory that is never updated.
        context: see `Component`.
        reads_gradients: whether the model's gradients are its context, not another memory's output alone.
        needs: names of memories of the same rule whose state its update needs.
    """

    name: str
    keys: tuple[str, ...]
    state_bytes: int | None
    objective: str
    rule: str
    every: int | None = 1
    context: str = "gradients"
    reads_gradients: bool = True
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptimizerRule:
    """How an optimizer trains some of the parameters of a group.

    Attributes:
        params: the parameters that it trains in this way.
        step: how they move.
        memories: memories that take part; the step reads those that no other needs.
        period: optimizer steps from one move to the next.
    """

    params: Sequence[Tensor]
    step: str
    memories: tuple[DescribedGradientMemory, ...] = ()
    period: int = 1


OptimizerDescriber = Callable[[Any, Group], Iterable[OptimizerRule]]

_DESCRIBERS: dict[type, Callable[..., Any]] = {}
D = TypeVar("D", bound=Callable[..., Any])


def describes(*classes: type[nn.Module]) -> Callable[[Describer], Describer]:
    """Decorator: the function describes modules of these classes.

    It takes a module and yields a `DescribedMemory` or `DescribedWeights` per part, and each `Transfer`
    between them beyond the usual ones: weights make a memory's context or initial state, gradients flow back
    to them, and weights that come later in the model are conditioned on the memory's output. The later
    registration of a class counts.
    """
    return _adder(classes, nn.Module)


def describes_optimizer(*classes: type[Optimizer]) -> Callable[[OptimizerDescriber], OptimizerDescriber]:
    """Decorator: the function describes optimizers of these classes.

    It takes the optimizer and one of its parameter groups, the parameters that need no gradient left out,
    and yields an `OptimizerRule` per way in which the group's parameters are trained. The later registration
    of a class counts.
    """
    return _adder(classes, Optimizer)


def _adder(classes: Sequence[type], base: type) -> Callable[[D], D]:
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise ValueError(f"expected subclasses of {base.__name__}, got {cls!r}")
    if not classes:
        raise ValueError(f"name the subclasses of {base.__name__} that the function describes")

    def add(function: D) -> D:
        _DESCRIBERS.update(dict.fromkeys(classes, function))
        return function

    return add


def describer_of(described: nn.Module | Optimizer) -> Callable[..., Any] | None:
    """The function for the class of a module or optimizer, or for its nearest base class."""
    return next((_DESCRIBERS[cls] for cls in type(described).__mro__ if cls in _DESCRIBERS), None)
