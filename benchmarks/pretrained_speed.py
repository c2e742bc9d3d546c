"""Cost of reading with a pretrained model: `observe` with levels against forward and backward.

python -m benchmarks.pretrained_speed [--model NAME] [--dtypes NAME ...] [--json FILE] [--plot FILE]

Tokens per second without a context and with the default window: three levels of full deltas and of rank 8,
one level with an average, one with sparse writes, both, and the levels of `Learner.auto`; bytes of a user's
memory file. bfloat16 is left out where the processor has no instructions for it.
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
from nested_learning._precision import bfloat16_is_slow
from nested_learning.continual import AUTO, Learner, Level, stack_levels
from nested_learning.evals.methods.pretrained import lacking, load_base
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.report.figures import new_figure, save

WANTED = 0.8  # target: share of the rate of forward and backward
WANTED_OF_ONE = 0.95  # of one level with an average, sparse writes or both
RANK, SPARSE, RATE = 8, 0.05, 0.4
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


def _kinds(chunks: tuple[int, int, int]) -> dict[str, list[Level]]:
    """Levels by the name of their kind, those with targets of their own last."""
    fast, middle, _ = chunks
    average = Level(middle, average_of=0, rate=RATE)
    sparse = Level(fast, 0.01, sparse=SPARSE)
    return {
        "full": [Level(chunk, 0.01) for chunk in chunks],
        f"rank {RANK}": [Level(chunk, 0.01, rank=RANK) for chunk in chunks],
        "auto": [replace(level, chunk_size=fast) for level in AUTO.levels],
        "averaged": [Level(fast, 0.01), average],
        "sparse": [sparse],
        "sparse averaged": [sparse, average],
    }


OF_ONE = ("averaged", "sparse", "sparse averaged")


def _rates(
    base: Any, ids: Tensor, window: int | None, size: Size
) -> tuple[dict[str, float], dict[str, Learner]]:
    """Tokens per second of forward and backward, and of observing with each kind of levels; the learners."""
    kinds = _kinds(size.chunks)
    learners = {name: stack_levels(base, levels=levels, window=window) for name, levels in kinds.items()}

    def plain() -> None:
        loss = base(input_ids=ids, labels=ids, use_cache=False).loss
        torch.autograd.grad(loss, list(base.parameters()))

    works: dict[str, Callable[[], object]] = {"plain": plain}
    works |= {name: lambda learner=learner: learner.observe(ids) for name, learner in learners.items()}
    seconds = interleaved(works, size.repeats, size.warmup)
    return {name: ids.numel() / value for name, value in seconds.items()}, learners


def _measured(model: Any, dtype: str, context: bool, size: Size) -> list[dict[str, Any]]:
    """A row for each kind of levels in one precision, with the default window or without context."""
    base = copy.deepcopy(model).to(DTYPES[dtype])
    fast = size.chunks[0]
    text = torch.randint(base.config.vocab_size, (1, fast), generator=torch.Generator().manual_seed(0))
    rates, learners = _rates(base, text, None if context else fast + 1, size)
    plain = rates.pop("plain")
    rows = []
    for name, rate in rates.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "memory.safetensors"
            learners[name].memory.save(file)
            stored = file.stat().st_size
        rows.append(
            {
                "dtype": dtype,
                "context": "default window" if context else "none",
                "levels": name,
                "tokens/s": rate,
                "of plain": rate / plain,
                "file, MB": stored / 1e6,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument(
        "--model", default=PACKAGED, help="smollm2, random, a folder, or a downloaded name of the hub"
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, help="precisions; default: all fast ones")
    given = options.parse_args(arguments)
    usual = [name for name in DTYPES if name != "bfloat16" or given.quick or not bfloat16_is_slow("cpu")]
    name = RANDOM if given.quick and given.model == PACKAGED else given.model
    problem = lacking(name)
    if problem is not None:
        options.error(problem)
    size = QUICK if given.quick else Size()
    if given.repeats is not None:
        size = replace(size, repeats=given.repeats)
    model = load_base(name).model.to("cpu")
    rows = [
        row
        for dtype in given.dtypes or usual
        for context in (False, True)
        for row in _measured(model, dtype, context, size)
    ]
    show(f"observing with levels of {size.chunks} tokens on all layers of {name}", rows)
    for kind, wanted in (("full", WANTED), *((kind, WANTED_OF_ONE) for kind in OF_ONE)):
        slowest = min(row["of plain"] for row in rows if row["levels"] == kind)
        print(f"{kind}: {slowest:.3f} of the rate of forward and backward or more; wanted {wanted}")
    if given.plot:
        plot(rows, given.plot)
    return record({"model": name, "size": asdict(size), "rows": rows}, given.json)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rates relative to forward and backward, and sizes of the files."""
    figure, [rate, size] = new_figure(2, width=7.0)
    groups = list(dict.fromkeys((row["dtype"], row["context"]) for row in rows))
    kinds = list(dict.fromkeys(row["levels"] for row in rows))
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        of_kind = [row for row in rows if row["levels"] == kind]
        places = [place + width * index for place in range(len(of_kind))]
        rate.bar(places, [row["of plain"] for row in of_kind], width, label=kind)
        size.bar(places, [row["file, MB"] for row in of_kind], width, label=kind)
    for axis in (rate, size):
        names = [f"{dtype}\n{context}" for dtype, context in groups]
        axis.set_xticks([place + 0.4 for place in range(len(groups))], names, fontsize="small")
    rate.axhline(WANTED, color="grey", linestyle=":")
    rate.set_ylabel("tokens/s, of forward and backward")
    size.set_ylabel("file, MB")
    size.set_yscale("log")
    rate.legend(loc="lower right")
    save(figure, path)


if __name__ == "__main__":
    main()
