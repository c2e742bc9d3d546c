"""Answers of a model to haystacks that it has read in pieces."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from nested_learning.evals.carried import CarriedReader
from nested_learning.evals.rows import Figures
from nested_learning.evals.tasks.needle.haystack import (
    KINDS,
    Haystacks,
    NeedleForm,
    hidden,
    question,
    separator,
)

DEPTHS = 5  # parts of a haystack that the heat map tells apart
_GRID = 40  # places that the depths of several needles are drawn from, each at most once


def score(reader: CarriedReader, length: int, rows: int, form: NeedleForm, generator: Generator) -> Figures:
    """Exact match of values and share of right digits at a length.

    Values are decoded greedily, digit by digit; what stands between them is given. The order of several
    values of a key does not matter, as in RULER: each that is said counts once.

    Args:
        reader: has read nothing, and does not afterwards.
        length: bytes of haystack, questions and answers.
        rows: haystacks of each kind.
        form: sizes of the needles.
        generator: draws the haystacks.

    Returns:
        The exact match of each of `KINDS`; "digits": the share at their places, mean of the kinds; "heat":
        the exact match of single needles and of several keys by depth, the first of `DEPTHS` parts first.
    """
    exact: dict[str, float] = {}
    digits: dict[str, float] = {}
    hits: list[tuple[Tensor, Tensor]] = []
    for kind in ("single", "multi_key", "multi_value"):
        depths = _depths(kind, rows, form, generator)
        texts = hidden(kind, length - _room(kind, form), depths, form, generator)
        after = reader.anew()
        after.read(texts.ids)
        if kind == "multi_value":
            said = _several(after, texts, same=True)
            matched = (texts.values[:, :, None] == said[:, None]).all(-1).any(-1)
            exact[kind], digits[kind] = _mean(matched), _mean(said == texts.values)
            continue
        if kind == "multi_key":
            said = _several(after, texts, same=False)
            exact["multi_query"], digits["multi_query"] = _matched(said, texts.values)
        said = _each(after, texts)
        exact[kind], digits[kind] = _matched(said, texts.values)
        hits.append((texts.depths.flatten(), (said == texts.values).all(-1).flatten()))
    return {
        **exact,
        "digits": sum(digits.values()) / len(KINDS),
        "heat": _by_depth(torch.cat([at for at, _ in hits]), torch.cat([hit for _, hit in hits])),
    }


def _depths(kind: str, rows: int, form: NeedleForm, generator: Generator) -> Tensor:
    """Depths [B, N]: one needle's in turn from 0 to 1, several from a grid, each place once."""
    if kind == "single":
        return torch.linspace(0, 1, DEPTHS)[torch.arange(rows) % DEPTHS, None]
    places = max(_GRID, form.needles)
    chosen = torch.rand(rows, places, generator=generator).argsort(dim=1)[:, : form.needles]
    return chosen / (places - 1)


def _room(kind: str, form: NeedleForm) -> int:
    """Bytes of the longest question of a kind of haystack with its answers."""
    if kind == "single":
        return form.width
    if kind == "multi_key":
        return form.needles * form.width
    return form.letters + 1 + form.needles * (form.digits + 1)


def _each(reader: CarriedReader, texts: Haystacks) -> Tensor:
    """Values [B, N, digits] that are said for each key, each asked alone right behind the haystack."""
    rows, count, digits = texts.values.shape
    asked = reader.rows(torch.arange(rows).repeat_interleave(count))
    return _value(asked, question(texts.keys.flatten(0, 1)), digits).unflatten(0, (rows, count))


def _several(reader: CarriedReader, texts: Haystacks, same: bool) -> Tensor:
    """Values [B, N, digits] that are said one after the other: of the same key, or of each key in turn."""
    rows, count, digits = texts.values.shape
    asked = reader.rows(torch.arange(rows))
    said: list[Tensor] = []
    for number in range(count):
        key = question(texts.keys[:, number])
        if number:
            last = said[-1][:, -1:]
            between = separator(rows, last=not same)
            key = torch.cat([last, between] if same else [last, between, key], dim=1)
        said.append(_value(asked, key, digits))
    return torch.stack(said, dim=1)


def _value(reader: CarriedReader, given: Tensor, digits: int) -> Tensor:
    """Digits [B, digits] that follow what is given; all but the last are read."""
    said = [reader.read(given)]
    for _ in range(digits - 1):
        said.append(reader.read(said[-1]))
    return torch.cat(said, dim=1)


def _matched(said: Tensor, values: Tensor) -> tuple[float, float]:
    return _mean((said == values).all(-1)), _mean(said == values)


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean())


def _by_depth(depths: Tensor, hits: Tensor) -> list[float | None]:
    """Share of hits in each part of the haystack; None where nothing was hidden."""
    part = (depths * DEPTHS).long().clamp(max=DEPTHS - 1)
    found = [hits[part == number] for number in range(DEPTHS)]
    return [_mean(each) if len(each) else None for each in found]
