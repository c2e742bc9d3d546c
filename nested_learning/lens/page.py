"""The page of a reading: one HTML file that needs no network, with its values as JSON."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from nested_learning.layers.memory.watch import Array, MemoryTrace
from nested_learning.lens.traces import LearnedTrace, LevelTrace, Traces
from nested_learning.levels import NestedSystem

BINS = 400  # points of a curve over tokens
CONTEXT = 12  # tokens in front of a prediction that moved
UNITS = 128  # hidden units of a layer, those that changed most
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the singular values, from the largest to the smallest


def page(reading: Traces) -> str:
    """The page of a reading, whole: opens from a file, asks nothing of a network.

    Every text of the reading is escaped; values are rounded to three digits.
    """
    environment = Environment(
        loader=PackageLoader("nested_learning.lens", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["number"] = _number
    learned = reading.learned
    return environment.get_template("lens.html.jinja").render(
        model=reading.model,
        words=[word.replace("\n", "⏎\n") for word in reading.tokens],
        count=len(reading.tokens),
        mean=float(np.nanmean(reading.loss)),
        data=_data(reading),
        system=reading.system,
        picture=base64.b64encode(picture(reading.system)).decode(),
        learned=learned,
        layers=[] if learned is None else _by_layer(learned),
        moved=[] if learned is None else _moved(reading.tokens, learned),
    )


def picture(system: NestedSystem) -> bytes:
    """The picture of a nested system, a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "levels.png"
        system.to_png(path)
        return path.read_bytes()


def _data(reading: Traces) -> dict[str, Any]:
    """Values for the page's script."""
    measures = [("loss", "nats", reading.loss)]
    if reading.learned is not None:
        learned = reading.learned
        measures[0] = ("loss while reading", "nats", reading.loss)
        measures += [
            ("loss of the base model", "nats", learned.before),
            ("loss with what was learned", "nats", learned.after),
            ("loss taken off by learning", "nats", learned.before - learned.after),
            ("prediction moved, KL(after ‖ before)", "nats", learned.divergence),
        ]
    measures += [(f"surprise, {trace.name}", "‖M(k) − v̂‖", trace.surprise) for trace in reading.memories]
    timeline = _level_lines(reading.levels)
    if reading.learned is not None:
        timeline += _learner_lines(reading.learned)
    return {
        "measures": [{"label": label, "unit": unit, "values": _list(v)} for label, unit, v in measures],
        "moments": reading.moments.tolist(),
        "count": len(reading.tokens),
        "memories": [_memory(trace) for trace in reading.memories],
        "timeline": timeline,
        "units": [] if reading.learned is None else _units(reading.learned),
    }


def _memory(trace: MemoryTrace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "kind": trace.kind,
        "chunk": trace.chunk_size,
        "memories": list(trace.memories),
        "heads": trace.eta.shape[1],
        "starts": _starts(len(trace.eta)).tolist(),
        "rates": {name: _binned(values) for name, values in trace.rates.items()},
        "probes": trace.probes.tolist(),
        "recall": [_list(row) for row in trace.recall],
        "cosine": [_list(row) for row in trace.cosine],
        "singular": {name: _spectrum(values) for name, values in trace.singular_values.items()},
        "distance": [[_list(line) for line in head.T] for head in _heads(trace.distance.swapaxes(1, 2))],
    }


def _starts(count: int) -> NDArray[np.int64]:
    """First token of each bin."""
    return np.unique(np.linspace(0, count, min(count, BINS), endpoint=False).astype(np.int64))


def _binned(values: Array) -> dict[str, Any]:
    """Mean and range of [T, H] in each bin, and the mean of each head."""
    starts = _starts(len(values))
    sizes = np.diff([*starts, len(values)])[:, None]
    per_head = np.add.reduceat(values, starts, axis=0) / sizes
    return {
        "mean": _list(per_head.mean(1)),
        "low": _list(np.minimum.reduceat(values.min(1), starts)),
        "high": _list(np.maximum.reduceat(values.max(1), starts)),
        "heads": [_list(head) for head in per_head.T],
    }


def _heads(values: Array) -> list[Array]:
    """Mean over the heads of [M, H, ...], then each head [M, ...]."""
    return [values.mean(1), *values.swapaxes(0, 1)]


