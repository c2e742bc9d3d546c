"""How a level of the continuum memory system learns: sums over a chunk, written at its boundary (eq 71)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, vmap

from nested_learning.layers.cms.level import CMSLevel
from nested_learning.memory.state import State

Tensors = dict[str, Tensor]
# Rows at a boundary: [B] bool, or a Python bool where it is known to be all or none.
Rows = Tensor | bool

# The matrix that the rule "dgd" changes token by token, see `cms.regression`.
DELTA_RULE_MATRIX = "down.weight"


class LevelState(NamedTuple):
    """What one level carries; every tensor has the batch first.

    weights: of the block's matrices, in force since the last boundary.
    sums: gradients of the unfinished chunk, summed (for the delta rule's matrix: minus the change so far).
    rule: what the inner rule carries, by matrix and field; empty for gradient descent.
    initial, initial_sums, initial_rule: the same for the initial state that the next slower level learns
        (variant "nested"); empty in the others.
    context: the keys and values of the unfinished slow chunk, where that level takes the exact gradient
        (`cms.nested`); then there are no `initial_sums`.
    """

    weights: Tensors
    sums: Tensors
    rule: Tensors
    initial: Tensors
    initial_sums: Tensors
    initial_rule: Tensors
    context: Tensors


@dataclass(frozen=True)
class CMSState(State):
    """The state of a continuum memory system that learns in context.

    Attributes:
        position: [B] int64, tokens read modulo the slowest chunk length (with "lm": those learned from or
            passed over, a multiple of the fastest).
        weights, sums, rule, initial, initial_sums, initial_rule, context: see `LevelState`; the keys begin
            with the level's index. None where no level has any.
    """

    position: Tensor
    weights: Tensors
    sums: Tensors
    rule: Tensors | None
    initial: Tensors | None
    initial_sums: Tensors | None
    initial_rule: Tensors | None
    context: Tensors | None = None

    def level(self, index: int) -> LevelState:
        """One level's part."""
        prefix = f"{index}."
        parts = ({} if (part := getattr(self, name)) is None else part for name in LevelState._fields)
        return LevelState(
            *({k.removeprefix(prefix): t for k, t in part.items() if k.startswith(prefix)} for part in parts)
        )

    @classmethod
    def join(cls, position: Tensor, levels: Mapping[int, LevelState]) -> CMSState:
        """The inverse of `level`, over all levels that learn."""
        fields: dict[str, Any] = {}
        for name in LevelState._fields:
            part = {f"{i}.{k}": t for i, state in levels.items() for k, t in getattr(state, name).items()}
            fields[name] = part or None
        return cls(position, **fields)


class LevelWriter(nn.Module):
    """The writes of one level: W ← W_init + α (W − W_init) − η u(clip(Σ gradients)) at its boundaries.

    Args:
        level: chunk length, learning rate, rule, clip, retention.
    """

    def __init__(self, level: CMSLevel) -> None:
        super().__init__()
        self.level = level
        self.rule: str = level.option("rule")
        self.log_lr = nn.Parameter(torch.empty(())) if level.option("learn_lr") else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.log_lr is not None:
            self.log_lr.fill_(self.level.option("lr")).log_()

    @property
    def lr(self) -> Tensor | float:
        """η, a tensor where it is learned."""
        return self.level.option("lr") if self.log_lr is None else self.log_lr.exp()

    def start(self, own: Tensors, slower: LevelWriter | None) -> LevelState:
        """The state before the first token, from the initial matrices `own` [B, out, in] of each row.

        Copies, not views: the next optimizer step must not reach a state.
        """
        weights = {name: W.clone() for name, W in own.items()}
        state = LevelState(weights, _zeros(weights), self.start_rule(weights), {}, {}, {}, {})
        if slower is None:
            return state
        return state._replace(
            initial=weights, initial_sums=_zeros(weights), initial_rule=slower.start_rule(weights)
        )

    def add(self, state: LevelState, grads: Tensors, initial_grads: Tensors | None = None) -> LevelState:
        """Add gradients [B, out, in] to the chunk's sum, and to the initial state's (default: the same)."""
        sums = {name: total + grads[name] for name, total in state.sums.items()}
        more = grads if initial_grads is None else initial_grads
        initial_sums = {name: total + more[name] for name, total in state.initial_sums.items()}
        return state._replace(sums=sums, initial_sums=initial_sums)

    def finish(
        self,
        state: LevelState,
        own: Tensors,
        position: Tensor | int,
        at: Rows,
        slower: LevelWriter | None,
        exact: Callable[[LevelState], Tensors] | None = None,
    ) -> LevelState:
        """Write, in the rows that have just come to a boundary.

        Args:
            state: with the sums of the chunk.
            own: the initial matrices [B, out, in], trained in the slowest level.
            position: tokens so far, [B] int64 or one number for all rows.
            at: the rows that have moved to `position` by a token of theirs.
            slower: the writer that learns this level's initial state; None unless "nested".
            exact: from a state at the end of a slow chunk to the gradients of its initial state; None takes
                the sums (first order).
        """
        ends = _both(at, position % self.level.chunk_size == 0)
        if ends is False:
            return state
        initial = state.initial or own
        weights, rule = self.write(state.weights, initial, state.sums, state.rule, ends)
        state = state._replace(weights=weights, rule=rule, sums=_cleared(state.sums, ends))
        if slower is None:
            return state
        ends = _both(at, position % slower.level.chunk_size == 0)
        if ends is False:
            return state
        sums = state.initial_sums
        if exact is not None:
            if isinstance(ends, Tensor) and not ends.any():  # waits for the device, but saves a whole run
                return state
            sums = exact(state)
        learned, rule = slower.write(state.initial, own, sums, state.initial_rule, ends)
        return state._replace(
            weights=_choose(ends, learned, state.weights),
            rule=_choose(ends, self.start_rule(learned), state.rule),
            initial=learned,
            initial_sums=_cleared(state.initial_sums, ends),
            initial_rule=rule,
        )

    def write(
        self, weights: Tensors, anchor: Tensors, sums: Tensors, rule: Tensors, ends: Rows
    ) -> tuple[Tensors, Tensors]:
        """One write in the rows `ends`: new weights and rule state.

        A row whose summed gradient is not finite is left as it is.
        """
        exact = {DELTA_RULE_MATRIX} if self.rule == "dgd" else set()  # already scaled by η, and bounded
        finite = torch.stack([t.detach().flatten(1).isfinite().all(1) for t in sums.values()]).all(0)
        sums = _choose(finite, sums, _zeros(sums))
        square = sum(t.square().sum((1, 2)) for name, t in sums.items() if name not in exact)
        clip = self.level.option("clip")
        scale = clip * torch.as_tensor(square).clamp_min(clip**2).rsqrt()
        grads = {name: t if name in exact else t * scale[:, None, None] for name, t in sums.items()}
        directions, new_rule = self._directions(rule, grads)
        kept = self.level.option("retention")
        new = {}
        for name, W in weights.items():
            start = W if kept == 1 else anchor[name] + kept * (W - anchor[name])
            new[name] = start - (1.0 if name in exact else self.lr) * directions[name]
        ends = _both(ends, finite)
        return _choose(ends, new, weights), _choose(ends, new_rule, rule)

    def _directions(self, stored: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
        memory = _memory_form(self.rule)
        if memory is None:
            return grads, {}
        kind = type(memory.init(torch.zeros(())))
        directions, after = {}, {}
        for name, g in grads.items():
            state = kind(**{field: stored[f"{name}.{field}"] for field in kind._fields})
            state = vmap(memory.update)(state, g)
            directions[name] = vmap(memory.read)(state)
            after.update(_flat(name, state))
        return directions, after

    def start_rule(self, weights: Tensors) -> Tensors:
        """What the inner rule carries before the first write."""
        memory = _memory_form(self.rule)
        if memory is None:
            return {}
        rule: Tensors = {}
        for name, W in weights.items():
            rule.update(_flat(name, vmap(memory.init)(W.detach())))
        return rule


def _memory_form(rule: str) -> Any:
    """The memory form of a rule; None for gradient descent, which keeps nothing."""
    if rule in ("gd", "dgd"):
        return None
    from nested_learning.optimizers.memory_forms import MEMORIES  # it imports layers.registry

    return MEMORIES[rule]()


def _flat(name: str, state: Any) -> Tensors:
    return {f"{name}.{field}": tensor for field, tensor in state._asdict().items()}


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


def _cleared(tensors: Tensors, rows: Rows) -> Tensors:
    return _choose(rows, _zeros(tensors), tensors)


def _both(a: Rows, b: Rows) -> Rows:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def _choose(rows: Rows, new: Tensors, old: Tensors) -> Tensors:
    """`new` in these rows, `old` in the others."""
    if isinstance(rows, bool):
        return new if rows else old
    return {name: torch.where(rows.view(-1, *[1] * (t.dim() - 1)), new[name], t) for name, t in old.items()}
