"""Class-incremental intents: CLINC150's domains one after the other; a query does not tell its task.

A task is a domain with 15 intents and 20 training examples of each; after five tasks there are 75 labels, and
a query is labelled by the most probable of all labels seen so far. Each method gets the setting with the best
accuracy on validation queries, after a stream of tasks that is not reported; then the seeds decide domains,
their order, examples and queries (from the test split).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import (
    Cache,
    Claim,
    OutOfTime,
    mean,
    new_figure,
    plus_minus,
    save,
    show_claims,
    spread,
)
from benchmarks.harness import record, show
from benchmarks.pretrained.clinc_data import FULL, Corpus, Protocol, default_folder, draw, merged, read
from benchmarks.pretrained.clinc_methods import ClassMeans, Features, InContext, Levels, Method, Wording
from benchmarks.pretrained.clinc_scores import final_accuracy, learn_in_turn
from benchmarks.pretrained.clinc_training import ElasticWeights, FineTuning, Replay
from benchmarks.pretrained.model import load
from nested_learning.continual import Level

Options = dict[str, Any]
TUNING_SEED = 1000
QUICK = Protocol(tasks=2, train=3, queries=2)
SCORES = ("accuracy", "forgetting", "backward transfer")
KEPT = 2  # examples of each class that replay and the context may keep
RATES = [3e-5, 1e-4, 3e-4]
DEPTHS = (0.33, 0.67, 1.0)


class Base(NamedTuple):
    """What methods are made of; none changes it."""

    model: Any
    wording: Wording
    features: Features


class Contestant(NamedTuple):
    """How to make a method (from the base, the seed and a setting), and the settings to try."""

    make: Callable[[Base, int, Options], Method]
    grid: Sequence[Options]
    is_joint: bool = False


def _stack(count: int, rate: float) -> Options:
    """Levels that write every 64, 256 and 1,024 tokens; the slower, the smaller the share of the rate."""
    ladder = [(64, 1.0), (256, 1.0), (1024, 1.0)][:count]
    levels = [{"chunk_size": size, "lr": rate * share, "layers": "all"} for size, share in ladder]
    return {"lr": rate, "levels": levels}


def _levels(base: Base, seed: int, options: Options) -> Method:
    return Levels(
        base.model, base.wording, [Level(**each) for each in options["levels"]], options.get("kept", 0)
    )


def _contestants() -> dict[str, Contestant]:
    rates = [{"lr": lr} for lr in RATES]
    contexts = [{"kept": k, "order": order} for k in (1, KEPT) for order in ("stream", "mixed")]
    features = [
        {"depth": depth, "pooling": pooling, "shrinkage": shrinkage}
        for depth in DEPTHS
        for pooling in ("mean", "last")
        for shrinkage in (0.1, 0.5)
    ]
    penalties = [{"lr": lr, "strength": strength} for lr in RATES[:2] for strength in (1e2, 1e4, 1e6)]
    stacks = {count: [_stack(count, rate) for rate in (0.1, 0.3)] for count in (1, 2, 3)}
    return {
        "no examples": Contestant(lambda b, s, o: InContext(b.model, b.wording, kept=0), [{}]),
        "in context": Contestant(lambda b, s, o: InContext(b.model, b.wording, **o, seed=s), contexts),
        "fine-tuning": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), rates),
        "EWC": Contestant(lambda b, s, o: ElasticWeights(b.model, b.wording, **o), penalties),
        "replay": Contestant(lambda b, s, o: Replay(b.model, b.wording, **o, kept=KEPT, seed=s), rates),
        "class means": Contestant(lambda b, s, o: ClassMeans(b.features, **o), features),
        "1 level": Contestant(_levels, stacks[1]),
        "2 levels": Contestant(_levels, stacks[2]),
        "3 levels": Contestant(_levels, stacks[3]),
        "joint": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), rates, is_joint=True),
    }


class Bench:
    """Runs of methods, kept in the cache.

    Args:
        base: what methods are made of.
        corpus: where tasks are drawn from.
        protocol: how much of it.
        cache: of results.
        identity: what else the results depend on.
    """

    def __init__(
        self,
        base: Base,
        corpus: Corpus,
        protocol: Protocol,
        cache: Cache,
        identity: Options,
    ) -> None:
        self.base, self.corpus, self.protocol, self.cache = base, corpus, protocol, cache
        self.identity = {"part": "clinc", **asdict(protocol), **identity}

    def tune(self, name: str, contestant: Contestant) -> Options:
        """The first setting of the grid with the highest validation accuracy, and all accuracies."""
        grid = list(contestant.grid)
        if len(grid) == 1:
            return {"setting": grid[0], "validation": None}
        found = [self._get(name, contestant, setting, TUNING_SEED, tuning=True) for setting in grid]
        chosen = grid[found.index(max(found))]
        tried = [{**setting, "accuracy": value} for setting, value in zip(grid, found, strict=True)]
        return {"setting": chosen, "validation": tried}

    def result(self, name: str, contestant: Contestant, setting: Options, seed: int) -> Any:
        """What `learn_in_turn` tells of a reported seed."""
        return self._get(name, contestant, setting, seed, tuning=False)

    def _get(self, name: str, contestant: Contestant, setting: Options, seed: int, tuning: bool) -> Any:
        def work() -> Any:
            tasks = draw(self.corpus, self.protocol, seed, tuning)
            if contestant.is_joint:
                tasks = [merged(tasks, seed)]
            method = contestant.make(self.base, seed, setting)
            return (final_accuracy if tuning else learn_in_turn)(method, tasks)

        settings = {**self.identity, "method": name, "setting": setting, "seed": seed, "tuning": tuning}
        return self.cache.get(settings, work)


def run(
    seeds: list[int],
    quick: bool,
    cache: Cache,
    full: bool = False,
    model: Path | None = None,
    data: Path | None = None,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Every method, tuned, on the seeds.

    Raises:
        ValueError: no such method, no such model, no CLINC150, or a seed that tuned the methods.
    """
    if TUNING_SEED in seeds:
        raise ValueError(f"seed {TUNING_SEED} tunes the methods; report others")
    contestants = _chosen(_contestants(), methods)
    if quick:
        contestants = {name: each._replace(grid=each.grid[:2]) for name, each in contestants.items()}
    protocol = FULL if full else QUICK if quick else Protocol()
    corpus = read(data or default_folder())
    loaded, tokenizer = load(model)
    source = "SmolLM2-135M-Instruct" if model is None else str(model)
    wording = Wording(tokenizer)
    base = Base(loaded, wording, Features(loaded, wording, DEPTHS))
    bench = Bench(base, corpus, protocol, cache, {"model": source})
    rows = []
    for name, contestant in contestants.items():
        tuned = bench.tune(name, contestant)
        found = [bench.result(name, contestant, tuned["setting"], seed) for seed in seeds]
        row: dict[str, Any] = {"method": name, **tuned}
        for score in (*SCORES, "seconds"):
            values = [each[score] for each in found]
            row |= {score: mean(values), f"± {score}": spread(values), f"{score}, seeds": values}
        rows.append({**row, "matrices": [each["matrix"] for each in found]})
    figures = {"part": "clinc", **asdict(protocol), "model": source, "seeds": seeds}
    return {**figures, "tuning_seed": TUNING_SEED, "rows": rows, "claims": _claims(rows)}


