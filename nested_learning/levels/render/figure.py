"""A nested system as a picture: a band per level, and beside them arrows for what passes between levels."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning._files import replacing
from nested_learning.levels.components import Component, DescribedLevel, Transfer, TransferKind
from nested_learning.levels.render.labels import state_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS: dict[TransferKind, str] = {
    "conditioning on output": "tab:blue",
    "conditioning on weights": "tab:cyan",
    "backpropagation": "tab:red",
    "initial state": "tab:green",
    "generation of weights": "tab:purple",
    "generation of context": "tab:orange",
}
FACES = {"memory": "#fff3df", "optimizer": "#e6f4e6", "weights": "#e8eefb"}
PER_ROW, NAME_WIDTH = 4, 28
BOX_WIDTH, BOX_HEIGHT, GAP, HEADER, LANE, MARGIN = 2.6, 0.8, 0.15, 0.4, 0.3, 0.4  # inches

Link = tuple[int, int, TransferKind]  # from level, to level, how


def save_png(
    title: str,
    levels: Sequence[DescribedLevel],
    transfers: Sequence[Transfer],
    path: str | os.PathLike[str],
) -> None:
    """Write the picture, whole or not at all.

    Arrows are between levels, one per kind of transfer; what passes within a level is not drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    links = _links(levels, transfers)
    heights = [HEADER + math.ceil(len(level.components) / PER_ROW) * (BOX_HEIGHT + GAP) for level in levels]
    bands_width = PER_ROW * (BOX_WIDTH + GAP) + GAP
    width, height = bands_width + LANE * (len(links) + 1), sum(heights) + GAP * len(heights)
    figure = Figure(figsize=(width + 2 * GAP, height + 2 * MARGIN))
    FigureCanvasAgg(figure)
    whole_width, whole_height = figure.get_size_inches()
    inside = GAP / whole_width, MARGIN / whole_height, width / whole_width, height / whole_height
    axes = figure.add_axes(inside, xlim=(0, width), ylim=(-max(height, GAP), 0))  # in inches
    axes.axis("off")
    axes.set_title(title, loc="left")
    bands: dict[int, tuple[float, float]] = {}
    top = 0.0
    for level, height in zip(levels, heights, strict=True):
        _draw_level(axes, level, top, bands_width, height)
        bands[level.number] = top, height
        top -= height + GAP
    _draw_links(axes, links, bands, bands_width)
    kinds = dict.fromkeys(kind for _, _, kind in links)
    handles = [Line2D([], [], color=COLORS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="lower left", ncols=len(COLORS), frameon=False)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_level(axes: Axes, level: DescribedLevel, top: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((0, top - height), width, height, facecolor="#f6f6f6", edgecolor="#999999"))
    axes.text(GAP, top - HEADER / 2, f"Level {level.number}: {level.frequency}", va="center", weight="bold")
    for place, component in enumerate(level.components):
        row, column = divmod(place, PER_ROW)
        x = GAP + column * (BOX_WIDTH + GAP)
        y = top - HEADER - (row + 1) * BOX_HEIGHT - row * GAP
        box = Rectangle((x, y), BOX_WIDTH, BOX_HEIGHT, facecolor=FACES[component.kind], edgecolor="#666666")
        axes.add_patch(box)
        middle = x + BOX_WIDTH / 2, y + BOX_HEIGHT / 2
        axes.text(*middle, _label(component), ha="center", va="center", fontsize=8)


def _label(component: Component) -> str:
    lines = textwrap.wrap(component.name, NAME_WIDTH)
    count = f"{component.parameters:,} parameters"
    lines.append(count if component.parameters else f"state {state_label(component)}")
    return "\n".join(lines).replace("$", r"\$")  # a dollar would begin a formula


def _links(levels: Sequence[DescribedLevel], transfers: Sequence[Transfer]) -> list[Link]:
    """Pairs of levels between which something passes, once per kind, the nearest first."""
    number = {component.name: level.number for level in levels for component in level.components}
    found = {
        (number[source], number[target], transfer.kind): None
        for transfer in transfers
        for source in transfer.sources
        for target in transfer.targets
        if number[source] != number[target]
    }
    return sorted(found, key=lambda link: (abs(link[0] - link[1]), link[0], link[1]))


def _draw_links(axes: Axes, links: list[Link], bands: dict[int, tuple[float, float]], width: float) -> None:
    """Draw each link from the side of one band out to a lane of its own and back to the other band."""
    ports = {number: [link for link in links if number in link[:2]] for number in bands}

    def port(number: int, link: Link) -> float:
        top, height = bands[number]
        return top - height * (ports[number].index(link) + 1) / (len(ports[number]) + 1)

    for lane, link in enumerate(links, 1):
        source, target, kind = link
        x, start, end = width + lane * LANE, port(source, link), port(target, link)
        axes.plot([width, x, x], [start, start, end], color=COLORS[kind], linewidth=1.4)
        arrow = {"arrowstyle": "-|>", "color": COLORS[kind], "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=(width, end), xytext=(x, end), arrowprops=arrow)
