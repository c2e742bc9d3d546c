"""Values that a run of memories takes and gives: its inputs, the memories' state, where their chunks end.

Shapes: B batch, N memories, H heads, T tokens, d head width. The weights of all memories of a layer are
stacked, [B, N, H, out, in], here and in every engine; the memory that is read out is the last of the N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.memory.state import State, Weights
from nested_learning.ops.context import has_values


@dataclass(frozen=True)
class MemoryState(State):
    """The state of a running memory layer: a value, every tensor with the batch first.

    Attributes:
        anchor: per matrix [B, N, H, out, in], the weights at each memory's last chunk boundary; gradients
            and generated signals come from them.
        current: the same shape, the weights after the last token.
        momentum: the same shape, None without momentum.
        position: [B] int64, real tokens seen modulo the longer chunk length.
        conv_tail: [B, K−1, 3D] the last inputs of the convolution, None without one.
    """

    anchor: Weights
    current: Weights
    momentum: Weights | None = None
    position: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    conv_tail: Tensor | None = None

    @property
    def at_anchor(self) -> bool:
        """Whether the current weights are the anchors, known without a look at the numbers."""
        return all(self.current[name] is W for name, W in self.anchor.items())


class Readouts(NamedTuple):
    """Vectors that turn a generating memory's output into a gate."""

    weight: Tensor  # [gates, H, d]
    bias: Tensor  # [gates, H]


class Inputs(NamedTuple):
    """The tokens of a run as the memories see them. Gates come as logits, or from memories by readouts."""

    paths: Mapping[str, Tensor]  # "k", "v", "q": [B, H, T, d]
    gates: Tensor | None = None  # [gates, B, H, T] logits of gates that are projections of the layer's input
    readouts: Readouts | None = None  # for gates that memories generate
    real: Tensor | None = None  # [B, T] bool, False = padding, which changes nothing; None: all are real

    def split(self, sizes: int | list[int]) -> list[Inputs]:
        """Cut along the tokens. `split`, not slices: its backward is one cat, not a sum of padded parts."""
        paths = {name: x.split(sizes, dim=2) for name, x in self.paths.items()}
        count = len(paths["k"])
        gates = (None,) * count if self.gates is None else self.gates.split(sizes, dim=3)
        real = (None,) * count if self.real is None else self.real.split(sizes, dim=1)
        return [
            Inputs({name: pieces[i] for name, pieces in paths.items()}, gates[i], self.readouts, real[i])
            for i in range(count)
        ]


class How(NamedTuple):
    """How a run is to be computed: what may change its cost and rounding, never its meaning.

    Attributes:
        backend: see `engines.fla`.
        dtype: of the layer's own projections, in whose precision an engine may take the factors of products.
        surprise: whether the surprise is wanted too.
        compile_step: run a chunk, or the generic step, through torch.compile.
        recompute: keep little for the backward pass, where one operator does the run.
    """

    backend: str
    dtype: torch.dtype
    surprise: bool = False
    compile_step: bool = False
    recompute: bool = False


class Call(NamedTuple):
    """Facts about a run that are known before its numbers: all that the choice of an engine may depend on."""

    device: str  # type of the device
    dtype: torch.dtype  # as in `How`
    backend: str
    surprise: bool
    compile_step: bool
    one_token: bool
    whole_chunks: bool  # at least one, with boundaries common to all rows
    padded: bool
    grad: bool  # gradients are recorded
    compiling: bool  # torch.compile follows the Python code
    traced: bool  # torch.compile, a transform of torch.func or a forward-mode derivative follows it
    checked: bool  # NESTED_LEARNING_CHECK looks at every chunk
    one_operator: bool  # a compiler takes the run as one operator


class Boundaries(NamedTuple):
    """Where chunks end in a run: the columns before which anchors move to the current weights.

    Attributes:
        common: all rows have a token in every column and begin, like the run, at a boundary of every memory:
            Python knows where chunks end.
        first: column of the run's first token; [B] for one token of rows that stand at their own places.
        offset, end: [B], row b's tokens fill the columns offset_b … end_b − 1, and only boundaries among them
            count for it: an earlier one was taken in an earlier call, a later one has not come yet.
    """

    common: bool
    first: int | Tensor = 0
    offset: Tensor | None = None
    end: Tensor | None = None

    def anchors(self, sizes: Sequence[int], tokens: int, current: Weights, anchor: Weights) -> Weights:
        """The anchors after so many tokens of the run: `current` where a chunk ends there, else `anchor`.

        Args:
            sizes: chunk length of each memory.
        """
        column = self.first + tokens
        sizes = sizes if len(set(sizes)) > 1 else sizes[:1]
        if isinstance(column, Tensor):
            known = column.tolist() if has_values(column) else None
        else:  # a number, which is no int where torch.export leaves the length open
            known = [column]
        if known is not None:
            at = [place % size == 0 for place in known for size in sizes]
            if not any(at):
                return anchor
            if self.end is None and all(at):
                # Apart where rows have places of their own, so that a state has one size at all places.
                return current if self.common else {name: W.clone() for name, W in current.items()}
        ends = [column % size == 0 for size in sizes]  # per memory
        device = next(iter(current.values())).device
        # A flag is filled in on the device: copying it there would wait for it.
        flags = [
            end if isinstance(end, Tensor) else torch.full((1,), end, dtype=torch.bool, device=device)
            for end in ends
        ]
        moves = torch.stack(flags, dim=1)  # [B or 1, N or 1]
        if self.offset is not None:
            moves = moves & (self.offset < column).unsqueeze(1)
        if self.end is not None:
            moves = moves & (self.end >= column).unsqueeze(1)
        moves = moves[..., None, None, None]
        return {name: torch.where(moves, current[name], W) for name, W in anchor.items()}
