"""Pictures of a reading, PNGs by matplotlib; no display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nested_learning._files import replacing, write_bytes
from nested_learning.layers.memory.watch import Array, MemoryTrace
from nested_learning.lens.page import picture
from nested_learning.lens.traces import LearnedTrace, Traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, LINES = 110, 60  # characters of the text's picture
FONT_SIZE = 8
ADVANCE = 0.602  # width of a character of DejaVu Sans Mono by its size


def save_figures(reading: Traces, folder: Path) -> list[Path]:
    """Write the pictures of a reading into a folder that is there; their paths.

    levels.png, text.png, tokens.png (loss and surprise by position), and where there is such a thing
    NAME.png of each memory layer, writes.png, learned.png.

    Raises:
        OSError, ValueError: a file cannot be written.
    """
    figures = {"text": _text(reading), "tokens": _tokens(reading)}
    figures |= {trace.name: _memory(trace, reading) for trace in reading.memories}
    if any(len(trace.positions) for trace in reading.levels):
        figures["writes"] = _writes(reading)
    if reading.learned is not None:
        figures["learned"] = _learned(reading.learned)
    paths = [folder / "levels.png"]
    write_bytes(paths[0], picture(reading.system))
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with replacing(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    return paths


def _figure(rows: int, width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _text(reading: Traces) -> Figure:
    """The beginning of the text, each character on the colour of its token's loss."""
    from matplotlib.figure import Figure

    lines: list[str] = [""]
    losses: list[list[float]] = [[]]
    for word, loss in zip(reading.tokens, reading.loss, strict=True):
        for character in word:
            lines[-1] += character if character.isprintable() else " "
            losses[-1].append(float(loss))
            if character == "\n" or len(lines[-1]) == COLUMNS:
                lines.append("")
                losses.append([])
        if len(lines) > LINES:
            break
    lines, losses = lines[:LINES], losses[:LINES]
    grid = np.full((len(lines), COLUMNS), np.nan)
    for row, values in enumerate(losses):
        grid[row, : len(values)] = values
    cell = FONT_SIZE / 72  # inches
    figure = Figure(figsize=(COLUMNS * cell * ADVANCE, len(lines) * cell * 1.5))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(len(lines), 0))
    axes.axis("off")
    if np.isfinite(grid).any():
        low, high = np.nanpercentile(grid, (2, 98))
        pale = 0.6 * (high - low) + 1e-6  # letters stay legible on the darkest
        extent = (0, COLUMNS, len(lines), 0)
        axes.imshow(grid, aspect="auto", extent=extent, cmap="Oranges", vmin=low, vmax=high + pale)
    for row, line in enumerate(lines):
        shown = line.replace("$", r"\$")  # a dollar would begin a formula
        axes.text(0, row + 0.5, shown, family="monospace", fontsize=FONT_SIZE, va="center")
    return figure


def _tokens(reading: Traces) -> Figure:
    """Loss and each memory's surprise by position, smoothed where there are many tokens."""
    figure, all_axes = _figure(1 + bool(reading.memories), 9.0, 2.6 * (1 + bool(reading.memories)))
    lines = {"loss": reading.loss}
    if reading.learned is not None:
        lines |= {"base model": reading.learned.before, "with what was learned": reading.learned.after}
    panels = [("nats", lines)]
    if reading.memories:
        panels.append(("surprise", {trace.name: trace.surprise for trace in reading.memories}))
    for (label, curves), axes in zip(panels, all_axes[:, 0], strict=True):
        for name, values in curves.items():
            axes.plot(*_smooth(values), linewidth=1, label=name)
        axes.set(xlabel="token", ylabel=label)
        axes.legend(fontsize=7)
    return figure


def _smooth(values: Array, points: int = 200) -> tuple[Array, Array]:
    """Middles and means of equal parts of the values, of which NaN do not count."""
    parts = np.array_split(np.arange(len(values)), min(points, len(values)))
    known = [part[np.isfinite(values[part])] for part in parts]
    middles = [float(part.mean()) for part, inside in zip(parts, known, strict=True) if len(inside)]
    return np.array(middles), np.array([float(values[inside].mean()) for inside in known if len(inside)])


def _memory(trace: MemoryTrace, reading: Traces) -> Figure:
    """Recall, singular values, distance and gates of one memory layer."""
    figure, axes = _figure(2, 11.0, 7.0, columns=3)
    figure.suptitle(f"{trace.name}, {trace.kind}, chunks of {trace.chunk_size}")
    heat, singular, distance, *gates = axes.flat
    moments = reading.moments
    extent = (0, float(moments[-1]), float(trace.probes[-1]) + 1, 0)
    shown = heat.imshow(trace.recall.T, aspect="auto", extent=extent, cmap="RdBu", vmin=-1, vmax=1)
    heat.set(title="recall, 1 − ‖M(k) − v̂‖²/‖v̂‖²", xlabel="tokens read", ylabel="token of the key")
    figure.colorbar(shown, ax=heat)
    for name, values in trace.singular_values.items():
        mean = values.mean(1)  # over the heads
        (line,) = singular.plot(moments, mean[:, 0], label=f"{name}: largest, median")
        singular.plot(moments, np.median(mean, axis=1), color=line.get_color(), linestyle="--")
    singular.set(title="singular values", xlabel="tokens read", ylim=(0, None))
    for index, name in enumerate(trace.memories):
        distance.plot(moments, trace.distance[:, index].mean(1), label=name)
    distance.set(title="distance from the initial state", xlabel="tokens read", ylim=(0, None))
    for axis in (singular, distance):
        axis.legend(fontsize=7)
    for axis, (name, values) in zip(gates, trace.rates.items(), strict=False):
        for head in values.T:
            axis.plot(*_smooth(head), linewidth=0.8)
        axis.set(title=f"{name}, a line per head", xlabel="token")
    for axis in gates[len(trace.rates) :]:
        axis.axis("off")
    return figure


def _writes(reading: Traces) -> Figure:
    """Boundaries of the CMS levels, and the sizes of their writes where they learn."""
    traces = [trace for trace in reading.levels if len(trace.positions)]
    figure, all_axes = _figure(len(traces), 9.0, 0.6 + 1.1 * len(traces))
    for trace, axes in zip(traces, all_axes[:, 0], strict=True):
        if trace.learns:
            axes.stem(trace.positions, np.nan_to_num(trace.sizes), markerfmt=".", basefmt=" ")
        else:
            axes.plot(trace.positions, np.zeros(len(trace.positions)), "|")
        how = "size of each write" if trace.learns else "written by the optimizer alone"
        axes.set(xlim=(0, len(reading.tokens)))
        axes.set_title(f"layer {trace.layer}, level {trace.level + 1}: {how}", fontsize=8)
    return figure


def _learned(learned: LearnedTrace) -> Figure:
    """Norm of each layer's change, and of its hidden units, those that changed most first."""
    layers = learned.layer_norms
    figure, ((bars, units),) = _figure(1, 9.0, 3.4, columns=2)
    bars.bar(list(layers), list(layers.values()))
    bars.xaxis.get_major_locator().set_params(integer=True)
    bars.set(xlabel="layer", ylabel="‖Δ‖", title="change of the layers' weights")
    for name, norms in learned.units.items():
        units.plot(np.sort(norms)[::-1], linewidth=0.7, label=name)
    units.set(xlabel="hidden units, sorted", ylabel="‖Δ‖", title="change of hidden units, a line per weight")
    return figure
