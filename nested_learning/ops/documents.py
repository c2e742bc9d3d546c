"""Documents in a row: several sequences end to end, read as rows of their own (spec section 8).

Longest first, and the batch shrinks as they end: work is the sum of the documents' chunks, and every engine
sees what it always sees, rows that begin at a boundary of all memories. Nothing of a document can reach
another one, as no two ever share a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nested_learning.ops.document_plan import DocumentBatch, Layout, Plan, Planner, Source, plan_batches
from nested_learning.ops.document_rows import DocumentRows
from nested_learning.ops.places import take
from nested_learning.ops.rows import join_rows, select_rows

# From (inputs, state, real, aligned), and `first` where that is asked for, to (outputs, state).
ReadRows = Callable[..., tuple[Any, Any]]


class Documents(DocumentRows):
    """Documents in a row, with the plans of how they are read, which all layers of a model share."""

    @functools.cached_property
    def _plans(self) -> dict[tuple[int, bool, int], Plan]:
        return {}

    @functools.cached_property
    def _batches(self) -> dict[bool, tuple[tuple[DocumentBatch, ...], DocumentBatch | None, Layout]]:
        return {}

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

    def batches(self, given: bool) -> tuple[tuple[DocumentBatch, ...], DocumentBatch | None, Layout]:
        """All documents whole, in batches: for layers that see a document at once.

        Returns:
            The documents that begin, in batches of lengths of which none is below `ALIKE` times the longest;
            those that go on with a state, in one batch; and the layout of the first and then of the other.
        """
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
        leaves, spec = pytree.tree_flatten(inputs)
        parts = [self.gather(x, plan.layout, prefix) for x in leaves]
        outputs: list[Any] = []
        states: list[Any] = []

        def states_of(sources: Sequence[Source]) -> Any:
            parts = [select_rows(state if s.step < 0 else states[s.step], s.rows) for s in sources]
            return join_rows(parts) if parts else None

        for i, now in enumerate(plan.steps):
            x = pytree.tree_unflatten([part[i] for part in parts], spec)
            told = (now.first,) if tell_first else ()
            y, after = read(x, states_of(now.before), now.real, now.aligned, *told)
            outputs.append(y)
            states.append(after)
        found = zip(*(pytree.tree_leaves(y) for y in outputs), strict=True)
        joined = [self.unpack(pieces, plan.layout) for pieces in found]
        y = pytree.tree_unflatten(joined, pytree.tree_structure(outputs[0]))
        if not self.keep:
            return y, None
        return y, select_rows(states_of(plan.last), plan.order)

    def gather(self, x: Tensor | None, layout: Layout, prefix: Tensor | None = None) -> Sequence[Any]:
        """Tokens x [B, T, ...] as they stand in each batch of a layout, [n, L, ...]; None where x is."""
        if x is None:
            return [None] * len(layout.shapes)
        taken = take(x.flatten(0, 1), layout.tokens, layout.columns)
        if prefix is not None and layout.prefix is not None:
            columns, tokens = layout.prefix
            taken = taken.index_put((columns,), prefix.to(x.dtype).index_select(0, tokens))
        pieces = taken.split([n * length for n, length in layout.shapes])
        return [piece.unflatten(0, shape) for piece, shape in zip(pieces, layout.shapes, strict=True)]

    def unpack(self, parts: Sequence[Tensor | None], layout: Layout) -> Tensor | None:
        """Outputs of all batches [n, L, ...] -> [B, T, ...], zero for padding; None where there are none."""
        if parts[0] is None:
            return None
        y = torch.cat([part.flatten(0, 1) for part in parts if part is not None])
        return take(y, layout.columns, layout.tokens).unflatten(0, self.shape)