def _chosen(contestants: dict[str, Contestant], methods: Sequence[str] | None) -> dict[str, Contestant]:
    unknown = set(methods or ()) - set(contestants)
    if unknown:
        raise ValueError(f"no method {', '.join(sorted(unknown))}; expected some of {', '.join(contestants)}")
    return {name: each for name, each in contestants.items() if methods is None or name in methods}


def _claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Where both methods of a comparison were run."""
    row = {row["method"]: row for row in rows}
    rivals = {"1 level": "one level", "in context": "in-context learning", "EWC": "EWC"}
    return [
        {
            "claim": f"three levels are ahead of {text}",
            "holds": row["3 levels"]["accuracy"] > row[rival]["accuracy"],
            "because": "final accuracy: "
            + ", ".join(f"{name} {plus_minus(row[name], 'accuracy')}" for name in ("3 levels", rival)),
        }
        for rival, text in rivals.items()
        if {"3 levels", rival} <= set(row)
    ]


def display(figures: dict[str, Any]) -> None:
    labels = 15 * figures["tasks"]
    title = f"CLINC150, {figures['tasks']} tasks one after the other, {len(figures['seeds'])} seeds"
    rows = []
    for row in figures["rows"]:
        texts = {score: "–" if row[score] is None else plus_minus(row, score) for score in SCORES}
        setting = {key: value for key, value in row["setting"].items() if key != "levels"}
        chosen = ", ".join(f"{key} {value}" for key, value in setting.items())
        rows.append({"method": row["method"], "setting": chosen, **texts, "learning (s)": row["seconds"]})
    show(f"{title} (chance with {labels} labels: {1 / labels:.3f})", rows)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Final accuracy of each method, and accuracy over the tasks so far while they are learned."""
    figure, (final, so_far) = new_figure(2, width=5.0, height=4.0)
    rows = figures["rows"]
    names = [row["method"] for row in rows]
    final.barh(names, [row["accuracy"] for row in rows], xerr=[row["± accuracy"] for row in rows])
    final.invert_yaxis()
    final.set(xlabel="final accuracy, all labels", xlim=(0, 1))
    for row in rows:
        matrices = row["matrices"]
        if len(matrices[0]) > 1:
            curves = [[sum(after) / len(after) for after in matrix] for matrix in matrices]
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            so_far.plot(range(1, len(means) + 1), means, marker=".", label=row["method"])
    so_far.set(xlabel="tasks learned", ylabel="mean accuracy of the tasks so far", ylim=(0, 1))
    figure.legend(*so_far.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    save(figure, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained.clinc",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of: {', '.join(_contestants())}")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with clinc150.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the result of every run here")
    parser.add_argument("--max_minutes", type=float, help="start no run that would end later; needs --cache")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    size.add_argument("--full", action="store_true", help="all domains, 100 examples and 30 queries a class")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.max_minutes is not None and not (given.max_minutes > 0 and given.cache):
        parser.error("--max_minutes is a positive number of minutes, and needs --cache FILE to go on from")
    cache = None
    try:
        cache = Cache(given.cache, given.max_minutes)
        sources = {"full": given.full, "model": given.model, "data": given.data, "methods": given.methods}
        figures = run(given.seeds, given.quick, cache, **sources)
    except ValueError as error:
        parser.error(str(error))
    except OutOfTime:
        print(f"Out of time: {given.cache} keeps what is done; the same command goes on from there.")
        raise SystemExit(3) from None
    finally:
        if cache is not None:
            cache.flush()
    display(figures)
    show_claims(figures["claims"])
    if given.plot:
        plot(figures, given.plot)
    return record({"quick": given.quick, "parts": {"clinc": figures}}, given.json)


if __name__ == "__main__":
    main()
