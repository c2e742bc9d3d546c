"""`nested-learning adapt`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from nested_learning.cli.level_flags import STARTS, add_level_flags, given_flags, levels_and_starts
from nested_learning.cli.output import print_json, print_table, program, say
from nested_learning.cli.parsing import hide_group_flags, new_parser, parse
from nested_learning.training.adapt_config import AdaptConfig

if TYPE_CHECKING:
    from nested_learning.continual.level import Level

ALIASES = {"--data": "--data.source", "--block_size": "--data.block_size", "--lr": "--optim.lr"}
DESCRIPTION = """\
Continue the pre-training of a model while levels of its MLPs learn in context.

Every text of --block_size tokens is read in chunks, from empty deltas; the levels write at their
boundaries, and the base model is trained on the losses with these deltas in force (first order). So the
model gets used to being changed as it reads. Texts should be longer than the slowest chunk. Short flags:
--data, --block_size, --lr (of the base model).

examples:
  nested-learning adapt --model SmolLM2-135M --data books/ --steps 500 --output runs/adapted
  nested-learning adapt --output runs/adapted --resume

With --learn_starts SOURCE the model stays as it is, and a rate and a start for each matrix that the levels
write to are learned instead: see `nested-learning adapt --learn_starts SOURCE --help`.

exit codes: 0 done, 1 the loss became NaN or infinite, 2 bad input, 130 and 143 interrupted
"""
OWN_FLAGS = {"output", "resume", "overwrite", "json"}


def run(argv: list[str]) -> int:
    """Parse, adapt, print. Returns the exit code."""
    if "learn_starts" in given_flags(argv):
        from nested_learning.cli import learn_starts

        return learn_starts.run(argv)
    config, levels, values = _parse(argv)
    from nested_learning.training.adapt import adapt
    from nested_learning.training.run import TrainingDiverged

    try:
        outcome = adapt(config, levels, resume=values.resume, overwrite=values.overwrite)
    except TrainingDiverged as error:
        say(f"error: {error}")
        return 1
    if outcome.signal is not None:
        say(f"interrupted; a checkpoint is saved in {outcome.checkpoint}")
        say(f"go on with: {program()} adapt --output {shlex.quote(str(outcome.folder.path))} --resume")
        return 128 + outcome.signal
    assert outcome.result is not None
    print_json(outcome.result) if values.json else _print(outcome.result)
    return 0


def _parse(argv: list[str]) -> tuple[AdaptConfig, list[Level], Namespace]:
    parser = new_parser("adapt", "--model MODEL ", DESCRIPTION)
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone on stdout")
    parser.add_class_arguments(AdaptConfig, None, skip={STARTS})  # one of the flags of levels
    add_level_flags(parser, chunk_sizes=(64, 256, 1024), level_lr=0.1)
    hide_group_flags(parser, ALIASES)
    if "--resume" in argv:
        return _resumed(argv)
    values = parse(parser, argv, aliases=ALIASES)
    if "data.documents" in given_flags(argv) and values.data.documents == "marked":
        raise ValueError(
            "data.documents is 'marked', but what levels learn of a text is in force in all of it, whatever "
            "documents it holds; leave it out"
        )
    built = parser.instantiate(values)
    fields = AdaptConfig.__dataclass_fields__
    levels, _ = levels_and_starts(values, argv)
    return AdaptConfig(**{name: built[name] for name in fields}), list(levels), values


def _resumed(argv: list[str]) -> tuple[AdaptConfig, list[Level], Namespace]:
    from nested_learning.training.adapt import saved_run

    parser = new_parser("adapt", "--resume --output OUTPUT ", "A resumed run keeps all its settings.")
    parser.add_argument("--output", type=str, required=True, help="folder of the run")
    for flag in sorted(OWN_FLAGS - {"output"}):
        parser.add_argument(f"--{flag}", action="store_true")
    values = parse(parser, argv)
    if values.overwrite:
        raise ValueError("got both --resume and --overwrite; expected one: go on with the run or replace it")
    return *saved_run(values.output), values


def _print(result: dict[str, Any]) -> None:
    validation, speed = result["validation"], result["tokens_per_second"]
    rows = [
        ("validation before, with levels (nats per token)", f"{validation['with_levels_before']:.4f}"),
        ("validation after, with levels", f"{validation['with_levels_after']:.4f}"),
        ("validation after, without levels", f"{validation['without_levels_after']:.4f}"),
        ("optimizer steps", f"{result['steps']:,}"),
        ("tokens per second", "-" if speed is None else f"{speed:,.0f}"),
    ]
    print_table(f"{result['config']['model']} on {result['config']['data']['source']}", ("", "value"), rows)
    print(f"\nmodel   {result['files']['model']}\nresult  {result['files']['result']}")
