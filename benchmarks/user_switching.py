"""Time from one user to another on one base model: loading a memory file, and putting it in force.

python -m benchmarks.user_switching [--json FILE] [--model NAME]

Two users of a random model of SmolLM2-135M's shape take turns: `memory.load(file)`, then `active()` is
entered and left. For `Learner.auto`, three levels of rank 8, and one level of full deltas.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.harness import interleaved, parser, record, show
from nested_learning.continual import Learner, Level, stack_levels
from nested_learning.evals.methods.pretrained import lacking, load_base

WANTED = 0.2  # target: seconds
REPEATS = 7
SHAPED = "shaped"


def shaped_model(quick: bool) -> Any:
    """A Llama of SmolLM2-135M's shape (a tiny one if `quick`) with random weights, in bfloat16."""
    config = LlamaConfig(
        vocab_size=128 if quick else 49152,
        hidden_size=36 if quick else 576,
        intermediate_size=96 if quick else 1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def learners(model: Any, quick: bool) -> dict[str, Learner]:
    """Learners to switch users of; windows of the default size, which are full but for a token."""
    chunks = (16, 32, 64) if quick else (256, 384, 512)
    rank = 2 if quick else 8
    return {
        "Learner.auto": Learner.auto(model, rank=rank, chunk_size=chunks[0]),
        f"three levels of rank {rank}": stack_levels(
            model, levels=[Level(chunk, 0.01, rank=rank) for chunk in chunks]
        ),
        "one level, full": stack_levels(model, levels=[Level(chunks[0], 0.01)]),
    }


def _files(learner: Learner, tokens: int, folder: Path) -> list[Path]:
    """Memory files of two users who have read that many tokens."""
    paths = []
    for user in range(2):
        learner.memory.reset()
        generator = torch.Generator().manual_seed(user)
        learner.observe(torch.randint(learner.model.config.vocab_size, (tokens,), generator=generator))
        paths.append(folder / f"{user}.safetensors")
        learner.memory.save(paths[-1])
    return paths


def _work(learner: Learner, paths: Iterator[Path], enter: bool) -> Callable[[], object]:
    def switch() -> None:
        learner.memory.load(next(paths))
        if enter:
            with learner.active():
                pass

    return switch


def measured(model: Any, tokens: int, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a switch and bytes of a file for each learner."""
    with tempfile.TemporaryDirectory() as name:
        works: dict[str, Callable[[], object]] = {}
        rows = []
        for kind, learner in learners(model, quick).items():
            folder = Path(name) / str(len(rows))
            folder.mkdir()
            paths = _files(learner, tokens, folder)
            for enter in (False, True):
                works[f"{kind}{enter}"] = _work(learner, itertools.cycle(paths), enter)
            size = paths[0].stat().st_size
            rows.append({"learner": kind, "file bytes": size, "tokens in the window": tokens})
        seconds = interleaved(works, repeats)
    for row in rows:
        row["load, s"] = seconds[f"{row['learner']}False"]
        row["load and activate, s"] = seconds[f"{row['learner']}True"]
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument(
        "--model", default=SHAPED, help="shaped (random weights), smollm2, a folder, or a downloaded name"
    )
    given = options.parse_args(arguments)
    if given.model == SHAPED:
        model = shaped_model(given.quick)
    else:
        problem = lacking(given.model)
        if problem is not None:
            options.error(problem)
        model = load_base(given.model).model.to("cpu")
    tokens = 63 if given.quick else 1023
    rows = measured(model, tokens, given.repeats or REPEATS, given.quick)
    show(f"switching users of {given.model}", rows)
    print(f"{rows[0]['learner']}: {rows[0]['load and activate, s']:.3f} s; wanted {WANTED} s or less")
    return record({"model": given.model, "rows": rows, "wanted, s": WANTED}, given.json)


if __name__ == "__main__":
    main()
