"""Documents in a row against padding and against full rows: `python -m benchmarks.documents`.

Useful tokens per second of a training step (forward, backward, AdamW), of the same model with

- `full`: rows of one document each, all of the greatest length: nothing is lost;
- `flat`: documents of log-uniform lengths end to end in one row, told apart by `position_ids` (padding-free);
- `packed`: the same documents in rows of the greatest length, by best fit, longest first;
- `padded`: a row for each, padded to the longest, in passes of no more columns than the others have.

All four are timed in turn. `full` has as many tokens as the documents together, to a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import interleaved, parser, record, show
from nested_learning import HopeForCausalLM, preset

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hope-tiny, chunk 32": ("hope-tiny", {}),
    "hope-tiny, chunk 64": (
        "hope-tiny",
        {"mixer_options": {"self_modifying_titans": {"chunk_size": 64, "projection_chunk_size": 64}}},
    ),
    "gated_deltanet, chunk 32": (
        "gated-deltanet-tiny",
        {"mixer_options": {"gated_deltanet": {"chunk_size": 32}}},
    ),
    "gated_deltanet, chunk 64": (
        "gated-deltanet-tiny",
        {"mixer_options": {"gated_deltanet": {"chunk_size": 64}}},
    ),
    "transformer-tiny": ("transformer-tiny", {}),
}


LAYOUTS = ("full", "flat", "packed", "padded")


@dataclass(frozen=True, kw_only=True)
class Size:
    tokens: int = 8192  # of a batch, about
    shortest: int = 32
    longest: int = 1024
    changes: tuple[tuple[str, Any], ...] = ()  # of the configuration, to shrink it


QUICK = Size(tokens=96, shortest=4, longest=32, changes=(("hidden_size", 32), ("num_hidden_layers", 1)))


def draw_lengths(size: Size, seed: int) -> list[int]:
    """Log-uniform lengths of about `size.tokens` together."""
    draw, lengths = np.random.default_rng(seed), list[int]()
    while sum(lengths) < size.tokens:
        lengths.append(int(size.shortest * (size.longest / size.shortest) ** draw.random()))
    return lengths


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of documents, by length: each, longest first, into the row that it fills best."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= room]
        row = max(fitting, key=sum, default=None)
        if row is None:
            rows.append([length])
        else:
            row.append(length)
    return rows


def batch_of(rows: Sequence[Sequence[int]], vocabulary: int) -> dict[str, Tensor]:
    """A batch of rows of documents of these lengths, padded on the right where rows are not equally long."""
    width = max(sum(row) for row in rows)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        positions[i, : sum(row)] = torch.cat([torch.arange(length) for length in row])
        real[i, : sum(row)] = 1
    ids = torch.randint(vocabulary, (len(rows), width))
    batch = {"input_ids": ids, "labels": ids.where((positions > 0) & (real > 0), -100)}
    if not bool(real.all()):
        batch["attention_mask"] = real
    if any(len(row) > 1 for row in rows):
        batch["position_ids"] = positions
    return batch


def step_of(model: HopeForCausalLM, batches: Sequence[dict[str, Tensor]]) -> Callable[[], None]:
    """A function that trains the model for a step on the batches together."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        for batch in batches:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, size: Size, repeats: int, seed: int, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """A row of figures for each layout of the batch that is wanted."""
    base, changes = MODELS[name]
    torch.manual_seed(seed)
    model = HopeForCausalLM(preset(base, **{**changes, **dict(size.changes)})).train()
    lengths = draw_lengths(size, seed)
    layouts = {
        "full": [[size.longest]] * max(1, round(sum(lengths) / size.longest)),
        "flat": [lengths],
        "packed": best_fit(lengths, size.longest),
        "padded": [[length] for length in lengths],
    }
    most = max(1, size.tokens // size.longest)  # rows of a pass
    layouts = {layout: layouts[layout] for layout in wanted}
    steps = {}
    for layout, rows in layouts.items():
        size_of_part = most if layout == "padded" else len(rows)
        parts = [rows[i : i + size_of_part] for i in range(0, len(rows), size_of_part)]
        steps[layout] = step_of(model, [batch_of(part, model.config.vocab_size) for part in parts])
    seconds = interleaved(steps, repeats)
    rate = {layout: sum(map(sum, layouts[layout])) / seconds[layout] for layout in layouts}
    return [
        {
            "model": name,
            "layout": layout,
            "rows": len(rows),
            "documents": sum(map(len, rows)),
            "useful tokens/s": rate[layout],
            **{f"of {other}": rate[layout] / rate[other] for other in ("full", "padded") if other in rate},
        }
        for layout, rows in layouts.items()
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    options.add_argument("--seed", type=int, default=0, help="seed of the lengths")
    options.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, metavar="NAME")
    given = options.parse_args(arguments)
    size, repeats = QUICK if given.quick else Size(), given.repeats or (1 if given.quick else 3)
    rows = [row for name in given.models for row in measure(name, size, repeats, given.seed, given.layouts)]
    show(f"documents in a row, {size}, lengths of seed {given.seed}", rows)
    return record({"size": vars(size), "repeats": repeats, "seed": given.seed, "rows": rows}, given.json)


if __name__ == "__main__":
    main()
