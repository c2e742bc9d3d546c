"""A Hope model reads a text, and what its memories and levels do is noted on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning._progress import progress
from nested_learning.continual.context import evaluating
from nested_learning.layers.cms import CMSState
from nested_learning.layers.memory.watch import cuts, watching
from nested_learning.lens.recording import Recording
from nested_learning.lens.traces import LevelTrace
from nested_learning.lens.words import words
from nested_learning.levels import levels
from nested_learning.memory.state import Weights
from nested_learning.models.hope import HopeCache, HopeForCausalLM

PROBES, MOMENTS = 48, 64


@torch.no_grad()
def record(
    model: HopeForCausalLM,
    ids: Tensor | Sequence[int],
    tokenizer: Any = None,
) -> Recording:
    """Let a model read ids and note what its memories and levels do.

    The text is read from the start, in pieces that end at the boundaries of memories and levels, the state
    carried from one to the next: as `model` reads it with a cache. The model stays as it is.

    Args:
        model: a Hope model with any mixers; layers without a memory show in the loss alone.
        ids: [T] at least two token ids.
        tokenizer: shows the tokens' texts; None: their ids.

    Returns: the recording. Memories are looked at before the text and at most 64 times in it, and asked for
        at most 48 keys, both spread evenly.

    Raises:
        ValueError: another model, or ids that are not [T], T ≥ 2, or outside of the vocabulary.
    """
    if not isinstance(model, HopeForCausalLM):
        raise ValueError(
            f"expected a HopeForCausalLM, got {type(model).__name__}; for a pretrained model of another kind "
            "make a learner: stack_levels(model, tokenizer, levels=[…]), and call lens(learner, text)"
        )
    ids = torch.as_tensor(ids)
    if ids.dim() != 1 or len(ids) < 2 or ids.is_floating_point():
        raise ValueError(f"ids must be [T] integers, T at least 2, got {ids.dtype} {list(ids.shape)}")
    blocks, count = model.model.layers, len(ids)
    probes = torch.linspace(0, count - 1, min(count, PROBES)).round().long()
    writes, losses = _Writes(blocks, model.config.cms_update), []
    with evaluating(model), watching(blocks, probes) as watches, progress("reading", count, "token") as bar:
        for watch in watches:
            watch.look()
        steps = {watch.layer.system.step for watch in watches}
        ends = cuts(count, steps | writes.sizes)
        moments = _spread(ends[1:])
        for start, stop, loss, cache in _read(model, ids, ends):
            losses.append(loss)
            for watch in watches:
                watch.end_piece(stop - start, stop in moments)
            writes.note(cache, start, stop)
            bar.advance(stop - start)
    return Recording(
        model=_line(model),
        tokens=words(tokenizer, ids.tolist()),
        ids=ids.cpu().numpy(),
        loss=np.concatenate([[np.nan], torch.cat(losses).to(torch.float64).numpy()]),
        moments=np.array([0, *sorted(moments)], dtype=np.int64),
        memories=tuple(watch.trace() for watch in watches),
        levels=tuple(writes.traces(count)),
        system=levels(model),
    )


def _read(
    model: HopeForCausalLM, ids: Tensor, ends: Sequence[int]
) -> Iterator[tuple[int, int, Tensor, HopeCache]]:
    """Read ids [T] piece by piece: (start, stop, the losses of the piece's tokens, the cache after it).

    The text's first token, which nothing predicts, has no loss.
    """
    cache, before = HopeCache(model.config), None  # logits [1, V] after the last token so far
    for start, stop in pairwise(ends):
        piece = ids[start:stop].to(model.device)
        output = model(piece.unsqueeze(0), past_key_values=cache, use_cache=True, output_surprise=True)
        assert output.logits is not None
        logits = output.logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        told = logits[:-1] if before is None else torch.cat([before, logits[:-1]])
        before, came = logits[-1:], piece[len(piece) - len(told) :]
        yield start, stop, F.cross_entropy(told, came, reduction="none").cpu(), cache


def _spread(stops: Sequence[int]) -> set[int]:
    """At most `MOMENTS` of them, evenly spread, the last among them."""
    chosen = np.linspace(len(stops) - 1, 0, min(len(stops), MOMENTS)).round().astype(int)
    return {stops[index] for index in chosen}


def _line(model: HopeForCausalLM) -> str:
    mixers = model.config.layer_mixers
    layers = f"{len(mixers)} × {', '.join(dict.fromkeys(mixers))}"
    return f"{type(model).__name__}, {model.num_parameters():,} parameters, {layers}"


class _Writes:
    """Writes of the CMS levels, found as the change of their weights from piece to piece."""

    def __init__(self, blocks: Any, update: str) -> None:
        self.blocks, self.update = blocks, update
        self.sizes = {level.chunk_size for block in blocks if block.cms.learns for level in block.cms.levels}
        self._before: dict[tuple[int, int], Weights] = {}
        self._found: dict[tuple[int, int], dict[int, float]] = {}

    def note(self, cache: HopeCache, start: int, stop: int) -> None:
        """Note what changed while the tokens from `start` to `stop` were read."""
        for index, block in enumerate(self.blocks):
            state = cache.states.get(f"layers.{index}.cms")
            if not isinstance(state, CMSState):
                continue
            for number, level in enumerate(block.cms.levels):
                weights = state.level(number).weights
                if not weights:
                    continue
                key = index, number
                if key not in self._before:
                    like = next(iter(weights.values()))
                    own = block.cms.blocks[number].matrices(like)
                    self._before[key] = {name: W.to(like) for name, W in own.items()}
                at = start if self.update == "lm" else stop  # "lm" writes with the first token of a new chunk
                if at and at % level.chunk_size == 0:
                    moved = [W - self._before[key][name] for name, W in weights.items()]
                    size = torch.stack([part.square().sum() for part in moved]).sum().sqrt()
                    self._found.setdefault(key, {})[at] = float(size)
                self._before[key] = weights

    def traces(self, count: int) -> Iterable[LevelTrace]:
        """A trace per layer and level, after so many tokens."""
        for index, block in enumerate(self.blocks):
            for number, level in enumerate(block.cms.levels):
                places = np.arange(level.chunk_size, count + 1, level.chunk_size, dtype=np.int64)
                learns = (index, number) in self._before
                found = self._found.get((index, number), {})
                sizes = [found.get(int(place), np.nan) for place in places] if learns else []
                yield LevelTrace(
                    index, number, level.chunk_size, learns, places, np.array(sizes, dtype=np.float64)
                )
