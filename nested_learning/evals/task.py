"""Tasks: a question that methods answer with figures, and the claims that it decides."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from nested_learning._checks import check_types, require
from nested_learning._errors import unknown
from nested_learning.evals.claims import Claim
from nested_learning.evals.method import Method
from nested_learning.evals.rows import Figures, MethodRows

BUDGETS = ("smoke", "small", "full")
TUNING_SEED = 1000  # the first that chooses settings; no reported seed
OF_NO_RUN = ("seeds", "tuning_seeds")  # options that say which runs are made, and decide no figure of one


OptionsT = TypeVar("OptionsT")


class Task(ABC, Generic[OptionsT]):
    """A question: methods train or learn, answer, and are scored.

    A subclass is registered by `register_task` and found by its name. It is made from its options alone and
    keeps no state between runs: a run may take place in another process.

    Attributes:
        name: in lower case, as the command line has it.
        title: one line for tables and `--help`.
        version: raised with every change that alters figures; kept runs of another version are not used.
        budgets: options by budget, all instances of one frozen dataclass whose fields JSON can hold. A field
            `seeds` says how many seeds are reported, `tuning_seeds` on how many others settings are chosen,
            by the mean; without it, on one.
        columns: figures of the table, numbers, by name, each with what it is.
        headline: the figure by which `grid` is decided and methods are plotted; one of the columns.
        higher_is_better: whether a larger headline is better.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Any]]
    columns: ClassVar[Mapping[str, str]]
    headline: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @classmethod
    def at(cls, budget: str, **changed: Any) -> Task[Any]:
        """The task at a budget, with options changed by name.

        Raises:
            ValueError: no such budget or option, a value of another type, no seed, or a number below 0 where
                every budget has numbers above it.
        """
        if budget not in cls.budgets:
            raise unknown(f"budget of {cls.name}", budget, cls.budgets)
        options = cls.budgets[budget]
        names = [each.name for each in dataclasses.fields(options)]
        for name in changed:
            if name not in names:
                raise unknown(f"option of {cls.name}", name, names)
        how = f"--option {cls.name}.{{}}=…"
        options = dataclasses.replace(options, **changed)
        check_types(options, how=how)
        for name, what in zip(OF_NO_RUN, ("reported seeds", "seeds that choose settings"), strict=True):
            count = getattr(options, name, 1)
            require(1 <= count <= TUNING_SEED, name, count, f"1 to {TUNING_SEED} {what}", how)
        for name, value in changed.items():
            usual = [each for own in cls.budgets.values() for each in _numbers(getattr(own, name))]
            if min(usual, default=0) > 0:  # sizes, counts and rates
                require(min(_numbers(value), default=0) >= 0, name, value, "no number below 0", how)
        return cls(options)

    @abstractmethod
    def methods(self) -> Sequence[Method]:
        """Methods that stand in the table unless others are chosen, in its order."""

    @abstractmethod
    def run(self, method: Method, seed: int) -> Figures:
        """Figures of one run: the method, at its settings, learns and answers.

        All randomness follows from the seed, so that the same run gives the same figures; runs of several
        methods at one seed have the same data, by which their differences are paired.

        Raises:
            ValueError: the method cannot do this task; says why.
        """

    def accepts(self, method: Method) -> str | None:
        """Why the task cannot be put to a method, or None where it can."""
        known = {type(each) for each in self.methods()}
        if isinstance(method, tuple(known)):
            return None
        kinds = ", ".join(sorted(kind.kind for kind in known))
        return f"{method.name!r} is a method of kind {method.kind!r}; {self.name} takes {kinds}"

    def lacking(self, method: Method) -> str | None:
        """Package that this machine lacks for a method, in words; None: none. Reports of finished runs do
        without."""
        return None

    def tabled(self) -> Sequence[Method]:
        """As `methods`, also those that this machine lacks something for."""
        return self.methods()

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        """Settings; the best is chosen on the tuning seeds, by the mean headline. One: nothing is tuned."""
        return [{}]

    def tuning_seeds(self) -> range:
        """Seeds on which settings are chosen: as many as the options say, none of them reported."""
        return range(TUNING_SEED, TUNING_SEED + getattr(self.options, "tuning_seeds", 1))

    def tuned_on(self) -> str:
        """The seeds of `tuning_seeds` in words."""
        seeds = self.tuning_seeds()
        return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"

    def tune(self, method: Method, seed: int) -> Figures:
        """Figures of a run that chooses settings; where the task has validation data, scored on these."""
        return self.run(method, seed)

    def missing(self) -> str | None:
        """A file or package that the task needs and this machine lacks, and how to get it; None: nothing."""
        return None

    def constants(self) -> Mapping[str, Figures]:
        """Rows that need no run: chance, the majority, always the same answer."""
        return {}

    def claims(self) -> Sequence[Claim]:
        """Statements that the rows decide."""
        return ()

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Numbers of the paper, by method and column, for the report."""
        return {}

    def note(self) -> str:
        """Parts of the original protocol that the options leave out, for the reader of the table."""
        return ""

    def shown(self) -> set[str]:
        """Names of the figures that are shown or compared, and so have to be numbers."""
        return {*self.columns, self.headline, "parameters"}

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Write a figure (PNG) of the rows, several plots in one; by default the headline of each method."""
        from nested_learning.evals.report.figures import bars

        bars(rows, self.headline, self.columns[self.headline], path)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in an option's value: itself, or those in its lists and groups."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield float(value)
