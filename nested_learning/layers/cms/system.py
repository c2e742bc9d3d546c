"""Continuum memory system: MLP blocks, each with its own update frequency (eq 70-74)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning._errors import unknown
from nested_learning.layers.cms.block import ACTIVATIONS, MLPBlock, Weights
from nested_learning.layers.cms.level import (
    CMSLevel,
    check_nested_gradient,
    check_options,
    check_positive,
    learning_levels,
    parse_levels,
)
from nested_learning.layers.cms.nested import initial_gradients, remember, start_context
from nested_learning.layers.cms.regression import KeyValue, chunk_gradients
from nested_learning.layers.cms.segments import Segments
from nested_learning.layers.cms.writer import CMSState, LevelState, LevelWriter, Tensors
from nested_learning.memory.state import State
from nested_learning.ops.precision import full_precision

__all__ = ["CMSLevel", "CMSState", "ContinuumMemorySystem", "parse_levels"]


class ContinuumMemorySystem(nn.Module):
    """Residual MLP blocks from the fastest level to the slowest, static or learning in context (eq 70-74).

    The paper numbers the levels one way in §3.2 and the other in §7; here the first is the fastest and
    nearest to the input. Each block normalises its input, so one level is exactly a Transformer's
    feed-forward sub-layer, its residual connection included.

    Variants:
        "sequential" (eq 73): a chain, x ← x + f_l(x) for each level; all initial states are parameters.
        "nested" (eq 72): the chain, where level l + 1 also learns the initial state of level l, from the
            gradients of its own chunk at the weights that were in force (first order), and level l starts
            from it again at each boundary of level l + 1. The same as "sequential" while nothing learns.
            With `nested_gradient="exact"` the gradient is that through all writes of level l in the chunk.
        "independent" (eq 74): all blocks read the same input, y = x + Σ w_lh f_lh(x) over levels and their
            heads, w learned, 1 at first.

    Updates of a level's matrices, by eq 71 at the boundaries i ≡ 0 mod C of its own chunk length C, from the
    sum over the chunk; the norms' gains do not learn in context:
        "none": static. The chunk sizes say how often an optimizer with several frequencies steps each level
            and feed `info()`, they do not enter the forward pass.
        "regression": each block is an associative memory of projections of its own input; see
            `cms.regression`. The gradient of the outer loss flows through every write.
        "lm": the gradient of the next-token loss; a model works it out and calls `learn`.

    Args:
        hidden_size: width D of input and output.
        levels: fast to slow, dicts with the fields of `CMSLevel`.
        variant: "sequential", "nested" or "independent".
        update: "none", "regression" or "lm".
        activation: of the blocks whose level names none: "swiglu", "gelu" or "relu2".
        expansion: hidden width of all blocks together as a multiple of `hidden_size`, in equal parts, so
            that adding levels adds no parameters; a level's own `expansion` or `intermediate_size` overrides
            its part.
        norm_eps: epsilon of the RMS norms.
        nested_gradient: with "nested", how a level's initial state is learned: "first_order", or "exact",
            with "regression" alone, for a second run over each chunk of the slower level, whose keys and
            values are kept (`cms.nested`).

    Attributes:
        learns: whether a level learns in context, so that there is a state.

    Raises:
        ValueError: for unknown keys and names, options of a level that do not go with the variant or update,
            chunk sizes that are not positive or of which one does not divide the next, widths below one unit.
    """

    def __init__(
        self,
        hidden_size: int,
        levels: Sequence[Mapping[str, Any] | CMSLevel],
        variant: str = "sequential",
        update: str = "none",
        activation: str = "relu2",
        expansion: float = 4.0,
        norm_eps: float = 1e-6,
        nested_gradient: str = "first_order",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", str(activation), ACTIVATIONS)
        check_positive("expansion", expansion)
        self.levels = parse_levels(levels)
        check_options(self.levels, variant, update)
        check_nested_gradient(nested_gradient, variant, update)
        self.variant, self.update, self.nested_gradient = variant, update, nested_gradient
        share = expansion / len(self.levels)
        self.blocks = nn.ModuleList(
            MLPBlock(
                hidden_size,
                level.width(hidden_size, share),
                level.activation or activation,
                norm_eps,
            )
            for level in self.levels
        )
        self.head_weights = nn.ParameterList(
            nn.Parameter(torch.ones(level.option("heads")))
            for level in self.levels
            if variant == "independent"
        )
        self._learning = learning_levels(self.levels, variant, update)
        self.learns = bool(self._learning)
        self.writers = nn.ModuleList(LevelWriter(level) for level in self.levels if self.learns)
        self.projections = nn.ModuleDict(
            {
                str(index): KeyValue(hidden_size, norm_eps)
                for index in self._learning
                if update == "regression"
            }
        )

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        weights: Sequence[Weights | None] | None = None,
        mask: Tensor | None = None,
        learn: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Pass x [B, T, D] through the blocks, learning from it with the update "regression".

        Args:
            x: [B, T, D].
            state: from an earlier call on the same rows, None at the start; only where the call learns.
            weights: per level, the weights to use instead of the block's own, see `MLPBlock.forward`; not
                with "regression", where each row has its own.
            mask: [B, T] bool, True = real token; a padded token counts for nothing. Matters only where the
                call learns.
            learn: [B, T] bool, False = read, but not learned from; it advances the chunks all the same.

        Returns:
            y [B, T, D] and the state after the tokens, None where nothing is learned in the call.

        Raises:
            ValueError: for a state or weights that do not fit.
        """
        if self.learns and self.update == "regression":
            if weights is not None:
                raise ValueError(
                    "a CMS with update='regression' learns its blocks' weights itself: leave weights away"
                )
            return self._regress(x, self._checked(state, x), mask, learn)
        if state is not None:
            raise ValueError(
                f"a CMS with update={self.update!r} takes no state, got a {type(state).__name__}"
            )
        if weights is not None and len(weights) != len(self.blocks):
            raise ValueError(
                f"weights must have one entry per level ({len(self.blocks)}), got {len(weights)}"
            )
        if self.variant != "independent":
            for index, block in enumerate(self.blocks):
                x = block(x, None if weights is None else weights[index])
            return x, None
        y = x
        for index, block in enumerate(self.blocks):
            own = None if weights is None else weights[index]
            y = y + block(x, own, self._hidden_scale(index), residual=False)
        return y, None

    def info(self) -> list[dict[str, Any]]:
        """Per level: chunk size in tokens, updates per token (eq 71), parameters, width, activation."""
        return [
            {
                "chunk_size": level.chunk_size,
                "updates_per_token": 1 / level.chunk_size,
                "parameters": sum(p.numel() for p in block.parameters()),
                "intermediate_size": block.intermediate_size,
                "activation": block.activation,
            }
            for level, block in zip(self.levels, self.blocks, strict=True)
        ]

    def extra_repr(self) -> str:
        sizes = ", ".join(str(level.chunk_size) for level in self.levels)
        return f"variant={self.variant!r}, update={self.update!r}, chunk_sizes=[{sizes}]"

    # Learning in context -------------------------------------------------------------------------------

    def start(self, batch_size: int, dtype: torch.dtype) -> CMSState:
        """The state before the first token, for each row of a batch."""
        position = torch.zeros(batch_size, dtype=torch.long, device=self._block(0).up.weight.device)
        levels = {}
        for index in self._learning:
            own, slower = self._own(index, batch_size, dtype), self._slower(index)
            levels[index] = self._writer(index).start(own, slower)
            if slower is not None and self.nested_gradient == "exact":
                up = own["up.weight"]
                context = start_context(batch_size, slower.level.chunk_size, up.shape[-1], up)
                levels[index] = levels[index]._replace(initial_sums={}, context=context)
        return CMSState.join(position, levels)

    def current_weights(self, state: CMSState, dtype: torch.dtype) -> list[Weights | None]:
        """Per level the weights in force, as `forward` takes them; None for a static level."""
        return [
            {name: W.to(dtype) for name, W in state.level(index).weights.items()}
            if index in self._learning
            else None
            for index in range(len(self.levels))
        ]

    def learn(
        self, state: CMSState, inside: Mapping[int, Tensors], crossing: Mapping[int, Tensors], rows: Tensor
    ) -> CMSState:
        """Take in the gradients of one chunk of the fastest level, and write where a chunk ends with it.

        A level counts the pair of tokens across the chunk's end unless its own chunk ends there as well.

        Args:
            state: before.
            inside: by level, gradients [B, out, in] of each matrix, summed over the pairs inside the chunk.
            crossing: those of the pair of its last token and the next; zero for a level left out.
            rows: [B] bool, the rows that this is about; the gradients of the others must be zero.
        """
        position = state.position + rows * self.levels[0].chunk_size
        after = {}
        for index in self._learning:
            writer, slower = self._writer(index), self._slower(index)
            sums = [
                _added(inside[index], crossing.get(index), position % size != 0)
                for size in (self.levels[index].chunk_size, slower.level.chunk_size if slower else 1)
            ]
            level = writer.add(state.level(index), *sums)
            own = self._own(index, len(rows), next(iter(level.weights.values())).dtype)
            after[index] = writer.finish(level, own, position, rows, slower)
        return CMSState.join(position % self.levels[-1].chunk_size, after)

    def _regress(
        self, x: Tensor, state: CMSState | None, mask: Tensor | None, learn: Tensor | None
    ) -> tuple[Tensor, CMSState]:
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        position = None if state is None else state.position.to(x.device)
        before = self.start(B, dtype) if state is None else _in_dtype(state, dtype)
        after, y = {}, x
        for index, block in enumerate(self.blocks):
            source = x if self.variant == "independent" else y
            if index in self._learning:
                segments = Segments(B, T, self.levels[index].chunk_size, position, mask)
                change, after[index] = self._run_level(
                    index, source, before.level(index), before.position, segments, learn
                )
            else:
                change = block(source, None, self._hidden_scale(index), residual=False)
            y = y + change
        read = T if mask is None else mask.sum(1)
        return y, CMSState.join((before.position + read) % self.levels[-1].chunk_size, after)

    def _run_level(
        self,
        index: int,
        x: Tensor,
        level: LevelState,
        position: Tensor,
        segments: Segments,
        learn: Tensor | None,
    ) -> tuple[Tensor, LevelState]:
        """One block over x [B, T, D]: its branch [B, T, D] and its state, written at each boundary."""
        block, writer, slower = self._block(index), self._writer(index), self._slower(index)
        scale = self._hidden_scale(index)
        dtype = next(iter(level.weights.values())).dtype
        own = self._own(index, len(x), dtype)
        x = segments.pack(x)
        learn = None if learn is None else segments.pack(learn)
        keys, values = self.projections[str(index)](x, block, dtype)
        delta_rule_lr = writer.lr if writer.rule == "dgd" else None
        counter: Tensor | int = 0 if segments.aligned else position
        exact = partial(initial_gradients, writer, block.activation) if level.context else None
        branches = []
        for segment in segments:
            weights = {name: W.to(x.dtype) for name, W in level.weights.items()}
            branches.append(block(segment.of(x), weights, scale, residual=False))
            write = segment.real
            if learn is not None:
                write = segment.of(learn) if write is None else write & segment.of(learn)
            with full_precision(x.device):
                grads = chunk_gradients(
                    level.weights,
                    level.sums,
                    segment.of(keys),
                    segment.of(values),
                    block,
                    write,
                    None if scale is None else scale.to(dtype),
                    delta_rule_lr,
                )
                if level.context:
                    pair = segment.of(keys), segment.of(values)
                    kept = remember(level.context, *pair, write, segment.real, counter)
                    level = level._replace(context=kept)
                count = len(segment) if segment.real is None else segment.real.sum(1)
                counter = counter + count
                at = True if segment.real is None else count > 0
                level = writer.finish(writer.add(level, grads), own, counter, at, slower, exact)
        return segments.unpack(torch.cat(branches, 1)), level

    def _block(self, index: int) -> MLPBlock:
        block = self.blocks[index]
        assert isinstance(block, MLPBlock)
        return block

    def _writer(self, index: int) -> LevelWriter:
        writer = self.writers[index]
        assert isinstance(writer, LevelWriter)
        return writer

    def _slower(self, index: int) -> LevelWriter | None:
        """The writer that learns the initial state of a level."""
        nested = self.variant == "nested" and index + 1 < len(self.levels)
        return self._writer(index + 1) if nested else None

    def _own(self, index: int, batch_size: int, dtype: torch.dtype) -> Tensors:
        """The block's matrices, as many as there are rows: what learns in context."""
        return {
            name: p.to(dtype).expand(batch_size, *p.shape)
            for name, p in self.blocks[index].named_parameters()
            if p.dim() == 2
        }

    def _context_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Of the tokens that a state keeps for exact gradients of initial states."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index in self._learning if self.nested_gradient == "exact" else ():
            slower = self._slower(index)
            if slower is not None:
                tokens = (batch_size, slower.level.chunk_size)
                width = self._block(index).up.weight.shape[1]
                shapes |= {f"{index}.{name}": (*tokens, width) for name in ("key", "value")}
                shapes[f"{index}.write"] = tokens
        return shapes

    def _hidden_scale(self, index: int) -> Tensor | None:
        """Each head's weight at its hidden units [e]; None in a chain."""
        if self.variant != "independent":
            return None
        weights = self.head_weights[index]
        return weights.repeat_interleave(self._block(index).intermediate_size // len(weights))

    def _checked(self, state: State | None, x: Tensor) -> CMSState | None:
        if state is None:
            return None
        if not isinstance(state, CMSState):
            raise ValueError(f"state must be a CMSState, got {type(state).__name__}: it is another layer's")
        expected = {
            f"{index}.{name}": tuple(W.shape)
            for index in self._learning
            for name, W in self._own(index, len(x), x.dtype).items()
        }
        got = {name: tuple(W.shape) for name, W in state.weights.items()}
        if got != expected:
            raise ValueError(
                f"state has weights of shapes {got}; this CMS and {len(x)} rows need {expected}: it "
                "belongs to another batch or a CMS with other levels"
            )
        held = {name: tuple(t.shape) for name, t in (state.context or {}).items()}
        if held != self._context_shapes(len(x)):
            raise ValueError(
                f"state keeps the tokens {held or 'of no unfinished chunk'}; nested_gradient "
                f"{self.nested_gradient!r} of this CMS needs {self._context_shapes(len(x)) or 'none'}: it "
                "belongs to another CMS; start without a state, or make this CMS like that one"
            )
        return state


def _in_dtype(state: CMSState, dtype: torch.dtype) -> CMSState:
    """From a session in another precision."""
    return state.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _added(inside: Tensors, crossing: Tensors | None, belongs: Tensor) -> Tensors:
    """`inside`, plus `crossing` in the rows that it belongs to."""
    if crossing is None:
        return inside
    belongs = belongs.view(-1, 1, 1)
    return {name: g + torch.where(belongs, crossing[name], 0) for name, g in inside.items()}
