"""The update "lm" of the continuum memory systems: each chunk is read, and learned from when the next begins.

The model runs in segments of the fastest level's chunk, all layers for one, then the next. A chunk is learned
from when the first token after it is there, which is before that token is read: the pair of the two belongs
to the slower levels whose own chunks go on. The chunk is then run once more, from the mixers' states at its
start and with the weights it was read with, and the next-token loss is differentiated by backpropagation
through the layers above. All that this needs is part of the state, so tokens may come in any pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.layers.cms import CMSState
from nested_learning.layers.cms.learning import LearningLevel
from nested_learning.layers.cms.segments import Segment, Segments
from nested_learning.layers.cms.writer import Rows
from nested_learning.memory.state import State, Weights
from nested_learning.models.hope.block_hope import Blocks, HopeBlock, Piece, States, Tokens, join
from nested_learning.models.hope.sharded_hope import check_passes, gathered, inside
from nested_learning.ops.context import transformed
from nested_learning.ops.rows import padded

PENDING = "pending"
Head = Callable[[Tensor], Tensor]
# Per layer and level, the gradient of each matrix [B, out, in].
Gradients = list[dict[int, Weights]]
# The matrices [B, out, in] by (layer, level, name).
Leaves = dict[tuple[int, int, str], Tensor]


@dataclasses.dataclass(frozen=True)
class PendingChunk(State):
    """Tokens that were read and not yet learned from: the fastest level's running chunk, of length C.

    Attributes:
        ids: [B, C] int64.
        learned: [B, C] bool, `learn` of these tokens: False for those that teach nothing.
        count: [B] int64, how many there are; C after a boundary until the next token comes.
    """

    ids: Tensor
    learned: Tensor
    count: Tensor

    def with_tokens(self, ids: Tensor, learn: Tensor, real: Tensor | None) -> PendingChunk:
        """Append ids [B, S], those that are `real` [B, S] bool; None: all."""
        if real is None:
            real = torch.ones_like(learn)
        size = self.ids.shape[1]
        target = (self.count.unsqueeze(1) + real.long().cumsum(1) - 1).where(real, size)
        after = [
            F.pad(old, (0, 1)).scatter(1, target, new)[:, :size]  # what is not real goes to a spare column
            for old, new in ((self.ids, ids), (self.learned, learn))
        ]
        return PendingChunk(after[0], after[1], self.count + real.sum(1))


class LMUpdate:
    """Reads tokens with a model whose CMS levels learn from the next-token loss.

    Args:
        blocks: the model's blocks, and what the call wants of them.
        embed: the model's embedding.
        head: from the blocks' output [B, T, D] to logits [B, T, vocabulary].
        exact: while training, gradients are functions of weights, states and embeddings, not constants.
    """

    def __init__(self, blocks: Blocks, embed: Callable[[Tensor], Tensor], head: Head, exact: bool) -> None:
        self.blocks, self.embed, self.exact = blocks, embed, exact
        self.head = head.func if isinstance(head, partial) else head  # a module, which FSDP gathers
        self.systems = [block.cms for block in blocks.blocks]
        self.chunk_size = self.systems[0].levels[0].chunk_size
        layers = range(len(self.systems))
        self.mixer_names = [f"layers.{i}.mixer" for i in layers]
        self.start_names = [f"layers.{i}.start" for i in layers]
        self.cms_names = [f"layers.{i}.cms" for i in layers]
        self.levels: list[dict[int, LearningLevel]] = []  # by layer, from the call's first token on

    def read(self, tokens: Tokens, states: States) -> tuple[Piece, States]:
        """As `Blocks.read`, where chunks are learned from before the first token after them is read.

        Documents are read as rows of their own, so that no pair of tokens is of two of them.

        Waits for the device once per segment where rows may stand at different places, to see whether any
        of them has come to a boundary.
        """
        check_passes(self.blocks.blocks, tokens.documents)
        piece, after = self._read(tokens, states)
        return piece, self._without_gaps(after, states, tokens.x.shape[1])

    def _read(self, tokens: Tokens, states: States) -> tuple[Piece, States]:
        """`read`, where attention that keeps all tokens may be left with more columns than were read."""
        if tokens.documents is None:
            return self._read_rows(tokens, states)

        def read(
            tokens: Tokens, before: States | None, real: Tensor | None, aligned: bool, first: int | None
        ) -> tuple[Piece, States]:
            inside = aligned and first is None
            piece, after = self._read_rows(tokens._replace(real=real), before or {}, first, inside)
            return piece, dict(sorted(after.items()))  # in one order, to be joined

        inputs, before = tokens._replace(real=None, documents=None), dict(sorted(states.items())) or None
        piece, after = tokens.documents.read(read, inputs, before, self.chunk_size, tell_first=True)
        return piece, after or {}

    def _read_rows(
        self, tokens: Tokens, states: States, first: int | None = None, inside: bool = False
    ) -> tuple[Piece, States]:
        """`read` for rows of one document.

        Args:
            first: tokens of every row before these, where they are as many and known.
            inside: no row comes to the end of a chunk.
        """
        x, ids, real, learn, _ = tokens
        assert ids is not None
        ids = ids.long()  # int32 ids are taken too
        states = dict(states)
        position = self._prepare(states, x, aligned=real is None)
        position = position if first is None else first
        segments = Segments(x.shape[:2], self.chunk_size, position, real, inside)
        learn = torch.ones_like(ids, dtype=torch.bool) if learn is None else learn
        x, ids, learn = (segments.pack(t) for t in (x, ids, learn))
        pieces = []
        for number, segment in enumerate(segments):
            columns = segment.of(ids), segment.of(learn)
            known = None if segments.position is None else segments.position // self.chunk_size + number
            self._enter(states, segment, *columns, known)
            pending = _pending(states)
            weights = {
                layer: cms.current_weights(_cms_state(states[name]), x.dtype)
                for layer, (cms, name) in enumerate(zip(self.systems, self.cms_names, strict=True))
            }
            mixers = {name: states[name] for name in self.mixer_names if name in states}
            blocks = dataclasses.replace(self.blocks, cms_weights=weights)
            piece, after = blocks.read(Tokens(segment.of(x), None, segment.real, None), mixers)
            states.update(after)
            states[PENDING] = pending.with_tokens(*columns, segment.real)
            pieces.append(piece)
        if self.start_names[0] not in states:
            states.update(zip(self.start_names, self._initial_mixers(x), strict=True))
        y, hidden, surprise = join(pieces)
        unpacked = [None if s is None else segments.unpack(s) for s in surprise]
        return Piece(segments.unpack(y), tuple(map(segments.unpack, hidden)), tuple(unpacked)), states

    def _prepare(self, states: States, x: Tensor, aligned: bool) -> Tensor | int:
        """Fill in the states before the first token.

        Returns:
            Tokens of the running chunk [B] int64, 0 where all rows are at the start.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if PENDING in states:  # which may come from a session in another precision
            dtype = next(iter(_cms_state(states[self.cms_names[0]]).weights.values())).dtype
        if not self.levels:
            self.levels = [
                inside(block, partial(cms.learning, dtype=dtype), x)
                for block, cms in zip(self.blocks.blocks, self.systems, strict=True)
            ]
        rows = len(x)
        self.levels = [{i: level.for_rows(rows) for i, level in levels.items()} for levels in self.levels]
        if PENDING in states:
            return _pending(states).count.to(x.device) % self.chunk_size
        for name, cms, levels in zip(self.cms_names, self.systems, self.levels, strict=True):
            states[name] = cms.start(levels)
        ids = torch.zeros(rows, self.chunk_size, dtype=torch.long, device=x.device)
        states[PENDING] = PendingChunk(ids, ids.bool(), ids.new_zeros(rows))
        if not aligned:
            states.update(zip(self.mixer_names, self._initial_mixers(x), strict=True))
        return 0

    def _initial_mixers(self, x: Tensor) -> list[State]:
        """The mixers' states before any token, written out: padding changes nothing."""
        nothing = torch.zeros_like(x[:, :1])
        real = torch.zeros(nothing.shape[:2], dtype=torch.bool, device=x.device)

        def start(block: HopeBlock, x: Tensor) -> State:
            state: State = block.mixer(block.mixer_norm(x), None, real)[1]
            return state

        return [inside(block, partial(start, block), nothing) for block in self.blocks.blocks]

    def _without_gaps(self, after: States, before: States, length: int) -> States:
        """`after` a call on `length` columns, with as many more columns of keys and values at most.

        Where rows stand at different places, segments have empty columns. A window drops them; attention
        without one would keep them for ever, and hold more columns than it has read.
        """
        for mixer, start in zip(self.mixer_names, self.start_names, strict=True):
            held = before.get(mixer)
            most = length + (held.positions.shape[1] if isinstance(held, AttentionState) else 0)
            for name in (mixer, start):
                state = after.get(name)
                if isinstance(state, AttentionState) and state.positions.shape[1] > most:
                    after[name] = state.tokens_last().last_columns(most)
        return after

    def _enter(
        self, states: States, segment: Segment, ids: Tensor, learn: Tensor, number: int | None
    ) -> None:
        """Before a segment is read: in the rows that begin a chunk with it, learn from the one before.

        Args:
            states: changed in place.
            segment: the segment.
            ids, learn: its tokens [B, S].
            number: number of the segment in all rows; None where they may stand at different places.
        """
        pending = _pending(states)
        begins: Rows = True
        full: Rows = bool(number)
        if number is None:
            begins = pending.count % self.chunk_size == 0
            begins = begins if segment.real is None else begins & segment.real[:, 0]
            full = begins & (pending.count == self.chunk_size)
            full = full if transformed() or full.any() else False
        if full is not False:
            self._learn(states, full, ids[:, 0], learn[:, 0])
        if begins is True and self.mixer_names[0] not in states:
            return  # the first chunk of all rows
        for start, mixer in zip(self.start_names, self.mixer_names, strict=True):
            states[start] = _choose_rows(begins, states[mixer], states.get(start))
        count = torch.zeros_like(pending.count)
        if isinstance(begins, Tensor):
            count = torch.where(begins, count, pending.count)
        states[PENDING] = PendingChunk(pending.ids, pending.learned, count)

    # Learning --------------------------------------------------------------------------------------------

    def _learn(self, states: States, full: Rows, next_ids: Tensor, next_learn: Tensor) -> None:
        """Take in the pending chunks of the rows `full`, followed by the tokens `next_ids` [B]."""
        rows = torch.ones_like(next_learn) if isinstance(full, bool) else full
        index = None if isinstance(full, bool) or transformed() else rows.nonzero().squeeze(1)
        part = dict(states)
        if index is not None:
            part = {name: state.select_rows(index) for name, state in states.items()}
            next_ids, next_learn = next_ids[index], next_learn[index]
        grads: Sequence[Gradients] = self._gradients(part, next_ids, next_learn)
        if index is not None:
            grads = [_into_rows(g, index, len(rows)) for g in grads]
        elif not isinstance(full, bool):
            grads = pytree.tree_map(lambda g: torch.where(rows.view(-1, 1, 1), g, 0), grads)
        for layer, (block, name) in enumerate(zip(self.blocks.blocks, self.cms_names, strict=True)):
            levels, state, (within, crossing) = self.levels[layer], states[name], (g[layer] for g in grads)
            learn = partial(self.systems[layer].learn, levels, _cms_state(state), within, crossing)
            states[name] = inside(block, learn, rows)

    def _gradients(self, states: States, next_ids: Tensor, next_learn: Tensor) -> tuple[Gradients, Gradients]:
        """Gradients of the losses of the pairs inside the chunk, and of that of its last token and the next.

        First order: at the weights and states as they are; exact: as functions of them, while training.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "cms_update='lm' takes gradients while it reads, which torch.inference_mode() rules out; "
                "use torch.no_grad()"
            )
        exact = self.exact and torch.is_grad_enabled()
        if not exact:
            states = {name: state.detach() for name, state in states.items()}
        with torch.enable_grad(), _differentiable_twice(exact), gathered(self._modules(), exact) as bare:
            leaves = self._leaves(states, exact)
            slow = {k: W for k, W in leaves.items() if k[1] > 0 or self.systems[0].variant == "nested"}
            losses = partial(self._losses, states, next_ids, next_learn, not bare)
            if transformed():
                sums, pull = torch.func.vjp(losses, leaves)[:2]
                found = [pull(row)[0] for row in torch.eye(2, dtype=sums.dtype, device=sums.device)]
                parts = [found[0], {k: found[1][k] for k in slow}]
                if not exact:
                    parts = pytree.tree_map(Tensor.detach, parts)
            else:
                sums = losses(leaves)
                parts = [_gradients_of(s, of, exact) for s, of in zip(sums, (leaves, slow), strict=True)]
        return _by_layer(len(self.systems), parts[0]), _by_layer(len(self.systems), parts[1])

    def _losses(
        self, states: States, next_ids: Tensor, next_learn: Tensor, hooks: bool, leaves: Leaves
    ) -> Tensor:
        """Summed losses [2] of the pairs inside the pending chunk, and of its last token and the next.

        Args:
            hooks: call modules with their hooks.
            leaves: the CMS's weights.
        """
        pending = _pending(states)
        starts = {
            m: states[s] for m, s in zip(self.mixer_names, self.start_names, strict=True) if s in states
        }
        x = self.embed(pending.ids)
        given = {
            layer: [_of_level(leaves, layer, number, x.dtype) for number in range(len(cms.levels))]
            for layer, cms in enumerate(self.systems)
        }
        blocks = Blocks(self.blocks.blocks, self.blocks.norm, cms_weights=given, hooks=hooks)
        (y, _, _), _ = blocks.read(Tokens(x, None, None, None), starts)
        head = self.head if hooks or not isinstance(self.head, nn.Module) else self.head.forward
        losses = _pair_losses(head(y), pending, next_ids, next_learn)
        return torch.stack([losses[:, :-1].sum(), losses[:, -1].sum()])

    def _leaves(self, states: States, exact: bool) -> Leaves:
        """The weights of the rows as inputs of their own, so that a gradient is that of this chunk alone."""
        leaves: Leaves = {}
        for layer, (cms, name) in enumerate(zip(self.systems, self.cms_names, strict=True)):
            state = _cms_state(states[name])
            dtype = next(iter(state.weights.values())).dtype
            for number, own in enumerate(cms.current_weights(state, dtype)):
                leaves |= {(layer, number, key): W for key, W in (own or {}).items()}
        if transformed():
            return leaves
        return {
            key: W.view_as(W) if exact and W.requires_grad else W.detach().requires_grad_()
            for key, W in leaves.items()
        }

    def _modules(self) -> list[nn.Module]:
        """Everything that a chunk runs through above the embedding."""
        head = [self.head] if isinstance(self.head, nn.Module) else []
        return [*self.blocks.blocks, self.blocks.norm, *head]


def _gradients_of(loss: Tensor, leaves: Leaves, exact: bool) -> Leaves:
    if not leaves:
        return {}
    if not loss.requires_grad:
        raise ValueError(
            "cms_update='lm' learns from the gradient of the next-token loss, and none passes the head or "
            "the last blocks, as where their inputs are quantised; quantise weights alone (torchao's "
            "Int8WeightOnlyConfig), or the other modules"
        )
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, create_graph=exact)
    return dict(zip(leaves, found, strict=True))


def _of_level(leaves: Leaves, layer: int, number: int, dtype: torch.dtype) -> Weights | None:
    """The weights of one level; None where it has none of its own."""
    own = {name: W.to(dtype) for (i, n, name), W in leaves.items() if (i, n) == (layer, number)}
    return own or None


def _pair_losses(logits: Tensor, pending: PendingChunk, next_ids: Tensor, next_learn: Tensor) -> Tensor:
    """Cross-entropy [B, C] of each token's successor, 0 where the successor is not learned."""
    targets = torch.cat([pending.ids[:, 1:], next_ids.unsqueeze(1)], 1)
    learn = torch.cat([pending.learned[:, 1:], next_learn.unsqueeze(1)], 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.to(dtype).mT, targets, reduction="none")
    return losses.where(learn, 0)


