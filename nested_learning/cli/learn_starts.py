"""`nested-learning adapt --learn_starts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nested_learning._checks import require
from nested_learning.cli.level_flags import add_anchor_flags, add_level_flags, levels_and_starts
from nested_learning.cli.output import human_bytes, print_json, print_table, say
from nested_learning.cli.parsing import new_parser, parse

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from nested_learning.continual.starts.starts import Starts

DESCRIPTION = """\
Learn a rate and a start for each matrix that the levels on a model write to; the model stays as it is.

Every text of --block_size tokens is read in chunks, each scored before it is learned, from the starts so far,
which then take a step that makes these losses smaller. What was best on the held-out texts is written to
--output, for `--starts` of chat, serve, lens and adapt, where the levels are then those of the file. Texts
should be longer than the slowest chunk.

examples:
  nested-learning adapt --model my-model --learn_starts books/ --output starts.safetensors
  nested-learning adapt --model my-model --learn_starts books/ --exact --window 512 --output s.safetensors
"""


def run(argv: list[str]) -> int:
    """Parse, learn, write, print. Returns the exit code."""
    values = parse(_parser(), argv)
    for name in ("steps", "batch_size", "held_out"):
        require(values[name] >= 1, name, values[name], "a whole number of at least 1")
    levels, begins = levels_and_starts(values, argv)

    from nested_learning._files import writable
    from nested_learning._progress import progress
    from nested_learning.cli.dialogue import load_pretrained
    from nested_learning.continual import learn_starts, stack_levels
    from nested_learning.continual.objectives.anchor_files import AnchorFiles
    from nested_learning.continual.starts.learn import StartsDiverged
    from nested_learning.training.data import DataConfig, build_data
    from nested_learning.training.models import saved_folder

    files = AnchorFiles(values.background, values.fisher)
    writable(values.output)  # refused before a long run
    folder = str(saved_folder(values.model))
    config = DataConfig(
        source=values.learn_starts,
        tokenizer=folder,
        block_size=values.block_size,
        max_validation_blocks=values.held_out,
        seed=values.seed,
    )
    data = build_data(config, values.steps * values.batch_size)
    model, tokenizer = load_pretrained(folder)
    anchors = files.of(model, tokenizer, levels)
    learner = stack_levels(model, tokenizer, levels=levels, window=values.window, starts=begins, **anchors)
    try:
        with progress("learning starts", values.steps, "step") as bar:

            def show(step: int, loss: float) -> None:
                bar.note = f", loss {loss:.3f}"
                bar.advance()

            found = learn_starts(
                learner,
                [data.train[i]["input_ids"] for i in range(values.steps * values.batch_size)],
                steps=values.steps,
                exact=values.exact,
                rank=values.start_rank or None,
                lr_rates=values.lr_rates,
                lr_starts=values.lr_starts,
                batch_size=values.batch_size,
                held_out=[data.validation[i]["input_ids"] for i in range(len(data.validation))],
                seed=values.seed,
                progress=show,
            )
    except StartsDiverged as error:
        say(f"error: {error}")
        return 1
    if values.bfloat16:
        import torch

        found = found.rounded(torch.bfloat16)
    found.save(values.output)
    _print(found, values)
    return 0


def _parser() -> ArgumentParser:
    parser = new_parser("adapt", "--model MODEL --learn_starts SOURCE --output FILE ", DESCRIPTION)
    parser.add_argument("--model", type=str, required=True, help="folder of the model and its tokenizer")
    parser.add_argument(
        "--learn_starts", type=str, required=True, metavar="SOURCE", help="text: a file, a folder or a glob"
    )
    parser.add_argument("--output", type=str, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--steps", type=int, default=100, help="steps of Adam on rates and starts")
    parser.add_argument("--batch_size", type=int, default=1, help="texts per step")
    parser.add_argument("--block_size", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--window", type=int, help="positions of the attention context; default: 1,024")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="differentiate through the writes of a window",
    )
    parser.add_argument(
        "--start_rank", type=int, default=8, help="rank of the starts of full deltas; 0 for whole matrices"
    )
    parser.add_argument(
        "--lr_rates", type=float, default=0.05, help="Adam's rate for the rates; 0: leave them"
    )
    parser.add_argument("--lr_starts", type=float, default=3e-4, help="Adam's rate for starts; 0: none")
    parser.add_argument("--held_out", type=int, default=8, help="texts on which the best step is chosen")
    parser.add_argument("--bfloat16", action="store_true", help="half the file, starts rounded to 8 bits")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the texts")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone on stdout")
    add_level_flags(parser, chunk_sizes=(64, 256, 1024), level_lr=0.1)
    add_anchor_flags(parser)
    return parser


def _print(found: Starts, values: Namespace) -> None:
    held_out = found.report["held_out"]
    best_step, best = min((pair for pair in held_out if pair[1] is not None), key=lambda pair: pair[1])
    rates = [rate for level in found.levels for rate in level.rates.values()]
    if values.json:
        result: dict[str, Any] = {"file": values.output, "sum": found.digest, "best_step": best_step}
        print_json({**result, "smallest_rate": min(rates), "largest_rate": max(rates), **found.report})
        return
    rows = [
        ("held-out loss before (nats per token)", f"{held_out[0][1]:.4f}"),
        (f"held-out loss at step {best_step}, the best", f"{best:.4f}"),
        ("rates, times those of the levels", f"{min(rates):.3g} to {max(rates):.3g}"),
        ("starts", human_bytes(found.nbytes)),
    ]
    print_table(f"starts in {values.output}", ("", "value"), rows)
