"""Sequences of multi-query associative recall (MQAR, arXiv 2312.04927) and of its forgetting variant.

A sequence tells pairs of a key and a value, then asks for each key once: k₁ v₁ … k_N v_N, then slots of two
tokens, N of which hold a key. The answer at such a key is its value, and is not fed back. All other tokens
are noise. In the forgetting variant some keys are told again, with another value, before the questions; the
answer is the later one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nested_learning.evals.fit import IGNORED, TaskBatch

POWER = 0.01  # p(slot g) ∝ g^(POWER − 1), g = 1, 2, …: most questions come soon, some late


def check_room(length: int, pairs: int, updates: int) -> None:
    """ValueError unless a sequence has room for its pairs and their questions."""
    needed = 2 * (pairs + updates) + 2 * pairs
    if length % 2 or not 0 <= updates <= pairs or pairs < 1 or needed > length:
        raise ValueError(
            f"a sequence of {length} tokens with {pairs} pairs of which {updates} are told again: expected "
            f"an even number of tokens, {needed} or more, and no more pairs told again than there are"
        )


def recall_batch(
    size: tuple[int, int], pairs: int, vocab_size: int, generator: torch.Generator, updates: int = 0
) -> TaskBatch:
    """Sequences of MQAR.

    Keys are distinct ids of 1 … vocab_size / 2 − 1, values distinct ones of the upper half; noise is any id.

    Args:
        size: (B, T): sequences, and tokens of each.
        pairs: N, keys of a sequence.
        vocab_size: V.
        generator: of all randomness.
        updates: keys that are told again, in any order, each with a value that is not its first.

    Returns:
        ids [B, T] and, at the questions alone, the values [B, T].

    Raises:
        ValueError: no room for so many pairs, or too few ids.
    """
    rows, length = size
    check_room(length, pairs, updates)
    half = vocab_size // 2
    if pairs >= half:
        raise ValueError(f"{pairs} keys of {half - 1} ids; set vocab_size to more than {2 * pairs + 1}")
    keys = 1 + _distinct(rows, half - 1, pairs, generator)
    values = half + _distinct(rows, vocab_size - half, pairs, generator)
    told = torch.stack((keys, values), dim=-1).flatten(1)
    if updates:
        again = _distinct(rows, pairs, updates, generator)  # which keys
        # a shift by 1 … V/2 − 1 around the upper half: uniform over the values that differ from the first
        shift = torch.randint(1, vocab_size - half, (rows, updates), generator=generator)
        changed = half + (values.gather(1, again) - half + shift) % (vocab_size - half)
        values = values.scatter(1, again, changed)
        told = torch.cat((told, torch.stack((keys.gather(1, again), changed), dim=-1).flatten(1)), dim=1)
    slots = (length - told.shape[1]) // 2
    weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (POWER - 1)
    asked = torch.multinomial(weights.expand(rows, -1), pairs, generator=generator)
    places = told.shape[1] + 2 * asked
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    ids[:, : told.shape[1]] = told
    ids.scatter_(1, places, keys)
    return TaskBatch(ids, torch.full_like(ids, IGNORED).scatter(1, places, values))


def reassigned(batch: TaskBatch, pairs: int, updates: int) -> tuple[Tensor, Tensor]:
    """Questions for keys that were told again.

    Returns:
        asked: [B, T] bool, such a question stands here.
        stale: [B, T] int64: the value that the key had first; IGNORED elsewhere.
    """
    first = batch.ids[:, : 2 * pairs].unflatten(1, (pairs, 2))
    again = batch.ids[:, 2 * pairs : 2 * (pairs + updates) : 2]
    is_question = batch.targets != IGNORED
    asked = (batch.ids[:, :, None] == again[:, None]).any(-1) & is_question
    of_key = batch.ids[:, :, None] == first[:, None, :, 0]  # [B, T, N], one key at most
    stale = (of_key * first[:, None, :, 1]).sum(-1)
    return asked, torch.where(asked, stale, IGNORED)


def _distinct(rows: int, among: int, count: int, generator: torch.Generator) -> Tensor:
    """Numbers below `among`, distinct in each row, in random order: [rows, count] int64."""
    return torch.rand(rows, among, generator=generator).topk(count, dim=1).indices
