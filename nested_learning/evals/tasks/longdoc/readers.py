"""Methods that read a long document: windows alone, and what learns within one.

Another method is a line here: `reader` takes settings of Levels, with `chunk`, the index of the chunk size,
in the place of `chunk_size`, and of settings that are tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nested_learning.evals.methods.pretrained import PretrainedMethod

SHORT, DOUBLE, WHOLE = 0, 1, 2  # indices of the option `windows`
ADAM: dict[str, Any] = {"chunk": 0, "rule": "adam"}
AVERAGE: dict[str, Any] = {"chunk": 1, "lr": 0.0}  # what it takes over from the fast level stays
ADAM_RATES = tuple({"lr": rate} for rate in (1e-4, 2e-4, 4e-4))
SPARSE_RATES = tuple({"lr": rate} for rate in (4e-4, 8e-4, 1.6e-3))
RANKED_RATES = tuple({"lr": rate} for rate in (2e-3, 4e-3, 8e-3))
RATES_OF_SGD = tuple({"lr": rate, "decay": decay} for rate, decay in ((0.03, 0.0), (0.1, 0.0), (0.1, 0.02)))
RATES_OF_RMS = tuple({"lr": rate, "decay": decay} for rate, decay in ((3e-5, 0.0), (1e-4, 0.0), (1e-4, 0.02)))


@dataclass(frozen=True)
class DocumentReader:
    """A method with the window that it reads in.

    Attributes:
        method: the method.
        window: index of the option `windows`.
        grid: settings of which one is chosen on the tuning documents.
        read_again: share of a window that the next one begins with; None: all but the task's stride.
        practises: rates and starts are learned on the documents for tuning first.
    """

    method: PretrainedMethod
    window: int = SHORT
    grid: Sequence[Mapping[str, Any]] = field(default_factory=lambda: [{}])
    read_again: float | None = None
    practises: bool = False


def reader(
    name: str, levels: Sequence[Mapping[str, Any]], window: int, grid: Sequence[Mapping[str, Any]]
) -> DocumentReader:
    """A reader with levels; they share the settings of the grid, but for those that say their `lr`."""
    return DocumentReader(PretrainedMethod(name, "stack", options={"levels": list(levels)}), window, grid)


def window(name: str, index: int) -> DocumentReader:
    """A window alone: a level that never learns, so that all else is as it is for the others."""
    return reader(name, [{"chunk": 0, "lr": 0.0}], index, [{}])


SGD: dict[str, Any] = {"chunk": 0, "rule": "gd"}
RMS: dict[str, Any] = {"chunk": 0, "rule": "rms", "clip": None}
FAST: dict[str, Any] = {**ADAM, "decay": 0.2}
SLOW: dict[str, Any] = {**AVERAGE, "consolidate": 0.4}

WINDOW, WINDOW_DOUBLE, WINDOW_WHOLE = (
    window("window-1k", SHORT),
    window("window-2k", DOUBLE),
    window("window-8k", WHOLE),
)
DYNAMIC = reader("dynamic-evaluation", [SGD], SHORT, RATES_OF_SGD)
DYNAMIC_RMS = reader("dynamic-evaluation-rms", [RMS], SHORT, RATES_OF_RMS)
DYNAMIC_WHOLE = reader("dynamic-evaluation-8k", [SGD], WHOLE, RATES_OF_SGD)
LORA = DocumentReader(
    PretrainedMethod("lora-reading", "lora"), SHORT, tuple({"lr": rate} for rate in (1e-3, 3e-3, 1e-2))
)
ONE_LEVEL = reader("one-level-reading", [ADAM], SHORT, ADAM_RATES)
AVERAGED = reader("levels-average-reading", [FAST, SLOW], SHORT, ADAM_RATES)
RANKED = reader("rank-8-reading", [{**ADAM, "rank": 8}], SHORT, RANKED_RATES)  # what Learner.auto is
SPARSE = reader("sparse-reading", [{**ADAM, "sparse": 0.05}], SHORT, SPARSE_RATES)
# What the second half of a window is taught is what the first half told, so that less is read again.
DISTILLED = replace(
    reader("distilled-reading", [{**ADAM, "distill": 0.3}], SHORT, ADAM_RATES), read_again=0.25
)
REREAD = reader("rereading", [{**ADAM, "reread": 1}], SHORT, ADAM_RATES)
# Rates and starts of one level, by the first-order gradient, on what the settings of others are chosen on.
STARTED = DocumentReader(
    PretrainedMethod(
        "started-reading",
        "started stack",
        options={
            "levels": [{**ADAM, "lr": 2e-4}],
            "starts": {"steps": 24, "rank": 8, "lr_rates": 0.1},
        },
    ),
    practises=True,
)
ONE_LEVEL_WHOLE = reader("one-level-reading-8k", [ADAM], WHOLE, ADAM_RATES)
AVERAGED_WHOLE = reader("levels-average-reading-8k", [FAST, SLOW], WHOLE, ADAM_RATES)

READERS = (
    WINDOW,
    WINDOW_DOUBLE,
    WINDOW_WHOLE,
    DYNAMIC,
    DYNAMIC_RMS,
    LORA,
    ONE_LEVEL,
    AVERAGED,
    RANKED,
    SPARSE,
    DISTILLED,
    REREAD,
    STARTED,
    DYNAMIC_WHOLE,
    ONE_LEVEL_WHOLE,
    AVERAGED_WHOLE,
)
