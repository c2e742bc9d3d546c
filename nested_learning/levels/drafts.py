"""Components and transfers while they are collected, before names are unique."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nested_learning.levels.components import Component, Transfer, TransferKind
from nested_learning.parts import Parts


@dataclass(eq=False)
class Draft:
    """A component to be: its bytes, modules and needs grow as they are found.

    Attributes:
        component: the component without its final name and what the fields below say; the rule of weights
            is empty.
        where: names of the modules that have one.
        needs: drafts whose state its update needs, in the order in which they were found.
        parameters: the parameters that weights are, or that an optimizer's memory serves; empty for memories
            in context.
        rules: how these parameters are trained.
        last_seen: number of the module that registered the last of these parameters.
    """

    component: Component
    where: dict[str, None] = field(default_factory=dict)
    needs: dict[Draft, None] = field(default_factory=dict)
    parameters: dict[Tensor, None] = field(default_factory=dict)
    rules: dict[str, None] = field(default_factory=dict)
    last_seen: int = 0


class Drafts:
    """All drafts of a system and what passes between them.

    Args:
        parts: the model's parts.
        names: name of each of the model's parameters.
    """

    def __init__(self, parts: Parts, names: Mapping[Tensor, str]) -> None:
        self._parts, self._parameter_names = parts, names
        self._drafts: dict[Component, Draft] = {}
        self._passes: dict[tuple[Draft, Draft, TransferKind, str], None] = {}

    def add(self, component: Component, state_bytes: int | None, measured: bool) -> Draft:
        """The draft that was begun for such a component, or a new one, with so many bytes more.

        One part whose bytes are not known, or not measured, makes it all so.
        """
        empty = dataclasses.replace(component, state_bytes=0, measured=True)
        draft = self._drafts.setdefault(empty, Draft(empty))
        before = draft.component.state_bytes
        draft.component = dataclasses.replace(
            draft.component,
            state_bytes=None if state_bytes is None or before is None else before + state_bytes,
            measured=draft.component.measured and measured,
        )
        return draft

    def add_pass(
        self, sources: Iterable[Draft], targets: Iterable[Draft], kind: TransferKind, what: str
    ) -> None:
        """Each of the sources passes something to each of the targets."""
        targets = list(targets)
        for source in sources:
            self._passes.update(((source, target, kind, what), None) for target in targets)

    @property
    def weights(self) -> list[Draft]:
        """Drafts of weights."""
        return [draft for draft in self._drafts.values() if draft.component.kind == "weights"]

    def by_name(self) -> dict[str, list[Draft]]:
        """The drafts of each name, before names are unique."""
        found: dict[str, list[Draft]] = defaultdict(list)
        for draft in self._drafts.values():
            found[draft.component.name].append(draft)
        return dict(found)

    def components(self) -> list[Component]:
        """All components with unique names, in the order in which they were found."""
        names = self._names()
        return [
            dataclasses.replace(
                draft.component,
                name=names[draft],
                parameters=sum(p.numel() for p in draft.parameters if draft.component.kind == "weights"),
                part=self._part(draft),
                rule="; ".join(draft.rules) or draft.component.rule,
                where=tuple(draft.where),
                needs=tuple(names[other] for other in draft.needs),
            )
            for draft in self._drafts.values()
        ]

    def _part(self, draft: Draft) -> tuple[str, ...]:
        names = {self._parameter_names[p] for p in draft.parameters if p in self._parameter_names}
        everything = draft.component.kind == "optimizer" and len(names) == len(self._parts.handles)
        return ("all",) if everything else tuple(self._parts.cover(names))

    def transfers(self) -> tuple[Transfer, ...]:
        """Everything that passes, from several sources to several targets where each reaches all of them."""
        names = self._names()
        reached: dict[tuple[str, TransferKind, str], dict[str, None]] = defaultdict(dict)
        for source, target, kind, what in self._passes:
            reached[names[source], kind, what][names[target]] = None
        alike: dict[tuple[frozenset[str], TransferKind, str], list[str]] = defaultdict(list)
        for (name, kind, what), targets in reached.items():
            alike[frozenset(targets), kind, what].append(name)
        return tuple(
            Transfer(
                sources=tuple(sources), targets=tuple(reached[sources[0], kind, what]), kind=kind, what=what
            )
            for (_, kind, what), sources in alike.items()
        )

    def _names(self) -> dict[Draft, str]:
        """Unique names: one that several drafts have is followed by frequencies, and then by numbers."""
        counts = Counter(draft.component.name for draft in self._drafts.values())
        taken: Counter[str] = Counter()
        names = {}
        for draft in self._drafts.values():
            name = draft.component.name
            if counts[name] > 1:
                name = f"{name}, {draft.component.frequency}"
            taken[name] += 1
            names[draft] = name if taken[name] == 1 else f"{name} ({taken[name]})"
        return names
