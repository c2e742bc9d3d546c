"""Continuum memory system: MLP blocks, each with its own update frequency (eq 70-74)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nested_learning._errors import unknown
from nested_learning.layers.cms.block import ACTIVATIONS, MLPBlock
from nested_learning.layers.cms.learning import LearningLevel
from nested_learning.layers.cms.level import (
    CMSLevel,
    check_nested_gradient,
    check_options,
    check_positive,
    learning_levels,
    parse_levels,
)
from nested_learning.layers.cms.regression import KeyValue
from nested_learning.layers.cms.segments import Segments
from nested_learning.layers.cms.writer import CMSState, LevelWriter
from nested_learning.layers.effective import held
from nested_learning.layers.token_inputs import check_documents, check_sequence, find_documents
from nested_learning.memory.state import State, Weights
from nested_learning.ops.documents import Documents

# Documents are cut into pieces of the fastest level's chunk, and of no more tokens than these.
_STEP = 64


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
        levels: fast to slow, dicts with the fields of `CMSLevel`. Without any, the system has no block and
            gives x back, and the variant is "sequential", the update "none".
        variant: "sequential", "nested" or "independent".
        update: "none", "regression" or "lm".
        activation: activation of the blocks whose level names none: "swiglu", "gelu" or "relu2".
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
        share = expansion / max(len(self.levels), 1)
        self.blocks = nn.ModuleList(
            MLPBlock(hidden_size, level.width(hidden_size, share), level.activation or activation, norm_eps)
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
        projected = self._learning if update == "regression" else []
        self.projections = nn.ModuleDict({str(index): KeyValue(hidden_size, norm_eps) for index in projected})
        self._kept = self._kept_names()

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        weights: Sequence[Weights | None] | None = None,
        mask: Tensor | None = None,
        learn: Tensor | None = None,
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
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
            documents, position_ids: where documents in a row begin, see `find_documents`. Each is learned
                from alone, its chunks counted from its first token; static blocks see single tokens.

        Returns:
            y [B, T, D] and the state after the tokens, that of each row's last document; None where nothing
            is learned in the call, or no state is wanted of `documents`.

        Raises:
            ValueError: for a state, weights or documents that do not fit; where the call learns, for
                tokens, a mask or `learn` that do not.
        """
        if state is not None or weights is not None:
            self._check(x, state, weights)
        if self.learns and self.update == "regression":
            self._check_tokens(x, mask, learn)
            packed = find_documents(x, mask, state is not None, documents, position_ids)
            before = cast("CMSState | None", state)
            if packed is not None:
                return self._read_documents(x, before, learn, packed)
            return self._learn_and_read(x, before, mask, learn)
        if documents is not None or position_ids is not None:
            check_documents(x, documents, position_ids)
        one = x.shape[1] == 1 and weights is None  # whose products need no fold of the tokens into rows
        y = x.squeeze(1) if one else x
        for index, block in enumerate(self.blocks):
            own = None if weights is None else weights[index]
            if self.variant == "independent":
                source = x.squeeze(1) if one else x
                y = y + block(source, own, self._hidden_scale(index), residual=False)  # eq 74
            else:
                y = block(y, own)  # eq 70, eq 73
        return y.unsqueeze(1) if one else y, None

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

    def part_names(self) -> dict[str, str]:
        """Handles of the levels, `cms.0` the fastest; see `nested_learning.parts`."""
        held_by = ("blocks", "head_weights", "writers", "projections")
        return {f"{name}.{index}": f"cms.{index}" for name in held_by for index in range(len(self.levels))}

    def part_chunks(self) -> dict[str, int]:
        """Chunk length of each level in tokens."""
        return {f"cms.{index}": level.chunk_size for index, level in enumerate(self.levels)}

    def extra_repr(self) -> str:
        sizes = ", ".join(str(level.chunk_size) for level in self.levels)
        return f"variant={self.variant!r}, update={self.update!r}, chunk_sizes=[{sizes}]"

    # Learning in context -------------------------------------------------------------------------------

    def learning(self, x: Tensor, dtype: torch.dtype) -> dict[int, LearningLevel]:
        """The levels that learn in context, for a call on rows x [B, T, D] with states of `dtype`."""
        return {index: self._level(index, x, dtype) for index in self._learning}

    def start(self, levels: Mapping[int, LearningLevel]) -> CMSState:
        """The state before the first token."""
        exact = self.nested_gradient == "exact"
        up = next(level.own["up.weight"] for level in levels.values())
        position = torch.zeros(len(up), dtype=torch.long, device=up.device)
        return CMSState.join(position, {index: level.start(exact) for index, level in levels.items()})

    def current_weights(self, state: CMSState, dtype: torch.dtype) -> list[Weights | None]:
        """Per level the weights in force, as `forward` takes them; None for a static level."""
        return [
            {name: W.to(dtype) for name, W in state.level(index).weights.items()}
            if index in self._learning
            else None
            for index in range(len(self.levels))
        ]

    def learn(
        self,
        levels: Mapping[int, LearningLevel],
        state: CMSState,
        inside: Mapping[int, Weights],
        crossing: Mapping[int, Weights],
        rows: Tensor,
    ) -> CMSState:
        """Take in the gradients of one chunk of the fastest level, and write where a chunk ends with it.

        A level counts the pair of tokens across the chunk's end unless its own chunk ends there as well.

        Args:
            levels: those of `learning` in this call.
            state: the state before the chunk.
            inside: by level, gradients [B, out, in] of each matrix, summed over the pairs inside the chunk.
            crossing: by level, gradients of the pair of its last token and the next; zero for a level left
                out.
            rows: [B] bool, the rows that this is about; the gradients of the others must be zero.
        """
        position = state.position + rows * self.levels[0].chunk_size
        after = {
            index: level.learn(state.level(index), inside[index], crossing.get(index), position, rows)
            for index, level in levels.items()
        }
        return CMSState.join(position % self.levels[-1].chunk_size, after)

    def _read_documents(
        self, x: Tensor, state: CMSState | None, learn: Tensor | None, documents: Documents
    ) -> tuple[Tensor, CMSState | None]:
        """`forward` with the update "regression", of documents as rows of their own."""

        def read(
            inputs: tuple[Tensor, Tensor | None],
            before: CMSState | None,
            real: Tensor | None,
            aligned: bool,
            first: int | None,
        ) -> tuple[Tensor, CMSState]:
            x, learn = inputs
            inside = aligned and first is None
            return self._learn_and_read(x, before, real, learn, first, inside, longest)

        longest = None if documents.keep else int(documents.lengths.max())
        # All levels see by `first` where the rows stand in their chunks.
        chunk = self.levels[self._learning[0]].chunk_size
        step = next(n for n in range(min(chunk, _STEP), 0, -1) if chunk % n == 0)
        y, after = documents.read(read, (x, learn), state, step, tell_first=True)
        return y, after

    def _learn_and_read(
        self,
        x: Tensor,
        state: CMSState | None,
        real: Tensor | None,
        learn: Tensor | None,
        first: int | None = None,
        inside: bool = False,
        longest: int | None = None,
    ) -> tuple[Tensor, CMSState]:
        """`forward` with the update "regression".

        Args:
            first: tokens of every row before x, where they are as many and known.
            inside: no row comes to a boundary of any level.
            longest: tokens of the longest row to its end, where no state is wanted after it.
        """
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        levels = self.learning(x, dtype)
        position: Tensor | int
        if state is None:
            before, position = self.start(levels), 0
        else:  # which may come from a session in another precision
            before = state.recordable().map(lambda t: t.to(dtype) if t.is_floating_point() else t)
            position = before.position.to(x.device) if first is None else first
        after, y = {}, x
        for index, block in enumerate(self.blocks):
            source = x if self.variant == "independent" else y  # eq 74, eq 73
            if index in self._learning:
                size = self.levels[index].chunk_size
                segments = Segments((B, T), size, position, real, inside, longest)
                branch, after[index] = levels[index].read(
                    source, before.level(index), segments, before.position, learn
                )
            else:
                branch = block(source, None, self._hidden_scale(index), residual=False)
            y = y + branch
        read = T if real is None else real.sum(1)
        return y, CMSState.join((before.position + read) % self.levels[-1].chunk_size, after)

    def _level(self, index: int, x: Tensor, dtype: torch.dtype) -> LearningLevel:
        block = cast(MLPBlock, self.blocks[index])
        nested = self.variant == "nested" and index + 1 < len(self.levels)
        matrices = {name: W.to(dtype) for name, W in block.matrices(x).items()}
        return LearningLevel(
            block,
            writer=cast(LevelWriter, self.writers[index]),
            slower=cast(LevelWriter, self.writers[index + 1]) if nested else None,
            projections=cast(KeyValue, self.projections[str(index)]) if self.projections else None,
            scale=self._hidden_scale(index),
            matrices=matrices,
            own={name: W.expand(len(x), *W.shape) for name, W in matrices.items()},
        )

    def _hidden_scale(self, index: int) -> Tensor | None:
        """Each head's weight at its hidden units [e] (eq 74); None in a chain."""
        if self.variant != "independent":
            return None
        weights = held(self.head_weights)[str(index)]
        return weights.repeat_interleave(cast(MLPBlock, self.blocks[index]).intermediate_size // len(weights))

    # Checks --------------------------------------------------------------------------------------------

    def _check_tokens(self, x: Tensor, mask: Tensor | None, learn: Tensor | None) -> None:
        """ValueError for tokens, a mask or `learn` that do not fit the levels that learn from them."""
        width = cast(MLPBlock, self.blocks[0]).hidden_size
        check_sequence(x, width, mask, cast(KeyValue, self.projections[str(self._learning[0])]).key)
        if learn is not None and (learn.shape != x.shape[:2] or learn.dtype != torch.bool):
            raise ValueError(
                f"learn must be bool {tuple(x.shape[:2])} (True = learned from), got {learn.dtype} "
                f"{tuple(learn.shape)}"
            )

    def _check(self, x: Tensor, state: State | None, weights: Sequence[Weights | None] | None) -> None:
        """ValueError for a state or weights that do not fit the system or the rows of x."""
        regression = self.learns and self.update == "regression"
        if weights is not None and regression:
            raise ValueError(
                "a CMS with update='regression' learns its blocks' weights itself: leave weights away"
            )
        if weights is not None and len(weights) != len(self.blocks):
            raise ValueError(
                f"weights must have one entry per level ({len(self.blocks)}), got {len(weights)}"
            )
        if state is None:
            return
        if not regression:
            raise ValueError(
                f"a CMS with update={self.update!r} takes no state, got a {type(state).__name__}"
            )
        if not isinstance(state, CMSState):
            raise ValueError(f"state must be a CMSState, got {type(state).__name__}: it is another layer's")
        expected = {
            f"{index}.{name}": (len(x), *shape)
            for index in self._learning
            for name, shape in self._matrix_shapes(index).items()
        }
        got = {name: tuple(W.shape) for name, W in state.weights.items()}
        if got != expected:
            raise ValueError(
                f"state has weights of shapes {got}; this CMS and {len(x)} rows need {expected}: it "
                "belongs to another batch or a CMS with other levels"
            )
        expected = self._context_shapes(len(x))
        got = {name: tuple(t.shape) for name, t in (state.context or {}).items()}
        if got != expected:
            raise ValueError(
                f"state keeps the tokens {got or 'of no unfinished chunk'}; nested_gradient "
                f"{self.nested_gradient!r} of this CMS needs {expected or 'none'}: it "
                "belongs to another CMS; start without a state, or make this CMS like that one"
            )
        for field, kept in self._kept.items():
            found = set(getattr(state, field) or ())
            if found != kept:
                raise ValueError(
                    f"state has {', '.join(sorted(found)) or 'nothing'} as its {field}; this CMS needs "
                    f"{', '.join(sorted(kept)) or 'nothing'}: it belongs to a CMS with other rules, another "
                    "variant or nested_gradient"
                )

    def _matrix_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a level's matrices by name: what it learns."""
        shapes = cast(MLPBlock, self.blocks[index]).shapes()
        return {name: shape for name, shape in shapes.items() if len(shape) == 2}

    def _kept_names(self) -> dict[str, set[str]]:
        """Names of what a state holds beside its weights and context, by field of `CMSState`."""
        kept: dict[str, set[str]] = {
            field: set() for field in ("sums", "rule", "initial", "initial_sums", "initial_rule")
        }
        for index in self._learning:
            matrices = list(self._matrix_shapes(index))
            fields = {"sums": matrices, "rule": cast(LevelWriter, self.writers[index]).rule_names(matrices)}
            if self.variant == "nested" and index + 1 < len(self.levels):
                fields["initial"] = matrices
                fields["initial_sums"] = [] if self.nested_gradient == "exact" else matrices
                fields["initial_rule"] = cast(LevelWriter, self.writers[index + 1]).rule_names(matrices)
            for field, names in fields.items():
                kept[field] |= {f"{index}.{name}" for name in names}
        return kept

    def _context_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tokens that a state keeps for exact gradients of initial states (`cms.nested`)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index in self._learning if self.nested_gradient == "exact" else ():
            if index + 1 < len(self.levels):
                tokens = (batch_size, self.levels[index + 1].chunk_size)
                width = cast(MLPBlock, self.blocks[index]).hidden_size
                shapes |= {f"{index}.key": (*tokens, width), f"{index}.value": (*tokens, width)}
                shapes[f"{index}.write"] = tokens
        return shapes
