"""Haystacks of bytes with needles in them, drawn a batch at a time.

A needle is a key and a value, "Q=417;", a question names the key, "Q?", and is answered "417;". Needles stand
between the sentences of a noise that repeats itself, as in RULER's first task (arXiv 2404.06654, appendix B).
Four kinds: one needle ("single"); several keys of which one is asked ("multi_key") or all are, one after the
other ("multi_query"); one key with several values, which are asked in the order in which they stood
("multi_value").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from nested_learning.evals.fit import IGNORED, TaskBatch

SENTENCES = (
    "Rain fell on the hill. ",
    "A dog ran by the sea. ",
    "Bells rang at noon. ",
    "The old mill turned. ",
    "Smoke rose over town. ",
)
VOCABULARY = 256
KINDS = ("single", "multi_key", "multi_value", "multi_query")
NOTHING = -1  # behind the end of a segment
_LETTERS, _FIRST_LETTER = 26, ord("A")
_DIGITS, _ZERO = 10, ord("0")
_IS, _ASK, _END, _NEXT = (ord(sign) for sign in "=?;,")


@dataclass(frozen=True)
class NeedleForm:
    """Sizes of needles.

    Args:
        needles: keys, or values of a key, in a haystack of several.
        letters: of a key.
        digits: of a value.
    """

    needles: int = 4
    letters: int = 1
    digits: int = 3

    @property
    def width(self) -> int:
        """Bytes of a needle, and of a question that has one answer."""
        return self.letters + 1 + self.digits + 1


class Haystacks(NamedTuple):
    """Haystacks to be read before a question.

    Attributes:
        ids: [B, T] int64.
        keys: [B, N, letters] int64: of each needle, in the order in which they stand.
        values: [B, N, digits] int64.
        depths: [B, N] float: share of the noise before the needle that was asked for, 0 to 1.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    depths: Tensor


@cache
def noise() -> tuple[Tensor, Tensor]:
    """The sentences once, [P] int64, and from each byte on how many are left to the next sentence, [P]."""
    text = "".join(SENTENCES).encode()
    starts = [sum(map(len, SENTENCES[:n])) for n in range(len(SENTENCES) + 1)]
    left = [min(start for start in starts if start >= place) - place for place in range(len(text))]
    return torch.tensor(list(text)), torch.tensor(left)


def hidden(kind: str, length: int, depths: Tensor, form: NeedleForm, generator: Generator) -> Haystacks:
    """Haystacks of a kind that a question is to follow.

    Args:
        kind: one of `KINDS`; of "multi_key" and "multi_query" the haystacks are the same.
        length: bytes T of a haystack.
        depths: [B, N] of the needles; one of them where the kind is "single".
        form: sizes of the needles.
        generator: draws keys, values and where the noise begins.
    """
    rows, count = depths.shape
    depths = depths.sort(dim=1).values
    keys = _keys(rows, count, form, generator)
    if kind == "multi_value":
        keys = keys[:, :1].expand(-1, count, -1)
    values = _draw(_ZERO, _DIGITS, (rows, count, form.digits), generator)
    ids, _ = _lay_out(_needles(keys, values), depths, length, generator)
    return Haystacks(ids, keys, values, depths)


def question(key: Tensor) -> Tensor:
    """The question for keys [B, letters]: [B, letters + 1]."""
    return torch.cat([key, torch.full_like(key[:, :1], _ASK)], dim=1)


def separator(rows: int, last: bool) -> Tensor:
    """The byte after an answer, [B, 1]: another one follows, or none does."""
    return torch.full((rows, 1), _END if last else _NEXT)


def lessons(rows: int, length: int, form: NeedleForm, everything: bool, generator: Generator) -> TaskBatch:
    """Sequences for training: of each three rows one has one needle, one several keys, one several values.

    Questions stand in the haystack too, each somewhere behind the needles that it is about, one for each 32
    bytes where they have room, and one is the end of the sequence. Where a key has several values, those that
    it has so far are asked.

    Args:
        rows: B.
        length: bytes T of a sequence.
        form: sizes of the needles.
        everything: every byte is to be predicted; False: the answers alone.
        generator: draws all of it.
    """
    longest = form.letters + 1 + form.needles * (form.digits + 1)  # of a question with all values of a key
    asked = max(1, min(length // 32, (length - form.needles * form.width) // longest))
    kinds = torch.arange(rows) % 3
    count = form.needles
    keys = _keys(rows, count, form, generator)
    keys = torch.where((kinds == 2)[:, None, None], keys[:, :1], keys)
    values = _draw(_ZERO, _DIGITS, (rows, count, form.digits), generator)
    places = torch.rand(rows, count, generator=generator).sort(dim=1).values
    alone = kinds == 0
    places[:, 1:] = torch.where(alone[:, None], torch.inf, places[:, 1:])  # not there at all
    first = places[:, :1]
    when = first + (1 - first) * torch.rand(rows, asked, generator=generator)
    when[:, -1] = 1.0
    so_far = (places[:, None, :] < when[..., None]).sum(-1)  # [B, Q] needles before each question
    chosen = (torch.rand(rows, asked, generator=generator) * so_far).long()
    ask = _asked(keys, values, so_far, chosen, kinds == 2, form)
    needles = torch.nn.functional.pad(_needles(keys, values), (0, ask.shape[2] - form.width), value=NOTHING)
    needles[alone, 1:] = NOTHING
    segments, places = torch.cat([needles, ask], dim=1), torch.cat([places, when], dim=1)
    order = places.argsort(dim=1)
    segments = segments.take_along_dim(order[..., None], dim=1)
    ids, answer = _lay_out(segments, places.gather(1, order).clamp(max=1.0), length, generator)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
    if everything:
        return TaskBatch(ids, following)
    answer = torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], dim=1)
    return TaskBatch(ids, torch.where(answer, following, IGNORED))