def _by_layer(layers: int, found: Leaves) -> Gradients:
    grads: Gradients = [{} for _ in range(layers)]
    for (layer, level, name), g in found.items():
        grads[layer].setdefault(level, {})[name] = g
    return grads


def _into_rows(grads: Gradients, index: Tensor, rows: int) -> Gradients:
    """Gradients of the rows `index` as gradients of all rows, zero for the others."""

    def spread(g: Tensor) -> Tensor:
        return g.new_zeros(rows, *g.shape[1:]).index_copy(0, index, g)

    return pytree.tree_map(spread, grads)


def _choose_rows(rows: Rows, new: State, old: State | None) -> State:
    """`new` in these rows, `old` in the others.

    Keys and values of attention grow: the shorter ones get padding in front, marked by a position of −1.
    """
    if old is None or isinstance(rows, bool):
        return new

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return a
        sizes = [max(pair) for pair in zip(a.shape, b.shape, strict=True)]
        a, b = padded(a, sizes), padded(b, sizes)
        return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    return pytree.tree_map(choose, new, old)


def _pending(states: States) -> PendingChunk:
    pending = states[PENDING]
    assert isinstance(pending, PendingChunk)
    return pending


def _cms_state(state: State) -> CMSState:
    assert isinstance(state, CMSState)
    return state


def _differentiable_twice(wanted: bool) -> AbstractContextManager[object]:
    """Attention by plain matrix products: its fast kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()
