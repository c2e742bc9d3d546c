"""The tasks of class-incremental learning: CLINC150, and any labelled texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from nested_learning._errors import unknown
from nested_learning.evals.data_files import MADE_UP, data_folder
from nested_learning.evals.registry import register_task
from nested_learning.evals.tasks.streams.data import LabelledTexts
from nested_learning.evals.tasks.streams.sources import (
    HUB,
    in_domains,
    made_up_intents,
    read_clinc,
    read_csv,
    read_hub,
)
from nested_learning.evals.tasks.streams.stream import SMOKE, StreamOptions, StreamTask

# Accuracies of Fig. 6 at 3 billion parameters, as others read them off: InCA, in context, EWC, Hope.
ROWS = ("class-means", "in-context", "ewc", "three-levels-averaged")
READ_OFF = {
    "clinc150": (0.692, 0.637, 0.601, 0.934),
    "banking77": (0.639, 0.581, 0.557, 0.852),
    "dbpedia": (0.426, 0.382, 0.368, 0.821),
}


def _printed(name: str) -> Mapping[str, Mapping[str, float]]:
    return {row: {"accuracy": value} for row, value in zip(ROWS, READ_OFF.get(name, ()), strict=False)}


@register_task
class ClincTask(StreamTask):
    """CLINC150's domains one after the other.

    `data`: the folder of its two files, empty for that of NESTED_LEARNING_DATA; "made-up": none is needed.
    """

    name = "clinc150"
    title = "CLINC150's intents, domain after domain, labelled among all seen without being told the domain"
    budgets: ClassVar[Mapping[str, StreamOptions]] = {
        "smoke": SMOKE,
        "small": StreamOptions(seeds=5),
        "full": StreamOptions(tasks=10, train=100, queries=30, between=5, tuning_seeds=3),
    }

    def texts(self, seed: int) -> LabelledTexts:
        data = self.options.data
        return made_up_intents() if data == MADE_UP else _clinc(data_folder(data))

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        return _printed("clinc150")


@register_task
class ClassesTask(StreamTask):
    """Labels of any texts, in stages by chance.

    `data`: "banking77", "dbpedia" (its 70 classes of the second level), the path of a CSV file with the
    columns text and label, or "made-up".
    """

    name = "classes"
    title = "labels of Banking77, DBpedia or a CSV file in stages, labelled among all seen"
    budgets: ClassVar[Mapping[str, StreamOptions]] = {
        "smoke": replace(SMOKE, tasks=3),
        "small": StreamOptions(data="banking77", tasks=7, train=10),
        "full": StreamOptions(data="banking77", tasks=7, train=25, queries=30, between=5, tuning_seeds=3),
    }

    def texts(self, seed: int) -> LabelledTexts:
        data = self.options.data
        if data == MADE_UP:
            return made_up_intents()
        if data in HUB:
            found = read_hub(data)
        elif data.lower().endswith(".csv"):
            found = _csv(Path(data))
        else:
            raise unknown("data of classes (or a .csv file)", data, [*HUB, MADE_UP])
        return in_domains(found, self.options.tasks, seed)

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        return _printed(self.options.data)


_clinc, _csv = cache(read_clinc), cache(read_csv)  # a file is read once a process
