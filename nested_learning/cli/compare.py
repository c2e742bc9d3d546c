"""The command `nested-learning compare`."""

from __future__ import annotations

from typing import Any

from nested_learning.cli.output import human_bytes, print_json, print_positions, print_table, say
from nested_learning.cli.parsing import DATA_ALIASES, hide_group_flags, new_parser, parse
from nested_learning.training.config import OptimConfig
from nested_learning.training.data.config import DataConfig

DESCRIPTION = """\
Train two or more models on the same batches, one step of each in turn, and tabulate the results.

MODEL is a preset or a training YAML (its keys `preset` and `model`, and the optimizers that it names), as it
is or with an optimizer, MODEL:OPTIMIZER. Each is trained with every --lr and every seed of --seeds; the
table has, per model, the learning rate with the best mean validation loss. With --cache FOLDER finished runs
are kept there, and an interrupted or a larger comparison goes on from them.
Speeds are medians over all steps, relative to the last model. Memory is that of a training step, measured
for each model alone in a fresh process. Short flags: --data, --tokenizer, --block_size.

example:
  nested-learning compare hope-tiny transformer-tiny --data tinyshakespeare --steps 200 --lr 3e-3 1e-2
  nested-learning compare hope-tiny hope-tiny:m3 configs/slow-mid-fast.yaml --seeds 0 1 2 --cache runs/kept
"""


def run(argv: list[str]) -> int:
    """Parse, compare, print. Returns the exit code."""
    parser = new_parser("compare", "MODEL MODEL ... ", DESCRIPTION)
    parser.add_argument(
        "models", nargs="+", type=str, help="presets or training YAMLs, or one of these:optimizer"
    )
    parser.add_argument("--lr", nargs="+", type=float, default=[3e-3], help="peak learning rates to try")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="seeds of initialisation and data order"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences per step")
    parser.add_argument(
        "--validation_batches", type=int, default=20, help="batches of the validation at the end"
    )
    parser.add_argument("--no_memory", action="store_true", help="do not measure memory")
    parser.add_argument("--cache", type=str, help="folder that keeps finished runs, to go on from them")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, alone on stdout")
    parser.add_class_arguments(DataConfig, "data", skip={"max_validation_blocks"})
    parser.add_class_arguments(OptimConfig, "optim", skip={"lr"})
    parser.set_defaults({"optim.schedule": "linear"})
    hide_group_flags(parser, DATA_ALIASES)
    values = parse(parser, argv, aliases=DATA_ALIASES)

    from nested_learning.training.compare import CompareConfig, compare

    config = CompareConfig(
        models=values.models,
        data=DataConfig(**values.data.as_dict()),
        optim=OptimConfig(**values.optim.as_dict()),
        lrs=values.lr,
        seeds=values.seeds,
        steps=values.steps,
        batch_size=values.batch_size,
        validation_batches=values.validation_batches,
        memory=not values.no_memory,
        cache=values.cache,
    )
    if len(config.models) < 2:
        raise ValueError(f"got one model, {config.models[0]!r}; expected two or more to compare")
    result = compare(config)
    print_json(result) if values.json else _print(result)
    return 0


COLUMNS = (
    "model",
    "parameters",
    "best lr",
    "nats/token",
    "bits/byte",
    "ms/step",
    "tokens/s",
    "relative",
    "memory",
)


def _print(result: dict[str, Any]) -> None:
    config, models = result["config"], result["models"]
    shape = f"{config['steps']} steps of {config['batch_size']} x {config['data']['block_size']} tokens"
    title = f"{config['data']['source']}, {shape}, mean of {len(config['seeds'])} seed(s)"
    print_table(title, COLUMNS, [_row(model) for model in models])
    rates = [_rate_row(model, rate) for model in models for rate in model["rates"]]
    if len(rates) > len(models):
        print()
        print_table("every learning rate (* the best)", ("model", "lr", "nats/token", "diverged"), rates)
    scores = {model["model"]: model["positions"] for model in models if model["positions"]}
    for mode in next(iter(scores.values()))["nats_per_token"] if scores else ():
        print_positions(mode, scores)
    if any(model["step_memory_bytes"] for model in models):
        say("memory: of a training step, alone in a fresh process; on a CPU growth of the resident set")


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    seconds, memory = model["median_step_seconds"], model["step_memory_bytes"]
    return (
        model["model"],
        f"{model['parameters']:,}",
        _number(model["best_lr"], "g"),
        _number(model["nats_per_token"], ".4f"),
        _number(model["bits_per_byte"], ".4f"),
        _number(seconds and seconds * 1e3, ".1f"),
        _number(model["tokens_per_second"], ",.0f"),
        _number(model["relative_speed"], ".2f"),
        "-" if memory is None else human_bytes(memory),
    )


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _rate_row(model: dict[str, Any], rate: dict[str, Any]) -> tuple[str, ...]:
    mark = "*" if rate["lr"] == model["best_lr"] else " "
    loss = _number(rate["nats_per_token"], ".4f")
    return model["model"], f"{rate['lr']:g}{mark}", loss, f"{rate['diverged']} of {rate['seeds']}"
