"""`nested-learning train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_learning.cli.output import print_json, print_table, say
from nested_learning.training.config import TrainConfig
from nested_learning.training.config_file import build_parser, expand_aliases, parse_flags
from nested_learning.training.run_folder import RunFolder

if TYPE_CHECKING:
    from nested_learning.training.run import Outcome

DESCRIPTION = """Train a causal language model on text.

The model comes from a preset, changed by `--model.KEY VALUE`; every setting can stand in a YAML file too
(--config), with flags taking precedence. The run's folder then holds model/ (for from_pretrained),
result.json, loss.png, config.yaml, checkpoints/ and tensorboard/. Interrupted by Ctrl-C or SIGTERM, a run
saves a checkpoint first; --resume goes on with it.

examples:
  nested-learning train --max_minutes 3 --output runs/first
  nested-learning train --preset transformer-tiny --data book.txt --steps 500 --lr 3e-3 --output runs/book
  nested-learning train --output runs/book --resume
"""


def run(argv: list[str]) -> int:
    """Parse, train, print. Returns the exit code."""
    argv = expand_aliases(argv)
    config, values = _parse(argv)
    from nested_learning.training.run import TrainingDiverged, train

    try:
        outcome = train(config, resume=values.resume, overwrite=values.overwrite, progress=not values.quiet)
    except TrainingDiverged as error:
        say(f"error: {error}")
        return 1
    if outcome.signal is not None:
        return _interrupted(outcome)
    if outcome.result is not None:  # only the first of several processes has it
        print_json(outcome.result) if values.json else _print(outcome.result)
    return 0


def _parse(argv: list[str]) -> tuple[TrainConfig, Any]:
    parser = build_parser("nested-learning train", DESCRIPTION)
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, alone on stdout"
    )
    config, values = parse_flags(parser, argv)
    if values.resume and not values.overwrite and values.config is None:
        folder = RunFolder(config.output)
        if folder.is_run():  # the run's own settings are the defaults of a resumed run
            config, values = parse_flags(parser, ["--config", str(folder.config), *argv])
    return config, values


def _interrupted(outcome: Outcome) -> int:
    assert outcome.signal is not None
    output = shlex.quote(str(outcome.folder.path))
    say(f"interrupted; checkpoint saved in {outcome.checkpoint}")
    say(f"go on with: nested-learning train --output {output} --resume")
    return 128 + outcome.signal


def _print(result: dict[str, Any]) -> None:
    before, after = result["validation"]["before"], result["validation"]["after"]
    memory = result["peak_memory"]
    rows = [
        ("validation before, bits per byte", f"{before['bits_per_byte']:.3f}"),
        ("validation after, bits per byte", f"{after['bits_per_byte']:.3f}"),
        ("validation after, nats per token", f"{after['nats_per_token']:.3f}"),
        ("steps", f"{result['steps']:,}"),
        ("tokens", f"{result['tokens']:,}"),
        ("tokens per second", f"{result['tokens_per_second']:,.0f}" if result["tokens_per_second"] else "-"),
        ("parameters", f"{result['parameters']:,}"),
        ("peak memory, MiB", f"{memory['bytes'] / 2**20:,.0f}"),
    ]
    config = result["config"]
    print_table(f"{config['preset']} on {config['data']['source']}", ("", "value"), rows)
    if result["sample"]:
        print(f"\nsample (the first {len(result['sample']['prompt'])} characters are the prompt):")
        print(result["sample"]["prompt"] + result["sample"]["text"])
    files = result["files"]
    print(f"\nmodel   {files['model']}\nresult  {files['result']}\nplot    {files['plot']}")
    print(f"\ngenerate more:\n  {_generate_command(Path(files['model']))}")


def _generate_command(model: Path) -> str:
    return f"nested-learning generate {shlex.quote(str(model))} --prompt 'The '"
