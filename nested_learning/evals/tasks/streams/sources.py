"""Where labelled texts come from: CLINC150's files, a CSV file, a data set of the hub, or chance."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from nested_learning.evals.tasks.streams.data import SPLITS, LabelledTexts

INTENTS, DOMAINS = "clinc150.json", "clinc150_domains.json"
SHARES = (0.6, 0.2, 0.2)  # of each label's texts, by split, where the source has no splits


class HubSource(NamedTuple):
    """A data set of the hub.

    Attributes:
        path: its name there.
        text, label: columns.
        splits: its splits for training, validation and test; one name twice: it is divided.
    """

    path: str
    text: str
    label: str
    splits: tuple[str, str, str]


HUB = {
    "banking77": HubSource("mteb/banking77", "text", "label_text", ("train", "train", "test")),
    "dbpedia": HubSource("DeveloperOats/DBPedia_Classes", "text", "l2", ("train", "validation", "test")),
}


def words(intent: str) -> str:
    """An intent's name as it is written in text."""
    return intent.replace("_", " ")


def read_clinc(folder: Path) -> LabelledTexts:
    """The corpus in a folder: clinc150.json and clinc150_domains.json.

    Raises:
        ValueError: a file is not there, or is not of this format.
    """
    intents, domains = (_json(folder / name) for name in (INTENTS, DOMAINS))
    try:
        by_domain = {domain: tuple(map(words, names)) for domain, names in domains.items()}
        texts = {split: _by_label(intents[split]) for split in SPLITS}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / INTENTS} and {DOMAINS} are not CLINC150: expected the lists train, val and test of "
            f"[text, intent], and a map from domain to intents ({type(error).__name__}: {error})"
        ) from error
    for label in (label for labels in by_domain.values() for label in labels):
        for split in SPLITS:
            if label not in texts[split]:
                raise ValueError(f"{folder / INTENTS} has no examples of {label!r} in {split}")
    return LabelledTexts(by_domain, texts)


def _json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: name a folder with {INTENTS} and {DOMAINS} by NESTED_LEARNING_DATA, or by "
            "the option `data`"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _by_label(pairs: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for text, intent in pairs:
        found.setdefault(words(intent), []).append(text)
    return {label: tuple(texts) for label, texts in found.items()}


def read_csv(path: Path) -> LabelledTexts:
    """The texts of a CSV file with the columns `text`, `label`, and perhaps `split` (train, val, test).

    Without splits the texts of each label are divided 60 : 20 : 20, always in the same way. A text that
    stands there twice with one label counts once.

    Raises:
        ValueError: the file is not there, is no text, or lacks a column; a label without texts in a split.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: expected a CSV file with the columns text and label")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            names = set(table.fieldnames or ())
            rows = list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    if missing := {"text", "label"} - names:
        raise ValueError(
            f"{path} lacks the columns {', '.join(sorted(missing))}, has {', '.join(sorted(names))}"
        )
    found: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(rows, 1):
        text, label = (" ".join((row[name] or "").split()) for name in ("text", "label"))
        split = row["split"] if "split" in names else ""
        if not text or not label:
            raise ValueError(f"{path}, row {number} has text {row['text']!r} and label {row['label']!r}")
        if "split" in names and split not in SPLITS:
            raise ValueError(f"{path}, row {number}: split is {split!r}, expected {', '.join(SPLITS)}")
        found.setdefault(split, []).append((text, label))
    if "split" not in names:
        return divided(found.get("", []), str(path))
    return labelled({split: found.get(split, []) for split in SPLITS}, str(path))


@cache
def read_hub(name: str) -> LabelledTexts:
    """The texts of a data set of the hub, downloaded once.

    Raises:
        ValueError: it is not here and cannot be fetched.
    """
    source = HUB[name]
    try:
        from datasets import load_dataset

        parts = {split: load_dataset(source.path, split=split) for split in set(source.splits)}
    except Exception as error:  # no network, no such data set, another layout
        raise ValueError(
            f"{name} ({source.path} on the hub) is not here and could not be fetched "
            f"({type(error).__name__}): go where there is a network, or give a CSV file with the columns "
            "text and label as `data`"
        ) from error
    pairs = {
        split: list(zip(part[source.text], part[source.label], strict=True)) for split, part in parts.items()
    }
    train, validation, test = source.splits
    if validation != train:
        return labelled({"train": pairs[train], "val": pairs[validation], "test": pairs[test]}, name)
    known = divided(pairs[train], name, shares=(0.8, 0.2, 0.0)).texts
    return labelled(
        {
            **{
                s: [(text, label) for label, all in known[s].items() for text in all]
                for s in ("train", "val")
            },
            "test": pairs[test],
        },
        name,
    )


def divided(
    pairs: Sequence[tuple[str, str]], name: str, shares: tuple[float, float, float] = SHARES
) -> LabelledTexts:
    """Texts of each label in three splits, always the same ones."""
    found: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for label, texts in _by_label(pairs).items():
        kept = list(dict.fromkeys(texts))
        random.Random(f"split {label}").shuffle(kept)
        start = 0.0
        for split, share in zip(SPLITS, shares, strict=True):
            part = kept[round(start * len(kept)) : round((start + share) * len(kept))]
            found[split] += [(text, label) for text in part]
            start += share
    return labelled(found, name, tuple(s for s, share in zip(SPLITS, shares, strict=True) if share))


def labelled(
    splits: Mapping[str, Sequence[tuple[str, str]]], name: str, needed: Sequence[str] = SPLITS
) -> LabelledTexts:
    """Texts by split and label, each label a domain of its own.

    Raises:
        ValueError: a label without texts in a split, or no labels.
    """
    texts = {split: _by_label(pairs) for split, pairs in splits.items()}
    labels = sorted({label for by_label in texts.values() for label in by_label})
    if len(labels) < 2:
        raise ValueError(f"{name} has {len(labels)} labels, expected two or more")
    for split in needed:
        absent = [label for label in labels if label not in texts[split]]
        if absent:
            raise ValueError(f"{name} has no texts of {absent[0]!r} in {split}; expected some of each label")
    return LabelledTexts({label: (label,) for label in labels}, texts)


def in_domains(texts: LabelledTexts, count: int, seed: int) -> LabelledTexts:
    """The labels in `count` domains by chance, as equal as can be; ValueError for fewer labels."""
    labels = sorted(label for labels in texts.domains.values() for label in labels)
    if len(labels) < count:
        raise ValueError(f"{count} tasks need as many labels or more, there are {len(labels)}")
    random.Random(f"domains {seed}").shuffle(labels)
    return LabelledTexts({f"part {i}": tuple(labels[i::count]) for i in range(count)}, texts.texts)


def made_up_intents(domains: int = 3, labels: int = 2) -> LabelledTexts:
    """Texts that name their labels, for trials without data."""
    names = {f"domain {i}": tuple(f"topic {labels * i + j}" for j in range(labels)) for i in range(domains)}
    texts = {
        split: {
            label: tuple(f"{split} {n} about {label}" for n in range(count))
            for own in names.values()
            for label in own
        }
        for split, count in zip(SPLITS, (6, 4, 5), strict=True)
    }
    return LabelledTexts(names, texts)