def _asked(
    keys: Tensor, values: Tensor, so_far: Tensor, chosen: Tensor, several: Tensor, form: NeedleForm
) -> Tensor:
    """Questions with their answers, [B, Q, width]: the chosen needle's, or all values of the key so far."""
    rows, asked = chosen.shape
    key = keys.take_along_dim(chosen[..., None], dim=1)
    one = values.take_along_dim(chosen[..., None], dim=1)  # [B, Q, digits]
    ends = torch.full((rows, asked, values.shape[1], 1), _NEXT)
    number = torch.arange(values.shape[1])
    ends = torch.where((number == so_far[..., None] - 1)[..., None], _END, ends)
    every = torch.cat([values[:, None].expand(-1, asked, -1, -1), ends], dim=-1)
    every = torch.where((number < so_far[..., None])[..., None], every, NOTHING).flatten(2)
    single = torch.cat([one, torch.full_like(one[..., :1], _END)], dim=-1)
    single = torch.nn.functional.pad(single, (0, every.shape[2] - single.shape[2]), value=NOTHING)
    answer = torch.where(several[:, None, None], every, single)
    return torch.cat([key, torch.full_like(key[..., :1], _ASK), answer], dim=-1)


def _keys(rows: int, count: int, form: NeedleForm, generator: Generator) -> Tensor:
    """Keys [B, N, letters], no two of a row with the same first letter."""
    first = torch.rand(rows, _LETTERS, generator=generator).argsort(dim=1)[:, :count, None] + _FIRST_LETTER
    rest = _draw(_FIRST_LETTER, _LETTERS, (rows, count, form.letters - 1), generator)
    return torch.cat([first, rest], dim=-1)


def _draw(first: int, count: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(first, first + count, shape, generator=generator)


def _needles(keys: Tensor, values: Tensor) -> Tensor:
    """Needles [B, N, width]."""
    one = torch.ones_like(keys[..., :1])
    return torch.cat([keys, one * _IS, values, one * _END], dim=-1)


def _lay_out(segments: Tensor, places: Tensor, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Noise with segments in it, and where these answer a question.

    Args:
        segments: [B, S, W] int64, NOTHING behind the end of each.
        places: [B, S] ascending, the share of the noise before each segment; it goes on to the end of its
            sentence.
        length: bytes of a row.
        generator: draws the sentence that a row begins with.

    Returns:
        ids [B, T] int64, and [B, T] bool: bytes of answers.

    Raises:
        ValueError: the segments are longer than a row.
    """
    text, left = noise()
    rows = len(segments)
    widths = (segments != NOTHING).sum(-1)  # [B, S]
    free = length - widths.sum(1, keepdim=True)
    if int(free.min()) < 0:
        raise ValueError(f"sequences of {length} bytes have no room for needles; expected longer ones")
    begins = (left == 0).nonzero()[:, 0]
    begin = begins[torch.randint(len(begins), (rows, 1), generator=generator)]
    at = (places * free).long()
    at = (at + left[(begin + at) % len(text)]).minimum(free)  # [B, S], of the noise
    before = widths.cumsum(1) - widths
    starts = at + before
    column = torch.arange(length)
    passed = (column >= (starts + widths)[..., None]).long() * widths[..., None]  # [B, S, T]
    ids = text[(begin + column - passed.sum(1)) % len(text)]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    asks = (segments == _ASK).long().cumsum(-1) - (segments == _ASK).long() > 0  # behind the question mark
    row = torch.arange(rows)[:, None, None].expand_as(segments)
    there = segments != NOTHING
    column = starts[..., None] + torch.arange(segments.shape[2])
    ids[row[there], column[there]] = segments[there]
    answer[row[there], column[there]] = asks[there]
    return ids, answer
