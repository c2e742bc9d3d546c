"""Interleaved timing, the table on the screen and the record in a file, which all benchmarks share."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from nested_learning._files import write_text
from nested_learning.training.report import hardware, versions

Row = Mapping[str, object]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options.add_argument("--repeats", type=int, help="timed calls of each candidate")
    options.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that it runs, the figures mean nothing"
    )
    return options


def interleaved(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of a call of each work; all are called in turn, so that a busy moment meets all.

    Args:
        wait: called before and after each work: what waits for a device that works on its own.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmup + repeats):
        for name, work in works.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table; the keys of the first are the columns."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in rows[0]))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def record(
    figures: Mapping[str, Any], path: Path | None, device: torch.device | None = None
) -> dict[str, Any]:
    """The figures with versions and hardware; printed in short, and written to `path` whole or not at all.

    Args:
        device: what was measured; None: the CPU.
    """
    machine, software = hardware(device or torch.device("cpu")), versions()
    print(
        f"{machine['device_name']}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {software['torch']}, git {software['git']}"
    )
    result = {"versions": software, "hardware": machine, **figures}
    if path is not None:
        write_text(path, json.dumps(result, indent=2) + "\n")
    return result
