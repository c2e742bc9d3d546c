"""Figures of rows, several plots in one PNG; no display is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_learning._files import replacing
from nested_learning.evals.rows import MethodRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(columns: int, width: float = 4.6, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure without a display and its axes, in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    with replacing(path) as temporary:
        Path(temporary).write_bytes(content.getvalue())


def bars(rows: MethodRows, figure: str, label: str, path: Path) -> None:
    """A bar per method with the standard deviation over seeds."""
    bar_panels(rows, {figure: label}, path)


def bar_panels(rows: MethodRows, figures: Mapping[str, str], path: Path) -> None:
    """A plot per figure, side by side, with a bar per method and the standard deviation over seeds.

    Args:
        rows: the rows.
        figures: labels by name of the figure; a row without the figure has no bar.
        path: where the PNG goes.
    """
    most = max((1, *(sum(bool(row.values(name)) for row in rows.values()) for name in figures)))
    drawing, all_axes = new_figure(len(figures), height=0.6 + 0.3 * most)
    for axes, (name, label) in zip(all_axes, figures.items(), strict=True):
        draw_bars(axes, rows, name)
        axes.set(xlabel=label)
    save(drawing, path)


def draw_bars(axes: Any, rows: MethodRows, name: str) -> None:
    """A bar per method that has the figure, the first on top, with the standard deviation over seeds."""
    chosen = [row for row in rows.values() if row.values(name)]
    means = [row.mean(name) or 0.0 for row in chosen]
    axes.barh([row.method for row in chosen], means, xerr=[row.spread(name) or 0.0 for row in chosen])
    axes.invert_yaxis()


def lines(
    rows: MethodRows,
    figures: Sequence[tuple[float, str]],
    labels: tuple[str, str],
    path: Path,
    log: bool = False,
) -> None:
    """A line per method through figures at places of the x axis, with the standard deviation over seeds.

    Args:
        rows: the rows.
        figures: (x, name of the figure) pairs.
        labels: of the x and the y axis.
        path: where the PNG goes.
        log: logarithmic x axis.
    """
    drawing, (axes,) = new_figure(1, width=6.4, height=4.0)
    _draw_lines(axes, rows, figures)
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log" if log else "linear")
    axes.legend(fontsize=7)
    save(drawing, path)


def line_panels(
    rows: MethodRows,
    panels: Mapping[str, Sequence[tuple[float, str]]],
    xlabel: str,
    path: Path,
    log: bool = False,
) -> None:
    """Several plots of `lines` side by side, with one legend.

    Args:
        rows: the rows.
        panels: label of the y axis and the (x, name of the figure) pairs of each plot.
        xlabel: of all x axes.
        path: where the PNG goes.
        log: logarithmic x axes.
    """
    drawing, all_axes = new_figure(len(panels), width=5.2, height=4.0)
    for axes, (label, figures) in zip(all_axes, panels.items(), strict=True):
        _draw_lines(axes, rows, figures)
        axes.set(xlabel=xlabel, ylabel=label, xscale="log" if log else "linear")
    all_axes[0].legend(fontsize=7)
    save(drawing, path)


def _draw_lines(axes: Any, rows: MethodRows, figures: Sequence[tuple[float, str]]) -> None:
    for row in rows.values():
        points = [(x, row.mean(name), row.spread(name) or 0.0) for x, name in figures]
        points = [point for point in points if point[1] is not None]
        if points:
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=spread, marker=".", capsize=2, linewidth=1, label=row.method)


def grouped_bars(rows: MethodRows, plots: Sequence[Mapping[str, str]], path: Path) -> None:
    """Plots beside each other, each of one or several bars per method, with the deviation over seeds.

    Args:
        rows: the rows.
        plots: figures of each plot, by name, each with its label.
        path: where the PNG goes.
    """
    drawing, axes = new_figure(len(plots), width=4.6 if len(plots) > 1 else 8.0, height=4.0)
    for axis, figures in zip(axes, plots, strict=True):
        chosen = [row for row in rows.values() if any(row.values(name) for name in figures)]
        width = 0.8 / len(figures)
        for index, (name, label) in enumerate(figures.items()):
            drawn = [(place, row) for place, row in enumerate(chosen) if row.values(name)]
            axis.bar(
                [place + index * width for place, _ in drawn],
                [row.mean(name) for _, row in drawn],
                width,
                yerr=[row.spread(name) or 0.0 for _, row in drawn],
                label=label,
            )
        axis.set_xticks(range(len(chosen)), [row.method for row in chosen], rotation=40, ha="right")
        if len(figures) > 1:
            axis.legend(fontsize=7)
        else:
            axis.set_ylabel(next(iter(figures.values())))
    save(drawing, path)
