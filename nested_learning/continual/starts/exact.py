"""Exact: the gradient flows through the writes of a window, and through what they did to later writes.

Every write

    Δ_w ← (1 − decay) Δ_w − lr · r_w · rule(clip(G))_w

is a node of the graph, with G = Σ ∇_W of the losses, differentiated once more; so are the clip's norm, the
rule's state (momentum, Adam's means), the sums of unfinished chunks, and the keys and values that later
tokens attend to. G itself is what the learner takes it for: a gradient that does not flow into the keys and
values of earlier tokens, nor from one segment into another. For a text that fits into one window, what comes
out is the derivative of the mean loss that `Learner.observe` reports, by starts and rates, to rounding.

When a window ends, the graph is cut: what a level has by then counts as in first order, Δ = S Δ⁰ + P with the
part P that was written in proportion to r and otherwise given (`first_order`), and sums and rules' states are
given. So the memory is that of one window: a graph of first and second derivatives, several times what a
plain forward and backward pass of the window keeps.

Attention runs in the plain form, since fused kernels have no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nested_learning.continual.context import Context, evaluating
from nested_learning.continual.deltas import DOWN, UP, DeltaState, Row
from nested_learning.continual.find import Target, is_quantised, memory_dtype
from nested_learning.continual.lesson import Pairs
from nested_learning.continual.reader import Reader
from nested_learning.continual.rules import M3Rule, PerExpert
from nested_learning.continual.starts.gradient import Beginning, MetaGradient, StartShares
from nested_learning.continual.weights import acting
from nested_learning.continual.writing import DeltaWriter
from nested_learning.memory.state import Weights


def check_exact(reader: Reader) -> None:
    """Raise ValueError where a learner's writes have no derivative to follow, or none that is made here."""
    if reader.plan.gradient_checkpointing:
        raise ValueError(
            "exact=True keeps a window's graph, and gradient_checkpointing would run its layers again with "
            "other weights in force; make the learner without it, or leave exact out"
        )
    for writer in reader.writers:
        level = writer.level
        if writer.learns and isinstance(writer.rule, PerExpert) and isinstance(writer.rule.rule, M3Rule):
            raise ValueError(
                f"level {writer.index} has rule='m3', whose orthogonalised step is not differentiated; "
                "choose 'gd', 'momentum', 'adam' or a memory form, or leave exact out"
            )
        for name, what in (
            ("sparse", "chooses the units that it writes"),
            ("reread", "reads its chunks again"),
            ("distill", "is taught by earlier predictions"),
            ("anchor_kl", "reads background text at its boundary"),
        ):
            if getattr(level, name):
                raise ValueError(
                    f"level {writer.index} has {name}={getattr(level, name)} and {what}, which exact=True "
                    f"does not follow; leave {name} out, or leave exact out: first order has it"
                )


