"""Printing of the commands: rich tables on a terminal, plain text in a pipe, JSON alone with --json."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "nested-learning"
QUIET = "--quiet"  # taken by every command


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout. The first column is a name, the others are numbers, set to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in cells:
            table.add_row(*row)
        Console().print(table, markup=False)
        return
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    print(title)
    for line in [list(columns), *cells]:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(padded).rstrip())


def print_positions(mode: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Print losses by position as a table.

    Args:
        mode: "empty" or "carried", the way of reading.
        scores: score of each column by its name, as `score_both_ways` gives it, all of the same documents.
    """
    score = next(iter(scores.values()))
    how = {"empty": "from the empty state", "carried": "with the state carried"}[mode]
    title = (
        f"nats per token by position, {score['documents']} documents, blocks of {score['block_size']} {how}"
    )
    rows = [
        [f"{line[0]['from']:,} to {line[0]['to'] - 1:,}", f"{line[0]['tokens']:,}"]
        + ["-" if each[mode] is None else f"{each[mode]:.4f}" for each in line]
        for line in zip(*(score["table"] for score in scores.values()), strict=True)
    ]
    means = [score["nats_per_token"][mode] for score in scores.values()]
    rows.append(["all", f"{score['tokens']:,}", *("-" if mean is None else f"{mean:.4f}" for mean in means)])
    print()
    print_table(title, ("position", "tokens", *scores), rows)


def program() -> str:
    """The words that call this program again: its name, or its path where the name is not found."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("nested_learning", "__main__.py"):
        return "python -m nested_learning"
    return shlex.quote(str(called)) if called.name == NAME and not shutil.which(NAME) else NAME


def say(message: str = "") -> None:
    """Print a line on stderr: progress and remarks, never results."""
    print(message, file=sys.stderr, flush=True)


def human_bytes(count: int) -> str:
    """1,234,567 bytes as `1.2 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
