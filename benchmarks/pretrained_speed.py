"""Cost of reading with a pretrained model: `observe` with three levels against forward and backward.

python -m benchmarks.pretrained_speed [--model NAME] [--json FILE] [--plot FILE]

Tokens per second in bfloat16 and float32, with full deltas and such of rank 8, without a context and with the
default window; bytes of a user's memory file.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved, parser, record, show
from nested_learning.continual import Learner, Level, stack_levels
from nested_learning.evals.methods.pretrained import lacking, load_base
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.report.figures import new_figure, save

WANTED = 0.8  # target: share of the rate of forward and backward
RANK = 8
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Size:
    """Sizes of the text that is read, and numbers of timed chunks.

    Args:
        chunks: tokens between two writes of the levels, fast to slow; a chunk of the fastest is timed.
        repeats: timed chunks. With the warm-up, they reach the boundary of the slowest level.
        warmup: chunks before the timed ones.
    """

    chunks: tuple[int, int, int] = (512, 2048, 8192)
    repeats: int = 14
    warmup: int = 2


QUICK = Size(chunks=(16, 32, 64), repeats=3, warmup=1)


def _levels(size: Size, rank: int | None) -> list[Level]:
    return [Level(chunk, 0.01, rank=rank) for chunk in size.chunks]


def _rates(
    base: Any, ids: Tensor, window: int | None, size: Size
) -> tuple[dict[str, float], dict[str, Learner]]:
    """Tokens per second of forward and backward, and of observing, full deltas and low rank; the learners."""
    learners = {
        "full": stack_levels(base, levels=_levels(size, None), window=window),
        f"rank {RANK}": stack_levels(base, levels=_levels(size, RANK), window=window),
    }

    def plain() -> None:
        loss = base(input_ids=ids, labels=ids, use_cache=False).loss
        torch.autograd.grad(loss, list(base.parameters()))

    works: dict[str, Callable[[], object]] = {"plain": plain}
    works |= {name: lambda learner=learner: learner.observe(ids) for name, learner in learners.items()}
    seconds = interleaved(works, size.repeats, size.warmup)
    return {name: ids.numel() / value for name, value in seconds.items()}, learners


def _measured(model: Any, dtype: str, context: bool, size: Size) -> dict[str, Any]:
    """Rates in one precision, with the default window or without context, and the size of a user's file."""
    base = copy.deepcopy(model).to(DTYPES[dtype])
    fast = size.chunks[0]
    text = torch.randint(base.config.vocab_size, (1, fast), generator=torch.Generator().manual_seed(0))
    rates, learners = _rates(base, text, None if context else fast + 1, size)
    found: dict[str, Any] = {"plain, tokens/s": rates.pop("plain")}
    for name, rate in rates.items():
        found |= {f"{name}, tokens/s": rate, f"{name}, of plain": rate / found["plain, tokens/s"]}
        learner = learners[name]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "memory.safetensors"
            learner.memory.save(file)
            found[f"{name}, file bytes"] = file.stat().st_size
    found["base bytes"] = sum(p.numel() * p.element_size() for p in base.parameters())
    found["tokens read"] = learner.memory.rows[0].position
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument(
        "--model", default=PACKAGED, help="smollm2, random, a folder, or a downloaded name of the hub"
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    given = options.parse_args(arguments)
    name = RANDOM if given.quick and given.model == PACKAGED else given.model
    problem = lacking(name)
    if problem is not None:
        options.error(problem)
    size = QUICK if given.quick else Size()
    if given.repeats is not None:
        size = replace(size, repeats=given.repeats)
    model = load_base(name).model.to("cpu")
    rows = [
        {
            "dtype": dtype,
            "context": "default window" if context else "none",
            **_measured(model, dtype, context, size),
        }
        for dtype in DTYPES
        for context in (False, True)
    ]
    show(f"observing with levels of {size.chunks} tokens on all layers of {name}", rows)
    slowest = min(row["full, of plain"] for row in rows)
    print(f"full deltas: {slowest:.2f} of the rate of forward and backward or more; wanted {WANTED}")
    if given.plot:
        plot(rows, given.plot)
    return record({"model": name, "size": asdict(size), "rows": rows}, given.json)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rates relative to forward and backward, and sizes of the files."""
    figure, [rate, size] = new_figure(2, width=5.0)
    kinds = ("full", f"rank {RANK}")
    for index, kind in enumerate(kinds):
        places = [place + 0.4 * index for place in range(len(rows))]
        rate.bar(places, [row[f"{kind}, of plain"] for row in rows], 0.4, label=kind)
        size.bar(places, [row[f"{kind}, file bytes"] / 1e6 for row in rows], 0.4, label=kind)
    for axis in (rate, size):
        names = [f"{row['dtype']}\n{row['context']}" for row in rows]
        axis.set_xticks([place + 0.2 for place in range(len(rows))], names, fontsize="small")
    rate.axhline(WANTED, color="grey", linestyle=":")
    rate.set_ylabel("tokens/s, of forward and backward")
    size.set_ylabel("file, MB")
    size.set_yscale("log")
    rate.legend(loc="lower right")
    save(figure, path)


if __name__ == "__main__":
    main()
