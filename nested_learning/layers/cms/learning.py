"""A level that learns in context: its sums over a chunk, and the weights that it writes at the boundary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.layers.cms.block import MLPBlock
from nested_learning.layers.cms.nested import initial_gradients, remember, start_context
from nested_learning.layers.cms.regression import KeyValue, delta_rule_gradient, summed_gradients
from nested_learning.layers.cms.segments import Segments
from nested_learning.layers.cms.writer import (
    DELTA_RULE_MATRIX,
    LevelState,
    LevelWriter,
    Rows,
    both,
    choose,
    zeros,
)
from nested_learning.memory.state import Weights
from nested_learning.ops.context import full_precision, transformed


class LearningLevel(NamedTuple):
    """One level of a system in a call on B rows; its state goes in and comes out.

    block, writer: modules of the level.
    slower: writer of the next level, which learns this one's initial state; None unless "nested".
    projections: keys and values from the block's input; None unless "regression".
    scale: [e] each head's weight at its hidden units (eq 74); None in a chain.
    matrices: the block's matrices [out, in]: what the slowest level trains, and what learning starts from.
    own: the same, as many as there are rows [B, out, in].
    """

    block: MLPBlock
    writer: LevelWriter
    slower: LevelWriter | None
    projections: KeyValue | None
    scale: Tensor | None
    matrices: Weights
    own: Weights

    def for_rows(self, count: int) -> LearningLevel:
        """The level in a call on so many rows."""
        return self._replace(own={name: W.expand(count, *W.shape) for name, W in self.matrices.items()})

    def start(self, exact: bool) -> LevelState:
        """The state before the first token; `exact`: the initial state learns from exact gradients."""
        weights = {name: W.clone() for name, W in self.own.items()}  # no optimizer step must reach a state
        state = LevelState(weights, zeros(weights), self.writer.start_rule(weights), {}, {}, {}, {})
        if self.slower is None:
            return state
        state = state._replace(initial=weights, initial_rule=self.slower.start_rule(weights))
        if not exact:
            return state._replace(initial_sums=zeros(weights))
        up = weights["up.weight"]
        return state._replace(
            context=start_context(len(up), self.slower.level.chunk_size, up.shape[-1], like=up)
        )

    def read(
        self, x: Tensor, state: LevelState, segments: Segments, position: Tensor, learn: Tensor | None
    ) -> tuple[Tensor, LevelState]:
        """The update "regression": run the block over tokens and learn from them.

        Args:
            x: [B, T, D].
            state: state before the tokens.
            segments: the call's columns, cut at this level's boundaries.
            position: [B] int64, tokens before x.
            learn: [B, T] bool, the tokens that are learned; None: all.

        Returns:
            The block's branch [B, T, D] and the state after the tokens.
        """
        assert self.projections is not None
        x, learn = segments.pack(x), segments.learned(learn)
        dtype = self.own["up.weight"].dtype
        keys, values = self.projections(x[:, : segments.taught], dtype)
        keys = self.block.norm(keys).to(dtype)
        seen = position if segments.position is None else segments.position
        branches = []
        for segment in segments:
            # Until its first write a row that began in the call has the block's matrices, as all others have:
            # products with one matrix cost less than those with one per row.
            first = isinstance(seen, int) and seen < self.writer.level.chunk_size
            current = self.matrices if first else state.weights
            weights = {name: W.to(x.dtype) for name, W in current.items()}
            branches.append(self.block(segment.of(x), weights, self.scale, residual=False))
            if segment.read_only:
                continue
            key, value = segment.of(keys), segment.of(values)
            taught = None if learn is None else segment.of(learn)
            with full_precision(x.device):
                grads = self._gradients(current, state.sums, key, value, taught)
                if state.context:
                    kept = remember(state.context, key, value, taught, segment.real, seen)
                    state = state._replace(context=kept)
                count = len(segment) if segment.real is None else segment.real.sum(1)
                seen = seen + count
                moved: Rows = True if segment.real is None else count > 0
                state = self._finish(_add(state, grads, grads), seen, False if segments.inside else moved)
        return segments.unpack(torch.cat(branches, 1)), state

    def learn(
        self, state: LevelState, inside: Weights, crossing: Weights | None, position: Tensor, rows: Tensor
    ) -> LevelState:
        """Take in the gradients of one chunk of the fastest level; arguments as of the system's `learn`.

        `position` [B] int64 is that at the chunk's end. A level counts the pair of tokens across it unless
        its own chunk ends there as well.
        """
        sums = _with_crossing(inside, crossing, position % self.writer.level.chunk_size != 0)
        initial_sums = sums
        if self.slower is not None:
            initial_sums = _with_crossing(inside, crossing, position % self.slower.level.chunk_size != 0)
        return self._finish(_add(state, sums, initial_sums), position, rows)

    def _gradients(
        self, weights: Weights, sums: Weights, key: Tensor, value: Tensor, learn: Tensor | None
    ) -> Weights:
        """Gradients that tokens [B, S, D] of one chunk add to its sums, at the weights in force."""
        scale = None if self.scale is None else self.scale.to(key.dtype)
        grads, phi, _ = summed_gradients(weights, key, value, self.block.activation, learn, scale)
        if self.writer.rule == "dgd":
            anchor, total = weights[DELTA_RULE_MATRIX], sums[DELTA_RULE_MATRIX]
            grads[DELTA_RULE_MATRIX] = delta_rule_gradient(anchor, total, phi, value, self.writer.lr, learn)
        return grads

    def _finish(self, state: LevelState, position: Tensor | int, moved: Rows) -> LevelState:
        """Write, in the rows that have just come to a boundary (eq 71, eq 72).

        Args:
            state: state with the sums of the chunk.
            position: tokens so far, [B] int64 or one number for all rows.
            moved: the rows that have come to `position` by a token of theirs.
        """
        ends = both(moved, position % self.writer.level.chunk_size == 0)
        if ends is False:
            return state
        initial = state.initial or self.own
        weights, rule = self.writer.write(state.weights, initial, state.sums, state.rule, ends)
        sums = choose(ends, zeros(state.sums), state.sums)
        state = state._replace(weights=weights, rule=rule, sums=sums)
        if self.slower is None:
            return state
        ends = both(moved, position % self.slower.level.chunk_size == 0)
        if ends is False:
            return state
        sums = state.initial_sums
        if state.context:
            # Waits for the device, but saves a whole run.
            if isinstance(ends, Tensor) and not transformed() and not ends.any():
                return state
            sums = initial_gradients(self.writer, self.block.activation, state)
        # eq 72: the slower level writes the initial state, from which this level starts again.
        initial, rule = self.slower.write(state.initial, self.own, sums, state.initial_rule, ends)
        return state._replace(
            weights=choose(ends, initial, state.weights),
            rule=choose(ends, self.writer.start_rule(initial), state.rule),
            initial=initial,
            initial_sums=choose(ends, zeros(state.initial_sums), state.initial_sums),
            initial_rule=rule,
        )


def _add(state: LevelState, grads: Weights, initial_grads: Weights) -> LevelState:
    """Add gradients [B, out, in] to the sums of the chunk and of the slow chunk."""
    return state._replace(
        sums={name: total + grads[name] for name, total in state.sums.items()},
        initial_sums={name: total + initial_grads[name] for name, total in state.initial_sums.items()},
    )


def _with_crossing(inside: Weights, crossing: Weights | None, counts: Tensor) -> Weights:
    """`inside`, plus `crossing` in the rows where it counts."""
    if crossing is None:
        return inside
    counts = counts.view(-1, 1, 1)
    return {name: g + torch.where(counts, crossing[name], 0) for name, g in inside.items()}
