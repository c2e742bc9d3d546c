"""One optimizer by name, over some parameters of a model: matrices and all else as each needs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nested_learning._errors import unknown
from nested_learning.optimizers.arithmetic import Group
from nested_learning.optimizers.base import BaseOptimizer
from nested_learning.optimizers.checks import LEARNING_RATE, NON_NEGATIVE, Check
from nested_learning.optimizers.delta_gd import DeltaGD
from nested_learning.optimizers.mended import MENDED, Muon
from nested_learning.optimizers.nested import NestedOptimizer
from nested_learning.parts import EMBEDDING, HEAD, parts

Named = list[tuple[str, nn.Parameter]]

PACKAGE = "nested_learning.optimizers"  # what it exports has a name here

# Options of the AdamW beside torch's Muon, which has none of its own, as `M3` calls them.
BESIDE = {"adamw_betas": "betas", "adamw_eps": "eps"}
SCALE = "adamw_lr_scale"
SHARED: dict[str, Check] = {"lr": LEARNING_RATE, "weight_decay": NON_NEGATIVE}  # all levels', or each its own
NO_MATRICES = {EMBEDDING, HEAD, "persistent"}  # parts whose 2-D parameters are no weights of a map


def by_name() -> dict[str, type[Optimizer]]:
    """Classes of torch.optim and of this package by their names in lower case: what `build` takes."""
    found = [*vars(torch.optim).values(), *vars(sys.modules[PACKAGE]).values()]
    classes = [cls for cls in found if inspect.isclass(cls) and issubclass(cls, Optimizer)]
    return {cls.__name__.lower(): cls for cls in classes if cls not in (Optimizer, NestedOptimizer)}


def options_of(cls: type[Optimizer]) -> dict[str, Any]:
    """The options of an optimizer that have a default, with it; for Muon those of the AdamW beside it too.

    Raises:
        ValueError: it needs more than parameters.
    """
    found = inspect.signature(cls).parameters
    needed = [p.name for p in found.values() if p.default is p.empty and p.name != "params"]
    if needed:
        raise ValueError(
            f"{cls.__name__} needs {', '.join(needed)} besides parameters, which a name cannot give: build "
            "it in Python, in a loop of your own"
        )
    options = {p.name: p.default for p in found.values() if p.name != "params"}
    if cls is torch.optim.Muon:
        beside = inspect.signature(torch.optim.AdamW).parameters
        options |= {ours: beside[theirs].default for ours, theirs in BESIDE.items()} | {SCALE: 1.0}
    return options


def is_adam(cls: type[Optimizer]) -> bool:
    """Whether an optimizer has Adam's two `betas` and `eps`."""
    takes = options_of(cls)
    return "eps" in takes and len(takes.get("betas") or ()) == 2


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that get weight decay: matrices that are weights of an ordinary map.

    Not decayed: 1-D parameters (biases, norms, gate vectors), embeddings (a tied head is one), and the
    initial states of memories (`*.initial.*`): decaying those would pull every sequence's starting point
    to zero, and the memories' rule already has its own retention.
    """
    embedded = _embedded(model)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim >= 2
        and parameter not in embedded
        and "initial" not in name.split(".")
    }


def _embedded(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of embeddings, by whatever name: a head that shares one may come before it."""
    layers = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {parameter for layer in layers for parameter in layer.parameters(recurse=False)}


