"""Plots of training curves."""

from __future__ import annotations

from pathlib import Path

import torch

from nested_learning.evals.report.figures import new_figure, save
from nested_learning.evals.rows import MethodRows


def training_curves(rows: MethodRows, label: str, path: Path, *, log: bool = False, smooth: int = 1) -> None:
    """The figure `curve` of each method, mean over the seeds that have one.

    Args:
        rows: the rows.
        label: of the y axis.
        path: where the PNG goes.
        log: logarithmic y axis.
        smooth: steps of a running mean.
    """
    drawing, (axis,) = new_figure(1, width=5.2)
    for row in rows.values():
        curves = [curve for figures in row.figures.values() if (curve := figures.get("curve")) is not None]
        if curves:
            length = min(map(len, curves))
            mean = torch.tensor([curve[:length] for curve in curves]).mean(0)
            if length >= smooth > 1:
                mean = mean.unfold(0, smooth, 1).mean(1)
            lr = row.settings.get("lr")
            axis.plot(mean, label=row.method if lr is None else f"{row.method}, lr {lr:g}", linewidth=1)
    axis.set(xlabel="step", ylabel=label, yscale="log" if log else "linear")
    if axis.lines:
        axis.legend(fontsize=8)
    save(drawing, path)
