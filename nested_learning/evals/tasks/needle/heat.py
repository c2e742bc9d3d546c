"""Heat maps of what was found, depth × length, of each method."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from nested_learning.evals.report.figures import save
from nested_learning.evals.rows import MethodRow, MethodRows

_ACROSS = 5  # maps in a row


def heat_maps(rows: MethodRows, path: Path) -> None:
    """Write a PNG with one map per method: the mean over seeds of single needles and of several keys.

    Args:
        rows: of which those with figures "heat" are drawn: by length, exact match by depth.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    known = [row for row in rows.values() if any("heat" in each for each in row.figures.values())]
    drawn = [(row, *_map(row)) for row in known]
    across = max(1, min(_ACROSS, len(drawn)))
    down = max(1, math.ceil(len(drawn) / across))
    figure = Figure(figsize=(1 + 2.2 * across, 2.4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    image = None
    for axis, (row, lengths, values) in zip(axes, drawn, strict=False):
        image = axis.imshow(values, vmin=0, vmax=1, aspect="auto")
        axis.set_title(row.method, fontsize=8)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=6, rotation=60)
        parts = len(values)
        axis.set_yticks(range(parts), [f"{100 * part // parts} %" for part in range(parts)], fontsize=6)
    figure.supylabel("depth", fontsize=7)
    figure.supxlabel("bytes", fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="exact match", shrink=0.8)
    save(figure, path)


def _map(row: MethodRow) -> tuple[list[int], np.ndarray]:
    """Lengths, and [depths, lengths] of the means over seeds; NaN where nothing was hidden."""
    heats = [figures["heat"] for figures in row.figures.values() if "heat" in figures]
    lengths = sorted({int(length) for heat in heats for length in heat})
    cells = [
        [[np.nan if value is None else value for value in heat[str(length)]] for length in lengths]
        for heat in heats
    ]
    found = np.array(cells, dtype=float)  # [seeds, lengths, depths]
    known = ~np.isnan(found)
    total = np.where(known, found, 0).sum(0) / np.maximum(known.sum(0), 1)
    return lengths, np.where(known.any(0), total, np.nan).T
