"""Documents in a row: several sequences end to end, read as rows of their own (spec section 8).

Longest first, and the batch shrinks as they end: work is the sum of the documents' chunks, and every engine
sees what it always sees, rows that begin at a boundary of all memories. Nothing of a document can reach
another one, as no two ever share a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.ops.document_plan import DocumentBatches, Plan, Planner, Source, plan_batches
from nested_learning.ops.document_rows import DocumentRows
from nested_learning.ops.rows import join_rows, select_rows

# From (inputs, state, real, aligned), and `first` where that is asked for, to (outputs, state).
ReadRows = Callable[..., tuple[Any, Any]]


class Documents(DocumentRows):
    """Documents in a row, with the plans of how they are read, which all layers of a model share."""

    def __init__(
        self,
        begins: Tensor,
        real: Tensor | None = None,
        keep: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(begins, real, keep, device)
        self._plans: dict[tuple[int, bool, int], Plan] = {}
        self._batches: dict[bool, DocumentBatches] = {}

    def segment(self, start: int, stop: int, keep: bool) -> Documents:
        """Documents in the columns from `start` to `stop` alone.

        Args:
            keep: whether the states after them are wanted.
        """
        begins = self.tokens.new_zeros(self.shape[0] * self.shape[1], dtype=torch.bool)
        begins[self.tokens[self.starts[~self._goes_on]]] = True
        begins = begins.view(self.shape)[:, start:stop]
        padded = None if self.padded is None else self.padded[:, start:stop]
        return Documents(begins, padded, keep, self.device)

    def batches(self, given: bool) -> DocumentBatches:
        """Documents whole, for layers that see one at once; `given` as in `plan`."""
        if given not in self._batches:
            self._batches[given] = plan_batches(self, given)
        return self._batches[given]

    def plan(self, step: int, given: bool, prefix: int = 0) -> Plan:
        """How to read the documents, the same plan for all layers that ask alike.

        Args:
            step: tokens after which chunks of the reader end: all of them, for a reader that asks for rows at
                a boundary; the shortest, for one that can make do with the number of tokens before.
            given: whether there is a state that the first documents may go on with.
            prefix: number of tokens in front of every document that begins.
        """
        key = (step, given, prefix)
        if key not in self._plans:
            self._plans[key] = Planner(self, step, given, prefix).plan()
        return self._plans[key]

    def read(
        self,
        read: ReadRows,
        inputs: Any,
        state: Any,
        step: int,
        prefix: Tensor | None = None,
        tell_first: bool = False,
    ) -> tuple[Any, Any]:
        """Read the documents with a function for rows.

        Args:
            read: from (inputs, state, real, aligned) to (outputs, state): inputs and outputs are trees of
                tensors [n, L, ...], the state is a tree of tensors [n, ...], None for the initial one; `real`
                [n, L] bool or None; `aligned` says that all rows stand at a boundary, see `ReadingStep`.
                Columns of `real` False are zero and must have no effect.
            inputs: tree of tensors [B, T, ...].
            state: tree of tensors [B, ...], from before the call; None for none.
            step: as in `plan`.
            prefix: [P, ...], read in front of every document that begins; for inputs that are one tensor.
            tell_first: give `read` a fifth argument, `first` of `ReadingStep`.

        Returns:
            outputs, trees of tensors [B, T, ...], zero for padding; and the states after the rows' last
            documents, None where they are not kept.
        """
        plan = self.plan(step, state is not None, 0 if prefix is None else len(prefix))
        flat = pytree.tree_map_only(Tensor, lambda x: x.flatten(0, 1), inputs)
        if prefix is not None:
            flat = torch.cat([flat, prefix.to(flat.dtype)])
        outputs: list[Any] = []
        states: list[Any] = []

        def states_of(sources: Sequence[Source]) -> Any:
            parts = [select_rows(state if s.step < 0 else states[s.step], s.rows) for s in sources]
            return join_rows(parts) if parts else None

        leaves, spec = pytree.tree_flatten(flat)
        taken = [[t] * len(plan.steps) if t is None else pieces_of(t, plan) for t in leaves]
        for number, now in enumerate(plan.steps):
            x = pytree.tree_unflatten([pieces[number] for pieces in taken], spec)
            told = (now.first,) if tell_first else ()
            y, after = read(x, states_of(now.before), now.real, now.aligned, *told)
            outputs.append(y)
            states.append(after)
        found = zip(*(pytree.tree_leaves(y) for y in outputs), strict=True)
        joined = [self.unpack(parts, plan.place) for parts in found]
        y = pytree.tree_unflatten(joined, pytree.tree_structure(outputs[0]))
        if not self.keep:
            return y, None
        return y, select_rows(states_of(plan.last), plan.order)

    def unpack(self, parts: Sequence[Tensor | None], place: Tensor) -> Tensor | None:
        """Outputs of all steps [n, L, ...] -> [B, T, ...]; None where there are none."""
        if parts[0] is None:
            return None
        y = torch.cat([part.flatten(0, 1) for part in parts if part is not None])
        y = y.index_select(0, place).unflatten(0, self.shape)
        if self.padded is None:
            return y
        return y.masked_fill(~self.padded.view(*self.shape, *[1] * (y.dim() - 2)), 0)


def pieces_of(x: Tensor, plan: Plan | DocumentBatches) -> list[Tensor]:
    """[n, L, ...] for each step or batch, of x [tokens, ...]; a step's are zero where `real` is False.

    All are taken at once: one by one, each would have a gradient of the size of x.
    """
    steps = plan.steps if isinstance(plan, Plan) else (*plan.new, *filter(None, [plan.going_on]))
    parts = x.index_select(0, plan.columns).split([step.columns.numel() for step in steps])
    pieces = [part.view(*step.columns.shape, *x.shape[1:]) for part, step in zip(parts, steps, strict=True)]
    if not isinstance(plan, Plan):
        return pieces
    return [
        piece
        if step.real is None
        else piece.masked_fill(~step.real.view(*step.real.shape, *[1] * (x.dim() - 1)), 0)
        for piece, step in zip(pieces, plan.steps, strict=True)
    ]