def _spectrum(values: Array) -> list[list[list[float | None]]]:
    """Lines [M] at `SHARES` of the singular values [M, H, n], of the mean over the heads and of each head."""
    last = values.shape[-1] - 1
    chosen = values[..., [round(share * last) for share in SHARES]]
    return [[_list(line) for line in head.T] for head in _heads(chosen)]


def _level_lines(traces: Iterable[LevelTrace]) -> list[dict[str, Any]]:
    """A line per level that learns and layer, and one per level for all layers where it does not."""
    lines: dict[tuple[int | None, int, int], dict[str, Any]] = {}
    for trace in traces:
        key = trace.layer if trace.learns else None, trace.level, trace.chunk_size
        lines.setdefault(key, _level_line(trace))
    return list(lines.values())


def _level_line(trace: LevelTrace) -> dict[str, Any]:
    where = f"layer {trace.layer}, " if trace.learns else ""
    every = f"level {trace.level + 1}, every {trace.chunk_size:,} tokens"
    note = "writes in context" if trace.learns else "written by the optimizer alone, not by reading"
    sizes = _list(trace.sizes) if trace.learns else [None] * len(trace.positions)
    texts = [f"write of norm {_number(size)}" if size is not None else "boundary" for size in sizes]
    label = f"CMS, {where}{every}"
    marks = list(zip(trace.positions.tolist(), sizes, texts, strict=True))
    return {"label": label, "note": note, "marks": marks}


def _learner_lines(learned: LearnedTrace) -> list[dict[str, Any]]:
    lines = []
    for index, line in enumerate(learned.levels):
        marks = [
            (
                write.position - learned.start,
                _rounded(write.gradient_norm) if write.outcome == "written" else None,
                f"{write.outcome}, mean loss {_number(write.loss)}, "
                f"gradient norm {_number(write.gradient_norm)}",
            )
            for write in learned.writes
            if write.level == index
        ]
        note = "height: norm of the summed gradient before clipping"
        lines.append({"label": f"level {index + 1}, {line}", "note": note, "marks": marks})
    return lines


def _by_layer(learned: LearnedTrace) -> list[dict[str, Any]]:
    """Per layer the norm of its weights' change, and each weight's; a share of the largest layer as width."""
    norms = learned.layer_norms
    most = max(norms.values(), default=0.0) or 1.0
    weights: dict[int, list[tuple[str, float, float]]] = {layer: [] for layer in norms}
    for name, layer in learned.layers.items():
        weights[layer].append((name, learned.norms[name], learned.relative[name]))
    return [
        {"layer": layer, "norm": norm, "weights": weights[layer], "share": round(100 * norm / most, 1)}
        for layer, norm in norms.items()
    ]


def _units(learned: LearnedTrace) -> list[dict[str, Any]]:
    """Per layer its hidden units by the norm of their change over all weights with as many of them."""
    found: dict[tuple[int, int], Array] = {}
    for name, norms in learned.units.items():
        key = learned.layers[name], len(norms)
        found[key] = np.hypot(found.get(key, np.zeros(len(norms))), norms)
    lines = []
    for (layer, count), norms in sorted(found.items()):
        order = np.argsort(-norms)[:UNITS]
        label = f"layer {layer}, {count:,} units"
        lines.append({"label": label, "units": order.tolist(), "norms": _list(norms[order])})
    return lines


def _moved(tokens: tuple[str, ...], learned: LearnedTrace) -> list[dict[str, Any]]:
    """Predictions that moved most, as the table has them."""
    return [
        {
            "position": each.position,
            "context": "".join(tokens[max(0, each.position - CONTEXT) : each.position]),
            "token": tokens[each.position],
            "divergence": each.divergence,
            "gain": float(learned.before[each.position] - learned.after[each.position]),
            "before": each.before,
            "after": each.after,
        }
        for each in learned.predictions
    ]


def _list(values: Iterable[Any]) -> list[float | None]:
    return [_rounded(float(value)) for value in values]


def _rounded(value: float) -> float | None:
    """Three digits; None where it is no number, which JSON lacks."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.3g}")
    return int(short) if short == int(short) and abs(short) < 1e6 else short


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
