"""The command `nested-learning train`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from nested_learning.cli.output import print_json, print_positions, print_table, program, say
from nested_learning.cli.parsing import DATA_ALIASES, hide_group_flags, new_parser, parse
from nested_learning.training.config import TrainConfig
from nested_learning.training.config_file import (
    OPEN_FIELDS,
    instantiate,
    refuse_changes,
)

if TYPE_CHECKING:
    from nested_learning.training.run import Outcome

ALIASES = {**DATA_ALIASES, "--lr": "--optim.lr"}
DESCRIPTION = """\
Train a causal language model on text.

The model comes from a preset, changed by `--model.KEY VALUE`; every setting can stand in a YAML file
too (--config), flags go before it. Short flags: --data, --tokenizer, --block_size, --lr.

--data takes a text file, a folder or a glob, and files with a document in each row: .jsonl, .json, .csv,
.tsv, .parquet; compressed as .gz, .bz2, .xz too. --data.text_column says which column has the text.

The folder --output then holds model/ (for from_pretrained), result.json, loss.png, config.yaml,
checkpoints/ and tensorboard/. Interrupted by Ctrl-C or SIGTERM, a run saves a checkpoint and --resume
goes on with it. Several processes: torchrun --nproc_per_node 2 -m nested_learning train ...

With --data.carry_state true each row of the batch reads document after document, block by block, and
keeps its state; result.json and positions.png then have the loss by position in the document.
With --memory_tokens 512 memories.jsonl, memories.png and TensorBoard have what the first tokens of the
validation text leave in each memory, at every evaluation.

examples:
  nested-learning train --max_minutes 3 --output runs/first
  nested-learning train --data 'pages/*.jsonl.gz' --data.text_column body --output runs/pages
  nested-learning train --preset transformer-tiny --data book.txt --steps 500 --lr 1e-2 --output runs/book
  nested-learning train --data.carry_state true --data.score_length 16384 --output runs/long
  nested-learning train --output runs/book --resume

exit codes: 0 done, 1 the loss became NaN or infinite, 2 bad input, 130 and 143 interrupted
"""


def run(argv: list[str]) -> int:
    """Parse, train, print. Returns the exit code."""
    config, values = parse_train(argv)
    from accelerate import PartialState

    from nested_learning.training.run import TrainingDiverged, train

    try:
        outcome = train(config, resume=values.resume, overwrite=values.overwrite)
    except TrainingDiverged as error:
        say(f"error: {error}")
        return 1
    PartialState().destroy_process_group()  # the group that torchrun made; a single process has none
    if outcome.signal is not None:
        return _interrupted(outcome)
    if outcome.result is not None:  # only the first of several processes has it
        print_json(outcome.result) if values.json else _print(outcome.result)
    return 0


def parse_train(argv: list[str]) -> tuple[TrainConfig, Namespace]:
    """(the configuration, all values) of the command line; with --resume the configuration of the run."""
    parser = new_parser("train", "", DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone on stdout")
    parser.add_class_arguments(TrainConfig, None)
    hide_group_flags(parser, ALIASES)
    values = parse(parser, argv, aliases=ALIASES, open_groups=OPEN_FIELDS)
    if not values.resume:
        return instantiate(parser, values), values
    from nested_learning.training.run_folder import RunFolder

    folder = RunFolder(values.output)
    if not folder.is_run():
        return instantiate(parser, values), values
    saved = folder.saved_config()
    given = parse(parser, argv, aliases=ALIASES, open_groups=OPEN_FIELDS, defaults=False)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    refuse_changes(saved, {key: value for key, value in given.as_dict().items() if key in fields})
    saved.output = values.output
    return saved, values


def _interrupted(outcome: Outcome) -> int:
    assert outcome.signal is not None
    say(f"interrupted; a checkpoint is saved in {outcome.checkpoint}")
    say(f"go on with: {program()} train --output {shlex.quote(str(outcome.folder.path))} --resume")
    return 128 + outcome.signal


def _print(result: dict[str, Any]) -> None:
    before, after = result["validation"]["before"], result["validation"]["after"]
    speed = result["tokens_per_second"]
    rows = [
        ("validation before (bits per byte)", f"{before['bits_per_byte']:.3f}"),
        ("validation after (bits per byte)", f"{after['bits_per_byte']:.3f}"),
        ("validation after (nats per token)", f"{after['nats_per_token']:.3f}"),
        ("optimizer steps", f"{result['steps']:,}"),
        ("training tokens", f"{result['tokens']:,}"),
        ("tokens per second", "-" if speed is None else f"{speed:,.0f}"),
        ("parameters", f"{result['parameters']:,}"),
        ("peak memory (MiB)", f"{result['peak_memory']['bytes'] / 2**20:,.0f}"),
    ]
    config, files = result["config"], result["files"]
    print_table(f"{config['preset']} on {config['data']['source']}", ("", "value"), rows)
    if result["positions"]:
        for mode in result["positions"]["nats_per_token"]:
            print_positions(mode, {config["preset"]: result["positions"]})
    if result["sample"]:
        print("\nsample, after a prompt from the validation text (before the mark |):")
        print(f"{result['sample']['prompt']}|{result['sample']['text']}")
    print(f"\nmodel   {files['model']}\nresult  {files['result']}\nplot    {files['plot']}")
    print(f"\ngenerate more:\n  {program()} generate {shlex.quote(files['model'])} --prompt 'The '")
