"""The write of a level at its boundary (eq 71), and the state it carries from one boundary to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, vmap

from nested_learning.layers.cms.level import CMSLevel
from nested_learning.layers.effective import held
from nested_learning.memory.state import State, Weights
from nested_learning.ops.norm import magnitude
from nested_learning.optimizers.memory_forms import MEMORIES, GradientMemory

# Rows of a batch that something happens to, such as those at a boundary: [B] bool on the device, or a Python
# bool where it is known without looking at the device that it is all rows or none.
Rows = Tensor | bool

# The matrix that the rule "dgd" changes token by token, see `cms.regression`.
DELTA_RULE_MATRIX = "down.weight"


class LevelState(NamedTuple):
    """The state of one level; every tensor has the batch first.

    weights: the block's matrices [B, out, in], in force since the last boundary.
    sums: gradients of the unfinished chunk, summed (for the delta rule's matrix: minus the change so far).
    rule: state of the inner rule, by "matrix.field"; empty for gradient descent.
    initial, initial_sums, initial_rule: initial matrices, sums and rule state of the next slower level, which
        learns where this one starts from (variant "nested"); empty in the other variants.
    context: keys and values of the unfinished slow chunk, where that level takes the exact gradient
        (`cms.nested`); then there are no `initial_sums`.
    """

    weights: Weights
    sums: Weights
    rule: dict[str, Tensor]
    initial: Weights
    initial_sums: Weights
    initial_rule: dict[str, Tensor]
    context: dict[str, Tensor]


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
    weights: Weights
    sums: Weights
    rule: dict[str, Tensor] | None
    initial: Weights | None
    initial_sums: Weights | None
    initial_rule: dict[str, Tensor] | None
    context: dict[str, Tensor] | None = None

    def level(self, index: int) -> LevelState:
        """The part of one level."""
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
    """The writes of one level: W ← W_init + α (W − W_init) − η u(clip(Σ gradients)) at its boundaries, eq 71.

    Args:
        level: chunk length, learning rate η, rule u, clip, retention α (what is kept; the decay is 1 − α).
    """

    def __init__(self, level: CMSLevel) -> None:
        super().__init__()
        self.level = level
        self.rule: str = level.option("rule")
        # Gradient descent keeps nothing from one boundary to the next, hence needs no memory of gradients.
        self._memory: GradientMemory | None = None if self.rule in ("gd", "dgd") else MEMORIES[self.rule]()
        self.log_lr = nn.Parameter(torch.empty(())) if level.option("learn_lr") else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.log_lr is not None:
            self.log_lr.fill_(self.level.option("lr")).log_()

    @property
    def lr(self) -> Tensor | float:
        """η, a tensor where it is learned."""
        return self.level.option("lr") if self.log_lr is None else held(self)["log_lr"].exp()

    def write(
        self, weights: Weights, initial: Weights, sums: Weights, rule: dict[str, Tensor], rows: Rows
    ) -> tuple[Weights, dict[str, Tensor]]:
        """One write in some rows.

        A row whose summed gradient is not finite is left as it is.

        Args:
            weights: W, matrices [B, out, in].
            initial: W_init, what the retention keeps to.
            sums: Σ gradients of the chunk.
            rule: state of the inner rule.
            rows: the rows at a boundary.

        Returns:
            The weights and the rule's state after the write.
        """
        finite = torch.stack([g.detach().flatten(1).isfinite().all(1) for g in sums.values()]).all(0)
        sums = choose(finite, sums, zeros(sums))
        # The sum of the delta rule is scaled by η already, and bounded: it is neither clipped nor scaled.
        scaled = {DELTA_RULE_MATRIX} if self.rule == "dgd" else set()
        factor = _clip_factor(
            [g for name, g in sums.items() if name not in scaled], self.level.option("clip")
        )
        grads = {name: g if name in scaled else g * factor for name, g in sums.items()}
        directions, after = self._directions(rule, grads)
        retention = self.level.option("retention")
        new = {}
        for name, W in weights.items():
            kept = W if retention == 1 else initial[name] + retention * (W - initial[name])
            new[name] = kept - (1.0 if name in scaled else self.lr) * directions[name]  # eq 71
        rows = both(rows, finite)
        return choose(rows, new, weights), choose(rows, after, rule)

    def _directions(self, rule: dict[str, Tensor], grads: Weights) -> tuple[Weights, dict[str, Tensor]]:
        """u of each matrix, and the rule's state after it has taken in the gradients."""
        if self._memory is None:
            return grads, {}
        kind = type(self._memory.init(torch.zeros(())))
        directions: Weights = {}
        after: dict[str, Tensor] = {}
        for name, g in grads.items():
            state = kind(**{field: rule[f"{name}.{field}"] for field in kind._fields})
            state = vmap(self._memory.update)(state, g)
            directions[name] = vmap(self._memory.read)(state)
            after |= {f"{name}.{field}": tensor for field, tensor in state._asdict().items()}
        return directions, after

    def rule_names(self, matrices: Iterable[str]) -> set[str]:
        """Names of what the inner rule keeps of these matrices, as in `LevelState.rule`."""
        if self._memory is None:
            return set()
        fields = self._memory.init(torch.zeros(()))._fields
        return {f"{name}.{field}" for name in matrices for field in fields}

    def start_rule(self, weights: Weights) -> dict[str, Tensor]:
        """State of the inner rule before the first write."""
        rule: dict[str, Tensor] = {}
        if self._memory is None:
            return rule
        for name, W in weights.items():
            state = vmap(self._memory.init)(W.detach())
            rule |= {f"{name}.{field}": tensor for field, tensor in state._asdict().items()}
        return rule


def _clip_factor(grads: list[Tensor], clip: float) -> Tensor:
    """min(1, clip / ‖grads‖) per row [B, 1, 1], for grads [B, out, in] and a clip of any size."""
    clip = min(clip, torch.finfo(grads[0].dtype).max)
    # in units of which neither the squares of the gradients nor that of the clip overflow
    s = (
        torch.stack([magnitude(g, (1, 2)) for g in grads])
        .amax(0)
        .clamp_min(magnitude(grads[0].new_full((), clip)))
    )
    square = torch.stack([(g / s).square().sum((1, 2), keepdim=True) for g in grads]).sum(0)
    limit = clip / s
    return limit * torch.maximum(square, limit.square()).rsqrt()


def zeros(tensors: Weights) -> Weights:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


def both(a: Rows, b: Rows) -> Rows:
    """The rows that are in `a` and in `b`; a Python bool where one of them settles it."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


def choose(rows: Rows, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """`new` in these rows, `old` in the others."""
    if isinstance(rows, bool):
        return new if rows else old
    return {name: torch.where(rows.view(-1, *[1] * (t.dim() - 1)), new[name], t) for name, t in old.items()}
