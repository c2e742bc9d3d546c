"""The command `nested-learning compare`."""

from __future__ import annotations

from typing import Any

from nested_learning._checks import require
from nested_learning.cli.output import human_bytes, print_json, print_positions, print_table, say
from nested_learning.cli.parsing import DATA_ALIASES, hide_group_flags, new_parser, parse
from nested_learning.training.config import OptimConfig
from nested_learning.training.data.config import DataConfig
from nested_learning.training.grid import described, parse_grid

DESCRIPTION = """\
Train two or more models on the same batches, one step of each in turn, and tabulate the results.

MODEL is a preset or a training YAML (its keys `preset` and `model`, and the optimizers that it names), as it
is or with an optimizer, MODEL:OPTIMIZER. Each is trained with every --lr and every seed of --seeds; the
table has, per model, the learning rate with the best mean validation loss. With --cache FOLDER finished runs
are kept there, and an interrupted or a larger comparison goes on from them.
With --grid every model finds its own setting: it tries all of the grid at --tuning_seed, a seed of its own,
and runs --seeds with the best. One model alone will do then. KEY is optim.lr, another field of optim, or
model.FIELD. --budget_minutes bounds the runs: what does not fit is left out, for all models alike, and named.
Speeds are medians over all steps, relative to the last model. Memory is that of a training step, measured
for each model alone in a fresh process. Short flags: --data, --tokenizer, --block_size.

example:
  nested-learning compare hope-tiny transformer-tiny --data tinyshakespeare --steps 200 --lr 3e-3 1e-2
  nested-learning compare hope-tiny hope-tiny:m3 configs/slow-mid-fast.yaml --seeds 0 1 2 --cache runs/kept
  nested-learning compare hope-tiny transformer-tiny --grid 'optim.lr=3e-3,1e-2;optim.weight_decay=0,0.1' \\
      --seeds 0 1 2 --budget_minutes 60 --cache runs/kept
"""


def run(argv: list[str]) -> int:
    """Parse, compare, print. Returns the exit code."""
    parser = new_parser("compare", "MODEL [MODEL ...] ", DESCRIPTION)
    parser.add_argument(
        "models", nargs="+", type=str, help="presets or training YAMLs, or one of these:optimizer"
    )
    parser.add_argument("--lr", nargs="+", type=float, help="peak learning rates to try (default: 3e-3)")
    parser.add_argument("--grid", type=str, help="settings to try: KEY=VALUE,VALUE;KEY=VALUE,VALUE")
    parser.add_argument("--tuning_seed", type=int, help="seed at which the grid is tried (default: 1000)")
    parser.add_argument("--budget_minutes", type=float, help="time for all runs of a grid")
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
    grid = {} if values.grid is None else parse_grid(values.grid)
    if "optim.lr" in grid:
        require(values.lr is None, "lr", values.lr, "nothing beside a grid that has optim.lr")

    from nested_learning.training.compare import CompareConfig, compare

    config = CompareConfig(
        models=values.models,
        data=DataConfig(**values.data.as_dict()),
        optim=OptimConfig(**values.optim.as_dict()),
        lrs=values.lr or [3e-3],
        seeds=values.seeds,
        grid=grid,
        tuning_seed=values.tuning_seed,
        budget_minutes=values.budget_minutes,
        steps=values.steps,
        batch_size=values.batch_size,
        validation_batches=values.validation_batches,
        memory=not values.no_memory,
        cache=values.cache,
    )
    if len(config.models) < 2 and not grid:
        raise ValueError(
            f"got one model, {config.models[0]!r}; expected two or more to compare, or a --grid to search"
        )
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
    if result["search"] is not None:
        _print_search(result)
    elif len(rates) > len(models):
        print()
        print_table("every learning rate (* the best)", ("model", "lr", "nats/token", "diverged"), rates)
    scores = {model["model"]: model["positions"] for model in models if model["positions"]}
    for mode in next(iter(scores.values()))["nats_per_token"] if scores else ():
        print_positions(mode, scores)
    if any(model["step_memory_bytes"] for model in models):
        say("memory: of a training step, alone in a fresh process; on a CPU growth of the resident set")


def _print_search(result: dict[str, Any]) -> None:
    """Print every setting of a search, those that the budget left out too."""
    search, keys = result["search"], list(result["config"]["grid"])
    rows = [
        (model["model"], *_values(each["setting"], keys), _tried(each))
        for model in result["models"]
        for each in model["settings"]
    ]
    rows += [("all models", *_values(setting, keys), "cut") for setting in search["cut_settings"]]
    names = [key.removeprefix("optim.") for key in keys]
    print()
    print_table(f"every setting, at seed {search['seed']} (* chosen)", ("model", *names, "nats/token"), rows)
    if search["cut_settings"] or search["cut_seeds"]:
        seeds = ", ".join(map(str, search["cut_seeds"])) or "none"
        print(
            f"cut by the budget of {search['budget_minutes']:g} minutes: "
            f"{len(search['cut_settings'])} settings, seeds: {seeds}"
        )


def _values(setting: dict[str, Any], keys: list[str]) -> list[str]:
    return [described(setting[key]) for key in keys]


def _tried(each: dict[str, Any]) -> str:
    loss = "diverged" if each["nats_per_token"] is None else f"{each['nats_per_token']:.4f}"
    return f"{loss}{'*' if each['chosen'] else ' '}"


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