def exact(reader: Reader, begin: Beginning, ids: Tensor) -> MetaGradient:
    """The exact gradient of the mean loss of ids [T], within each window.

    Args:
        reader: reader that `check_exact` has let through.
        begin: rates and starts.
        ids: [T] on the model's device, at least two.
    """
    try:
        with evaluating(reader.model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            return _Reading(reader, begin, len(ids) - 1).of(ids)
    except RuntimeError as error:
        if "derivative" not in str(error) and "double backward" not in str(error):
            raise
        raise ValueError(
            f"{type(reader.model).__name__} has an operation without a second derivative ({error}): load it "
            "with attn_implementation='eager', or leave exact out"
        ) from error


class _Reading:
    """One text read with all writes in a graph.

    Args:
        reader: the reader whose model, writers and plan are used.
        begin: rates and starts.
        pairs: number of pairs of the text.
    """

    def __init__(self, reader: Reader, begin: Beginning, pairs: int) -> None:
        self._reader, self._writers, self._pairs = reader, reader.writers, pairs
        self._learned = begin.learned
        self._starts = [
            {slot: t.clone().requires_grad_() if slot in learned else t for slot, t in own.items()}
            for own, learned in zip(begin.starts, begin.learned, strict=True)
        ]
        self._log_rates = [
            {
                slot: torch.tensor(value, dtype=torch.float64, device=reader.model.device, requires_grad=True)
                for slot, value in own.items()
            }
            for own in begin.log_rates
        ]
        self._total = MetaGradient.zero(begin)
        self._shares = StartShares.of(self._writers)
        states = replace(begin, starts=tuple(self._starts)).states(self._writers)
        self._row = Row.new(states, reader.model.device)
        self._losses: list[Tensor] = []
        self._weights: dict[Target, Tensor] | None = None

    def of(self, ids: Tensor) -> MetaGradient:
        """The gradient of the mean loss of ids [T]."""
        for piece, ends in self._reader.plan.pieces(0, len(ids)):
            self._read(ids[piece], ends)
        self._take_gradient()
        return self._total

    # Reading -------------------------------------------------------------------------------------------

    def _read(self, ids: Tensor, ends: bool) -> None:
        """Read one segment; where it `ends`, levels that have their boundary there write."""
        row, plan, begins_at = self._row, self._reader.plan, self._row.position
        if len(row.tokens) and plan.window_ends(len(row.tokens), begins_at):
            self._take_gradient()
            self._cut()
            row.tokens = row.tokens[-plan.overlap :]
            row.context = Context()
            if len(row.tokens) > 1:
                with self._installed():
                    body, kept = self._reader.model.base_model, row.tokens[None, :-1]
                    _, row.context = self._reader.contexts.read(body, kept, Context(), attached=True)
        start = len(row.tokens)
        row.tokens, row.position = torch.cat([row.tokens, ids]), begins_at + len(ids)
        # The pair that crosses into the segment has a pass of its own, as in `Reader.read_segment`; each pass
        # has leaves of its own, so that a gradient does not reach what earlier ones have left in the context.
        crossing = self._read_pairs(row.tokens[max(start - 1, 0) : start + 1] if start else ids[:0], ends)
        inside = self._read_pairs(row.tokens[start:], ends)
        if ends:
            self._learn(begins_at, crossing, inside)

    def _read_pairs(self, tokens: Tensor, learns: bool) -> Pairs:
        """Read pairs of neighbouring tokens [n]; the gradients of their losses are nodes of the graph."""
        if len(tokens) < 2:
            return Pairs(0, 0.0, {})
        with self._installed() as leaves:
            logits, self._row.context = self._reader.contexts.read(
                self._reader.model, tokens[None, :-1], self._row.context, attached=True
            )
            logits = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(logits, tokens[1:], reduction="none")
            self._losses.append(losses)
            total = float(losses.detach().sum())
            if not learns:
                return Pairs(len(losses), total, {})
            found = torch.autograd.grad(
                losses.sum(), list(leaves.values()), create_graph=True, allow_unused=True
            )
        grads = {key: g for key, g in zip(leaves, found, strict=True) if g is not None}
        return Pairs(len(losses), total, grads)

    @contextmanager
    def _installed(self) -> Iterator[Weights]:
        """The model runs with the row's deltas, as leaves of this scope alone, by `DeltaWriter.keys`."""
        if self._weights is None:
            self._weights = self._effective()
        weights = {target: _leaf(weight) for target, weight in self._weights.items()}
        leaves = {target.name: weight for target, weight in weights.items()}
        factors = []
        for writer, state, target in acting(self._writers, self._row):
            if writer.level.rank is not None:
                down, up = (_leaf(t) for t in writer.factors(state, target))
                factors.append((writer, target, down, up))
                leaves[writer.keys.get(target.name + DOWN, "")] = down
                leaves[writer.keys[target.name + UP]] = up
        learned = {key for writer in self._writers if writer.learns for key in writer.keys.values()}
        with self._reader.workspace.placed(weights, factors):
            yield {key: leaf for key, leaf in leaves.items() if key in learned}

    def _effective(self) -> dict[Target, Tensor]:
        """W_base + Σ Δ of each weight with full deltas, rounded once; of a quantised weight Σ Δ alone."""
        deltas: dict[Target, list[Tensor]] = {}
        for writer, state, target in acting(self._writers, self._row):
            if writer.level.rank is None:
                own = deltas.setdefault(target, [])
                own += [state.deltas[target.name]] if target.name in state.deltas else []
        effective = {}
        for target, own in deltas.items():
            weight = target.weight.detach()
            if is_quantised(weight):
                nothing = torch.zeros(target.shape, dtype=memory_dtype(weight), device=weight.device)
                effective[target] = sum(own, nothing)
            else:
                effective[target] = (sum(own[1:], own[0]) + weight).to(weight.dtype) if own else weight
        return effective

    # Learning ------------------------------------------------------------------------------------------

    def _learn(self, begins_at: int, crossing: Pairs, inside: Pairs) -> None:
        """Add a segment's gradients to the sums of all levels, and write at their boundaries."""
        for writer, state in zip(self._writers, self._row.levels, strict=True):
            size = writer.level.chunk_size
            for pairs in (crossing, inside) if begins_at % size else (inside,):
                state.loss += pairs.loss
                state.pairs += pairs.count
                for slot, g in writer.by_slot(pairs.grads).items() if writer.learns else ():
                    g = g.to(torch.promote_types(g.dtype, torch.float32))
                    state.sums[slot] = state.sums[slot] + g if slot in state.sums else g
            if self._row.position % size == 0:
                self._write(writer, state)

    def _write(self, writer: DeltaWriter, state: DeltaState) -> None:
        """`DeltaWriter.write`, with every result a new tensor in the graph."""
        level, sums = writer.level, state.sums
        loss = state.loss / max(state.pairs, 1)
        state.sums, state.loss, state.pairs = {}, 0.0, 0
        norm = torch.stack([g.square().sum() for g in sums.values()]).sum().sqrt() if sums else None
        size = 0.0 if norm is None else float(norm.detach())
        if not (math.isfinite(size) and math.isfinite(loss)) or writer.is_gated(state, loss):
            return
        if level.decay:
            for slot, delta in state.deltas.items():
                if not slot.endswith(DOWN):
                    state.deltas[slot] = delta * writer.kept_share(slot, delta.dtype)
            self._shares.decay(writer)
        if norm is None:
            return
        scale = norm.new_ones(()) if level.clip is None or size <= level.clip else level.clip / norm
        # a rule takes any factor, and one in the graph makes the clip a part of it
        step = writer.rule.step(state.rule, sums, scale)  # type: ignore[arg-type]
        state.rule = step.state
        for slot, direction in step.directions.items():
            rate = self._log_rates[writer.index][slot].exp().to(direction.dtype)
            moved = direction * (-level.lr * step.factor) * rate
            state.deltas[slot] = state.deltas[slot] + moved if slot in state.deltas else moved
        self._weights = None

    # The gradient --------------------------------------------------------------------------------------

    def _take_gradient(self) -> None:
        """Add the gradient of the losses since the last time to the total, and let go of their graph."""
        parts = [losses.sum() for losses in self._losses]
        self._losses = []
        total = torch.stack(parts).sum() / self._pairs
        self._total.loss += float(total.detach())
        leaves = [
            (self._add_start if own is self._starts[index] else self._add_rate, index, slot, t)
            for groups in (self._starts, self._log_rates)
            for index, own in enumerate(groups)
            for slot, t in own.items()
            if t.requires_grad
        ]
        if not leaves or not total.requires_grad:
            return
        found = torch.autograd.grad(total, [t for *_, t in leaves], allow_unused=True)
        for (add, index, slot, _), g in zip(leaves, found, strict=True):
            if g is not None:
                add(index, slot, g)

    def _add_start(self, index: int, slot: str, g: Tensor) -> None:
        self._total.add_start(index, slot, g)

    def _add_rate(self, index: int, slot: str, g: Tensor) -> None:
        self._total.log_rates[index][slot] += g.cpu()

    def _cut(self) -> None:
        """Begin a graph anew, in which deltas hang on starts and rates as in first order."""
        self._weights = None
        for writer, state in zip(self._writers, self._row.levels, strict=True):
            state.sums = {slot: t.detach() for slot, t in state.sums.items()}
            state.rule = {
                slot: {name: t.detach() for name, t in own.items()} for slot, own in state.rule.items()
            }
            for slot, delta in state.deltas.items() if writer.learns else ():
                start, share = self._starts[writer.index].get(slot), self._shares.levels[writer.index][slot]
                log_rate = self._log_rates[writer.index][slot]
                rate = (log_rate - log_rate.detach()).exp().to(delta.dtype)  # 1, with its derivative
                kept = 0.0 if start is None else start * _like(share, delta)
                written = delta.detach() - (0.0 if start is None else kept.detach())  # type: ignore[union-attr]
                state.deltas[slot] = kept + rate * written


def _like(share: float | Tensor, delta: Tensor) -> float | Tensor:
    return share if isinstance(share, float) else share.to(delta.dtype)


def _leaf(t: Tensor) -> Tensor:
    """A view that a gradient can be asked for, apart from other uses of the tensor."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
