"""The state of a level in one row: its delta, the sums of its unfinished chunk, the state of its rule.

A slot is one learned matrix: the name of a weight for a full delta, and `NAME:down`, `NAME:up` for the two
factors of a low-rank one (Δ = up · down, [out, in] = [out, r] [r, in]; `down` starts with orthonormal rows,
so that a step on `up` is the full step projected on r directions; `up` starts at zero). A slot without an
entry in `deltas` has never been written: its delta is zero and takes no memory. A `down` that does not learn
is no slot; it lies in `drawn`.

Tensors are written in place only while this object alone has them; `share` hands out a copy of the object
that has the same tensors, and whoever writes next copies them first. So a snapshot costs nothing until
then, and the base weights are never touched.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.context import Context
from nested_learning.continual.objectives.answers import KeptAnswers
from nested_learning.continual.objectives.passage import KeptTokens
from nested_learning.continual.replaying.store import Store
from nested_learning.continual.rules import RuleState
from nested_learning.memory.state import Weights
from nested_learning.ops.context import full_precision

DOWN, UP = ":down", ":up"
_versions = itertools.count(1)


def product(down: Tensor, up: Tensor) -> Tensor:
    """up · down of two factors [r, in] and [out, r], or of stacks of them, in their precision also under
    autocast."""
    with full_precision(up.device):
        return up @ down


@dataclass
class DeltaState:
    """State of one level in one row.

    Attributes:
        deltas: deltas by slot, float32 (float64 under a float64 model).
        sums: sums of the chunk's gradients so far, by slot, in the same precision.
        rule: state of the inner rule.
        loss, pairs: sum of the next-token losses of the chunk so far, and number of its pairs.
        history: mean losses of the chunks before, for `gate_quantile`.
        drawn: `down` factors that do not learn. They are never written, so that snapshots and averages of the
            level have the same tensors.
        units: of a sparse level, indices of the hidden units that were ever written, int64 [m], ascending, by
            the names of their MLPs. Its deltas and the states of its rule are rows [m, weights of a unit].
        background: running mean of the squared norm of each unit's gradient, by the names of the MLPs.
        chunks: number of chunks that `background` is the mean of.
        read: the tokens of the running chunk so far, and those before it that its re-reading begins with;
            None where the level re-reads nothing.
        distilled: gradients of what windows taught as they closed, by slot, weighted, since the last write.
        shared: whether another object may have the same tensors, which must not be written then.
    """

    deltas: Weights = field(default_factory=dict)
    sums: Weights = field(default_factory=dict)
    rule: RuleState = field(default_factory=dict)
    loss: float = 0.0
    pairs: int = 0
    history: list[float] = field(default_factory=list)
    shared: bool = False
    drawn: Weights = field(default_factory=dict)
    units: Weights = field(default_factory=dict)
    background: Weights = field(default_factory=dict)
    chunks: int = 0
    read: KeptTokens | None = None
    distilled: Weights = field(default_factory=dict)

    def share(self) -> DeltaState:
        """A second object with the same values; neither sees what the other does later."""
        self.shared = True
        return dataclasses.replace(
            self,
            deltas=dict(self.deltas),
            sums=dict(self.sums),
            distilled=dict(self.distilled),
            rule=dict(self.rule),
            history=list(self.history),
            drawn=dict(self.drawn),
            units=dict(self.units),
            background=dict(self.background),
        )

    def own(self) -> None:
        """Make sure that deltas and sums may be written in place."""
        if self.shared:
            self.deltas = {slot: t.clone() for slot, t in self.deltas.items()}
            self.sums = {slot: t.clone() for slot, t in self.sums.items()}
            self.distilled = {slot: t.clone() for slot, t in self.distilled.items()}
            self.shared = False

    def tensors(self) -> Iterable[Tensor]:
        """All tensors of the state."""
        yield from self.deltas.values()
        yield from self.sums.values()
        yield from self.drawn.values()
        yield from self.units.values()
        yield from self.background.values()
        yield from self.distilled.values()
        for stored in self.rule.values():
            yield from stored.values()


@dataclass
class Row:
    """Everything one row (a user, a stream of text) remembers.

    Attributes:
        levels: states of the levels, fast to slow.
        position: number of tokens observed so far.
        tokens: ids [n] of the present window, the unread last one included.
        learn: bool [n] on the CPU, whether the levels learn to predict each of `tokens`.
        start: index in `tokens` of the first token of the present segment.
        context: keys and values, or states, of the tokens read; all of `tokens` but the last, or fewer.
        answers: predictions of the tokens in the second half of the window, all but those of the present
            segment; None where there are none, or no level distils.
        resume: the context that the present segment began with, where `context` has gone on and cannot be
            cropped; else None.
        version: changes whenever a delta does, and never stands for two contents.
        in_force: indices of the levels whose deltas act; None while text is read: all that are no average.
        store: examples of what was read; None where nothing is kept.
    """

    levels: list[DeltaState]
    position: int
    tokens: Tensor
    learn: Tensor
    start: int = 0
    context: Context = field(default_factory=Context)
    version: Hashable = field(default_factory=lambda: next(_versions))
    in_force: tuple[int, ...] | None = None
    store: Store | None = None
    answers: KeptAnswers | None = None
    resume: Context | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a version counts in its process alone; in another one it may be, or become, that of another row
        self.__dict__.update(state, version=next(_versions))

    @classmethod
    def new(cls, levels: Iterable[DeltaState], device: torch.device) -> Row:
        """A row that has read nothing, with these states of its levels."""
        return cls(
            list(levels),
            position=0,
            tokens=torch.empty(0, dtype=torch.long, device=device),
            learn=torch.empty(0, dtype=torch.bool, device="cpu"),
        )

    def share(self) -> Row:
        """A copy that goes its own way; see `DeltaState.share`."""
        return dataclasses.replace(self, levels=[level.share() for level in self.levels])

    def unread(self) -> Row:
        """A row with these deltas that has read nothing."""
        fresh = dataclasses.replace(self, position=0)
        fresh.clear_context()
        return fresh

    def only(self, levels: tuple[int, ...] | None) -> Row:
        """The row with the deltas of these levels alone in force; None for those with which text is read.
        For reading, not for learning."""
        if levels is None:
            return self
        return dataclasses.replace(self, in_force=levels, version=(self.version, levels))

    def mark_changed(self) -> None:
        """Give the row a version of its own, after a delta has changed."""
        self.version = next(_versions)

    def clear_context(self) -> None:
        """Forget the attention context; what was learned and the place within the chunks stay."""
        self.tokens, self.learn, self.start, self.context = self.tokens[:0], self.learn[:0], 0, Context()
        self.answers = None
        self.resume = None
