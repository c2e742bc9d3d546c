"""The optimizer of a model by name, and one of its own for each level.

build("adamw", model, lr=3e-3, weight_decay=0.05)
build("adamw", model, lr=3e-3, tokens_per_row=256, levels=[
    {"part": "cms.1", "name": "m3", "lr": 1e-2, "period": "chunk", "reduction": "mean"},
    {"part": "initial", "lr": 1e-3, "weight_decay": 0.0},
])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nested_learning._checks import check_positive
from nested_learning._errors import unknown
from nested_learning.optimizers.multi_frequency import MultiFrequency
from nested_learning.optimizers.nested import NestedOptimizer
from nested_learning.optimizers.recipe import Named, Recipe, options_of
from nested_learning.parts import Parts, parts

KEYS = ("part", "name", "lr", "weight_decay", "period", "reduction")  # of a level, besides options
CHUNK = "chunk"  # the period that follows from a part's chunk
REST = "rest"  # name of the groups that no level names


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    levels: Sequence[Mapping[str, Any]] | None = None,
    tokens_per_row: int | None = None,
    max_grad_norm: float | None = None,
    adamw: Mapping[str, Any] | None = None,
    **options: Any,
) -> Optimizer:
    """An optimizer of all parameters of a model that need a gradient.

    Matrices (2-D weights of maps between hidden vectors) and all else are trained as the optimizer needs it:
    Muon, M3 and OrthogonalMomentum leave to AdamW what is no matrix, with embedding and head. DeltaGD is
    attached to the model. Weight decay is for the parameters of `recipe.decayed_names`.

    With `levels` each of them is trained by an optimizer of its own, at its own frequency (eq 71): it
    accumulates the gradients of `period` calls of `step` and then makes one step. What no level names is
    trained by the optimizer `name` at every step. A level is a dict:

        part: handle, module path or glob, or several in a list; see `nested_learning.parts`
        name: its optimizer; default: `name`
        lr, weight_decay: default: those of the whole
        period: K, or "chunk" for max(1, ⌊tokens of the part's chunk / tokens_per_row⌋); default 1
        reduction: "sum" (default) or "mean" of the K gradients
        any option of its optimizer; default: `options` where that is `name`, else the optimizer's own

    Args:
        name: class of `torch.optim` or `nested_learning.optimizers`, in any case.
        model: the model.
        lr: learning rate; None: the optimizer's default.
        weight_decay: as the optimizer has it (torch's Adam and SGD add it to the gradient); None: the
            optimizer's default.
        levels: parts that are trained in a way of their own.
        tokens_per_row: tokens that one row of a batch contributes to a step, for the period "chunk".
        max_grad_norm: norm to which the gradient of each level, over all its parameters, is clipped when its
            optimizer is about to see it, and that of what no level names. None: it is not clipped.
        adamw: `betas` and `eps` of AdamW where it trains what another optimizer leaves to it, and of all
            optimizers of Adam's kind that name none of their own.
        options: of the optimizer `name`; for Muon also `adamw_betas`, `adamw_eps` and `adamw_lr_scale`.

    Returns:
        One torch optimizer, with `param_groups`, `state` and a state_dict as torch's have them. Several
        inside are a `NestedOptimizer`, levels a `MultiFrequency` each, whose groups have the part as `name`.

    Raises:
        ValueError: no such optimizer, part or option; a parameter in two levels; a level without parameters
            to train, or with none that its optimizer can take; a period below 1, or "chunk" where no chunk or
            no tokens_per_row is known; a value out of its range.
    """
    whole = Recipe(name, lr, weight_decay, dict(options), dict(adamw or {}))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if levels:
        entries = [LevelEntry(index, entry, whole) for index, entry in enumerate(levels)]
        return _nested(model, named, whole, entries, tokens_per_row, max_grad_norm)
    optimizer = whole.make(model, named)
    return optimizer if max_grad_norm is None else _at_period(optimizer, 1, "sum", max_grad_norm)


def _nested(
    model: nn.Module,
    named: Named,
    whole: Recipe,
    entries: Sequence[LevelEntry],
    tokens_per_row: int | None,
    max_grad_norm: float | None,
) -> NestedOptimizer:
    """An optimizer per entry, and the whole's for the rest."""
    found = parts(model)
    optimizers: list[Optimizer] = []
    for entry, own in zip(entries, _split(found, named, entries), strict=True):
        with entry.told():
            inner = entry.recipe.make(model, own)
            period = entry.steps(found, tokens_per_row)
            optimizers.append(
                _at_period(inner, period, entry.reduction, max_grad_norm, ", ".join(entry.parts))
            )
    taken = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    rest = [(n, p) for n, p in named if id(p) not in taken]
    if rest:
        optimizers.append(_at_period(whole.make(model, rest), 1, "sum", max_grad_norm, REST))
    return NestedOptimizer(optimizers)


class LevelEntry:
    """One entry of `levels`, read and checked.

    Args:
        index: its place in the list.
        entry: the entry.
        whole: the recipe of the whole, from which an entry takes what it leaves out.

    Attributes:
        parts: the parts that it names.
        period: K or "chunk".
        reduction: "sum" or "mean".
        recipe: its optimizer and options.

    Raises:
        ValueError: it is no dict, names no part, or has keys or values that do not fit.
    """

    def __init__(self, index: int, entry: Mapping[str, Any], whole: Recipe) -> None:
        self.title = f"levels[{index}]"
        if not isinstance(entry, Mapping) or not entry.get("part"):
            raise ValueError(
                f"{self.title} is {entry!r}; expected keys such as {{'part': 'cms.1', 'period': 8}}"
            )
        named = entry["part"]
        self.parts: list[str] = [named] if isinstance(named, str) else named
        if not isinstance(self.parts, (list, tuple)) or not all(isinstance(part, str) for part in self.parts):
            raise ValueError(f"{self.title} has the part {named!r}; expected a name, or several in a list")
        self.title += f" ({', '.join(map(str, self.parts))})"
        with self.told():
            self.period = entry.get("period", 1)
            self.reduction = entry.get("reduction", "sum")
            self.recipe = self._recipe(entry, whole)
            if self.reduction not in ("sum", "mean"):
                raise ValueError(f"reduction must be 'sum' or 'mean', got {self.reduction!r}")
            if self.period != CHUNK and (type(self.period) is not int or self.period < 1):
                raise ValueError(f"period must be a whole number >= 1, or 'chunk'; got {self.period!r}")

    def _recipe(self, entry: Mapping[str, Any], whole: Recipe) -> Recipe:
        options = {key: value for key, value in entry.items() if key not in KEYS}
        name = entry.get("name", whole.name)
        plain = Recipe(name)  # refuses an unknown optimizer before its options
        for option in options:
            if option not in options_of(plain.cls):
                known = {*KEYS, *options_of(plain.cls)}
                raise unknown(f"key of a level that {plain.cls.__name__} trains:", option, known)
        inherited = whole.options if plain.cls is whole.cls else {}
        return Recipe(
            name,
            entry.get("lr", whole.lr),
            entry.get("weight_decay", whole.weight_decay),
            {**inherited, **options},
            whole.adamw,
        )

    def steps(self, found: Parts, tokens_per_row: int | None) -> int:
        """K: steps of the run per step of the level."""
        if self.period != CHUNK:
            return int(self.period)
        chunks = {found.chunk(part) for part in self.parts}
        chunk = chunks.pop() if len(chunks) == 1 else None
        if chunk is None:
            raise ValueError(
                "period 'chunk' is for parts with one chunk length, such as the CMS levels "
                f"{', '.join(sorted(found.chunks)) or '(this model has none)'}; give a number"
            )
        if tokens_per_row is None:
            raise ValueError(
                "period 'chunk' needs tokens_per_row, the tokens that one row of a batch contributes to a "
                f"step (the chunk has {chunk}); give it, or the period as a number"
            )
        check_positive(tokens_per_row=tokens_per_row)
        return max(1, chunk // tokens_per_row)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Put the entry's place before the message of a ValueError."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.title}: {error}") from error


def _split(found: Parts, named: Named, entries: Sequence[LevelEntry]) -> list[Named]:
    """The parameters of each entry, of which none is in two."""
    trained = dict(named)
    owner: dict[str, LevelEntry] = {}
    members: list[Named] = []
    for entry in entries:
        with entry.told():
            names = list(dict.fromkeys(n for part in entry.parts for n in found.find(part)))
            own = [(n, trained[n]) for n in names if n in trained]
            if not own:
                raise ValueError(
                    "all of its parameters are frozen (requires_grad=False): leave the level out"
                )
            twice = next((n for n, _ in own if n in owner), None)
            if twice is not None:
                raise ValueError(
                    f"{twice} (part {found.handles[twice]!r}) is in {owner[twice].title} too; a parameter "
                    "has one level: name smaller parts"
                )
        owner |= {n: entry for n, _ in own}
        members.append(own)
    return members


def _at_period(
    inner: Optimizer, period: int, reduction: str, max_grad_norm: float | None, name: str | None = None
) -> MultiFrequency:
    """The optimizer with all its groups at one period, clipped together."""
    if name is not None:
        for group in inner.param_groups:
            group["name"] = name
    first = inner.param_groups[:1]
    inside = inner.ours() if isinstance(inner, NestedOptimizer) else [inner]
    raises = any(getattr(each, "error_if_nonfinite", False) for each in inside)
    return MultiFrequency(first, lambda _: inner, period, reduction, raises, max_grad_norm)