@dataclass(frozen=True)
class Recipe:
    """An optimizer by its name, with its options, for some parameters.

    Args:
        name: the optimizer's, in any case.
        lr, weight_decay: None for the optimizer's default.
        options: its other options.
        adamw: `betas` and `eps` of AdamW where the optimizer leaves parameters to it, or is one of its kind.

    Raises:
        ValueError: no such optimizer, an option that it has not, or a rate or decay that is none.
    """

    name: str
    lr: float | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    adamw: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = by_name()
        if not isinstance(self.name, str) or self.name.lower() not in known:
            raise unknown("optimizer", str(self.name).lower(), known)
        takes = options_of(self.cls)
        for option in self.options:
            if option not in takes or option in SHARED:
                raise unknown(f"option of {self.cls.__name__}:", option, takes)
        # torch checks what its constructors are given, and weight decay comes to them in groups.
        for shared, check in SHARED.items():
            if getattr(self, shared) is not None:
                check.check(shared, getattr(self, shared))
        if self.options.get("differentiable"):
            raise ValueError(
                f"differentiable lets gradients flow through the steps of {self.cls.__name__}, which then "
                "cannot move a model's parameters in place: leave it out"
            )
        if self.weight_decay and "weight_decay" not in takes:
            raise ValueError(
                f"{self.cls.__name__} has no weight decay, got {self.weight_decay}: set weight_decay to 0"
            )

    @property
    def cls(self) -> type[Optimizer]:
        """The optimizer's class."""
        return by_name()[self.name.lower()]

    @property
    def for_matrices(self) -> bool:
        """Whether the optimizer trains matrices, and leaves the rest to AdamW."""
        return SCALE in options_of(self.cls)

    def make(self, model: nn.Module, named: Named) -> Optimizer:
        """The optimizer of the named parameters of a model.

        Raises:
            ValueError: there are none, none that it can take, or an option is out of its range.
        """
        if not named:
            raise ValueError("there are no parameters that need a gradient")
        with _told(self.cls):
            if not self.for_matrices:
                options = self._options()
                optimizer = MENDED.get(self.cls, self.cls)(self._groups(model, named), **options)
                return optimizer.attach(model) if isinstance(optimizer, DeltaGD) else optimizer
            matrices, rest = matrices_and_rest(model, named)
            if not matrices:
                raise ValueError(
                    f"{self.cls.__name__} trains matrices that are weights of maps, and "
                    f"{', '.join(n for n, _ in named[:3])} … are none: train these with adamw"
                )
            if self.cls is torch.optim.Muon:
                return self._muon(model, matrices, rest)
            groups = self._groups(model, matrices) + [
                {**group, "adamw_only": True} for group in self._groups(model, rest)
            ]
            return self.cls(groups, **self._options())

    def _options(self) -> dict[str, Any]:
        """Keywords of the class."""
        beside = {ours: self.adamw[theirs] for ours, theirs in BESIDE.items() if theirs in self.adamw}
        found = {**(beside if self.for_matrices else {}), **self.options}
        if is_adam(self.cls):
            found = {**self.adamw, **found}
        if self.lr is not None:
            found["lr"] = self.lr
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        for key, value in found.items():
            self._check_kind(key, value)
        return found

    def _check_kind(self, key: str, value: Any) -> None:
        """Refuse what torch's optimizers notice at a step, if at all: another kind or number of values."""
        default = options_of(self.cls).get(key)
        if issubclass(self.cls, BaseOptimizer):  # they check for themselves
            return
        if isinstance(default, tuple):
            right = isinstance(value, tuple) and len(value) == len(default)
            wanted = f"{len(default)} numbers, such as {default}"
        elif isinstance(default, bool):
            right, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, int) and default > 1:  # of rates and momenta torch writes 0 and 1 so
            right, wanted = type(value) is int and value >= 1, "a whole number of at least 1"
        elif key == "eps":
            right, wanted = isinstance(value, (int, float)) and value >= 0, "a number of at least 0"
        else:
            return
        if not right:
            raise ValueError(
                f"an option of {self.cls.__name__} has a value that it cannot take: {key} is {value!r}; "
                f"expected {wanted}"
            )

    def _groups(self, model: nn.Module, named: Named) -> list[Group]:
        """Groups with and without weight decay; one for an optimizer that knows none."""
        default = options_of(self.cls).get("weight_decay")
        if default is None:
            return [{"params": [p for _, p in named]}] if named else []
        decayed = decayed_names(model)
        decay = default if self.weight_decay is None else self.weight_decay
        groups: list[Group] = [
            {"params": [p for n, p in named if n in decayed], "weight_decay": decay},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _muon(self, model: nn.Module, matrices: Named, rest: Named) -> Optimizer:
        """torch's Muon for matrices, and AdamW for the rest."""
        options = self._options()
        beside = {theirs: options.pop(ours) for ours, theirs in BESIDE.items() if ours in options}
        scale = options.pop(SCALE, 1.0)
        muon = Muon(self._groups(model, matrices), **options)
        if not rest:
            return muon
        lr = scale * muon.defaults["lr"]
        return NestedOptimizer([muon, torch.optim.AdamW(self._groups(model, rest), lr=lr, **beside)])


def matrices_and_rest(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> tuple[Named, Named]:
    """Matrices that are weights of maps between hidden vectors, and all other parameters."""
    handles, embedded = parts(model).handles, _embedded(model)
    matrices: Named = []
    rest: Named = []
    for name, p in named:
        is_map = p.ndim == 2 and p not in embedded and handles[name].rpartition(".")[2] not in NO_MATRICES
        (matrices if is_map else rest).append((name, p))
    return matrices, rest


@contextmanager
def _told(cls: type[Optimizer]) -> Iterator[None]:
    """Make a ValueError with the optimizer's name of what torch's checks of options raise."""
    try:
        yield
    except (TypeError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"an option of {cls.__name__} has a value that it cannot take: {error}") from error
