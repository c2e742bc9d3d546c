"""Files that tasks read and no archive of this package has: where they are looked for, how to name them."""

from __future__ import annotations

import os
from pathlib import Path

MADE_UP = "made-up"  # the option `data` of a task that makes up its own text, for trials
VARIABLE = "NESTED_LEARNING_DATA"
BESIDE = "../shared/data"


def data_folder(option: str) -> Path:
    """The folder of an option `data`; empty: that of NESTED_LEARNING_DATA, or ../shared/data."""
    return Path(option or os.environ.get(VARIABLE) or BESIDE)


def missing_files(option: str, names: tuple[str, ...]) -> str | None:
    """Message about files that the folder lacks; None where all are there, or are made up."""
    if option == MADE_UP:
        return None
    folder = data_folder(option)
    absent = [name for name in names if not (folder / name).is_file()]
    if not absent:
        return None
    return (
        f"{', '.join(absent)} not in {folder}: put these files into a folder and name it by {VARIABLE} or by "
        "the option `data`"
    )


def read_text(option: str, name: str) -> str:
    """A file of the folder.

    Raises:
        ValueError: it is not there.
    """
    problem = missing_files(option, (name,))
    if problem is not None:
        raise ValueError(problem)
    return (data_folder(option) / name).read_text(encoding="utf-8")
