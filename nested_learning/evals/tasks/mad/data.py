"""Sequences of the six MAD tasks (Poli et al., arXiv 2403.17844): fixed sets to train, validate and test.

What is asked follows from the ids alone, so each task is a law of ids and a function from ids to targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from nested_learning.evals.fit import IGNORED, TaskBatch

NOISE_IDS = 16  # of the vocabulary, where there is noise
MOTIF = 3  # symbols of a key or a value of fuzzy recall, at most


@dataclass(frozen=True)
class Cell:
    """A setting of a task.

    Args:
        vocab_size: ids.
        length: tokens of a sequence.
        train: sequences that are trained on.
        noise: share of the pairs that are noise.
        copies: tokens that are copied.
    """

    vocab_size: int
    length: int
    train: int = 12_800
    noise: float = 0.0
    copies: int = 16


class Data(NamedTuple):
    """Sets of sequences of one cell; a training set may ask for more than the others do."""

    train: TaskBatch
    validation: TaskBatch
    test: TaskBatch


def make_data(task: str, cell: Cell, seed: int, sizes: tuple[int, int]) -> Data:
    """The sets of a cell, all from one generator.

    Args:
        task: one of TASKS.
        cell: the setting.
        seed: of all randomness, the map of memorisation too.
        sizes: sequences for validation and test.

    Raises:
        ValueError: a sequence of the cell has no room for what it holds.
    """
    check_cell(task, cell)
    generator = torch.Generator().manual_seed(seed)
    draw = TASKS[task]
    if task == "memorisation":
        draw = partial(memorisation, value_of=memory_map(cell, generator))
    train = draw(cell, cell.train, generator, True)
    validation, test = (draw(cell, size, generator, False) for size in sizes)
    return Data(train, validation, test)


def check_cell(task: str, cell: Cell) -> None:
    """ValueError unless a sequence has room for what it holds."""
    noise = NOISE_IDS if cell.noise else 0
    least_ids = {"fuzzy-recall": 2 * MOTIF + 1, "copying": 3, "compression": 2, "memorisation": 4}
    least = {"fuzzy-recall": 4 * MOTIF + 1, "copying": 2 * cell.copies + 2, "compression": 2}.get(task, 4)
    ids = least_ids.get(task, 2 + noise)
    odd = task in ("recall", "noisy-recall", "memorisation") and cell.length % 2
    if cell.vocab_size < ids or cell.length < least or odd:
        raise ValueError(
            f"{task} with {cell.vocab_size} ids in {cell.length} tokens: expected {ids} ids or more in "
            f"{least} tokens or more{', an even number' if odd else ''}"
        )


def recall(cell: Cell, count: int, generator: torch.Generator, training: bool) -> TaskBatch:
    """Pairs of a key and a value, keys again and again; some pairs are noise in the noisy variant.

    Keys are drawn with equal chance, their values anew for each sequence; two keys may have one value. The
    last key is one of those told before. In training every next token is asked, else the values of keys that
    were told before.
    """
    noise_ids, pairs = NOISE_IDS if cell.noise else 0, cell.length // 2
    symbols = cell.vocab_size - noise_ids
    keys = symbols // 2
    key = torch.randint(keys, (count, pairs), generator=generator)
    is_noise = torch.rand(count, pairs - 1, generator=generator) < cell.noise
    is_noise &= torch.arange(pairs - 1) != torch.randint(pairs, (count, 1), generator=generator)
    is_noise[:, 0] &= ~is_noise.all(1)  # one pair at least is told
    told = torch.zeros(count, keys).scatter_add_(1, key[:, :-1], (~is_noise).float()).clamp(max=1)
    key[:, -1:] = torch.multinomial(told, 1, generator=generator)
    value_of = torch.randint(keys, symbols, (count, keys), generator=generator)
    told_pairs = torch.stack((key, value_of.gather(1, key)), dim=-1)
    if noise_ids:
        noise = torch.randint(symbols, cell.vocab_size, (count, pairs - 1, 2), generator=generator)
        told_pairs[:, :-1] = torch.where(is_noise[..., None], noise, told_pairs[:, :-1])
    ids = told_pairs.flatten(1)
    return TaskBatch(ids[:, :-1], ids[:, 1:] if training else recall_targets(ids, keys))


def recall_targets(ids: Tensor, keys: int) -> Tensor:
    """Values of the keys that were told before, each at its key: [B, T - 1] for ids [B, T] of pairs."""
    key, value = ids[:, ::2], ids[:, 1::2]
    before = (key[:, :, None] == key[:, None, :]).tril(-1).any(-1) & (key < keys)
    targets = torch.full_like(ids[:, :-1], IGNORED)
    targets[:, ::2] = torch.where(before, value, IGNORED)
    return targets


def fuzzy_recall(cell: Cell, count: int, generator: torch.Generator, training: bool) -> TaskBatch:
    """Recall of keys and values of one to three different symbols each; keys of a test have three.

    Sequences are filled up on the left. What is asked is as in `recall`.
    """
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    rows = [_fuzzy_row(cell, rng, 1 if training else MOTIF) for _ in range(count)]
    ids = torch.tensor(rows)
    targets = ids[:, 1:] if training else fuzzy_targets(rows, cell.vocab_size)
    return TaskBatch(ids[:, :-1], targets)


def _fuzzy_row(cell: Cell, rng: random.Random, least: int) -> list[int]:
    """A sequence of `length` + 1 ids, with keys of `least` symbols or more."""
    symbols = cell.vocab_size - 1  # the last id fills up
    keys, values = range(symbols // 2), range(symbols // 2, symbols)

    def new_key() -> tuple[int, ...]:
        return tuple(rng.sample(keys, rng.randint(least, MOTIF)))

    def new_value() -> tuple[int, ...]:
        return tuple(rng.sample(values, rng.randint(1, MOTIF)))

    asked, answer = new_key(), new_value()
    size = len(asked) + len(answer)
    place = rng.randrange(cell.length - 2 * size)  # from here on the asked pair is told, if it was not
    value_of, told = {asked: answer}, False
    row: list[int] = []
    while len(row) < cell.length - size - 2 * MOTIF:
        key = asked if len(row) >= place and not told else new_key()
        row += [*key, *value_of.setdefault(key, new_value())]
        told = told or key == asked
    row += [*asked, *answer]
    return [symbols] * (cell.length + 1 - len(row)) + row


def fuzzy_targets(rows: list[list[int]], vocab_size: int) -> Tensor:
    """Symbols of the values of keys told before, and of the last value, each one place early: [B, T - 1]."""
    keys, fill = (vocab_size - 1) // 2, vocab_size - 1
    targets = torch.full((len(rows), len(rows[0]) - 1), IGNORED)
    for n, row in enumerate(rows):
        runs = [
            list(run) for _, run in groupby(enumerate(row), lambda each: (each[1] >= keys, each[1] == fill))
        ]
        runs = [run for run in runs if run[0][1] != fill]  # key, value, key, value, …
        told: set[tuple[int, ...]] = set()
        for key_run, value_run in zip(runs[::2], runs[1::2], strict=True):
            key = tuple(symbol for _, symbol in key_run)
            if key in told or value_run is runs[-1]:
                for place, symbol in value_run:
                    targets[n, place - 1] = symbol
            told.add(key)
    return targets


def copying(cell: Cell, count: int, generator: torch.Generator, training: bool) -> TaskBatch:
    """Tokens among blanks, then a sign, then as many blanks at which the tokens are asked in their order.

    Each blank stands before one of the tokens, any with equal chance. The last two ids are the blank and the
    sign.
    """
    blank, copies = cell.vocab_size - 2, cell.copies
    before = cell.length - copies - 1  # tokens in front of the sign
    tokens = torch.randint(blank, (count, copies), generator=generator)
    owner = torch.randint(
        copies, (count, before - copies), generator=generator
    )  # which token a blank precedes
    blanks = torch.zeros(count, copies, dtype=torch.long).scatter_add_(1, owner, torch.ones_like(owner))
    ids = torch.full((count, cell.length), blank)
    ids.scatter_(1, blanks.cumsum(1) + torch.arange(copies), tokens)
    ids[:, before] = cell.vocab_size - 1
    return TaskBatch(ids, copying_targets(ids, copies, blank))


def copying_targets(ids: Tensor, copies: int, blank: int) -> Tensor:
    """The tokens that stand before the sign, at the last places [B, T]."""
    targets = torch.full_like(ids, IGNORED)
    targets[:, -copies:] = ids[ids < blank].view(len(ids), copies)
    return targets


def compression(cell: Cell, count: int, generator: torch.Generator, training: bool) -> TaskBatch:
    """Random symbols and a last id that gathers them; every token is asked of what stands there."""
    ids = torch.randint(cell.vocab_size - 1, (count, cell.length), generator=generator)
    ids[:, -1] = cell.vocab_size - 1
    return TaskBatch(ids, ids)


def memory_map(cell: Cell, generator: torch.Generator) -> Tensor:
    """The value of each key [K], a different one for each."""
    symbols = cell.vocab_size - 1
    keys = symbols // 2
    return keys + torch.randperm(symbols - keys, generator=generator)[:keys]


def memorisation(
    cell: Cell,
    count: int,
    generator: torch.Generator,
    training: bool,
    value_of: Tensor | None = None,
) -> TaskBatch:
    """Keys, each followed by the last id, at which the key's value is asked; no value is ever told."""
    value_of = memory_map(cell, generator) if value_of is None else value_of
    key = torch.randint(len(value_of), (count, cell.length // 2), generator=generator)
    ids = torch.stack((key, torch.full_like(key, cell.vocab_size - 1)), dim=-1).flatten(1)
    targets = torch.full_like(ids, IGNORED)
    targets[:, 1::2] = value_of[key]
    return TaskBatch(ids, targets)


TASKS: dict[str, Callable[[Cell, int, torch.Generator, bool], TaskBatch]] = {
    "recall": recall,
    "noisy-recall": recall,
    "fuzzy-recall": fuzzy_recall,
    "copying": copying,
    "compression": compression,
    "memorisation": memorisation,
}
