"""Class-incremental intents: CLINC150's domains one after the other; a query does not tell its task.

A task is a domain with 15 intents and 20 training examples of each, seen once; after five tasks there are 75
labels, and a query is labelled by the most probable of all labels seen so far. 150 test queries, two of each
class, are asked at the end; accuracy is measured on these. One of the two is asked after every task too, for
forgetting (mean of the best accuracy of a task before the end, minus that at the end) and backward transfer.

Each method gets the setting with the best accuracy on validation queries at the end of a stream that is not
reported; then the seeds decide domains, their order, examples and queries (from the test split). Fine-tuning,
EWC, replay and joint training learn from the labels' tokens, in batches of 8; levels from all tokens. "joint"
has all tasks at once, shuffled.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from benchmarks.pretrained.clinc_contestants import DEPTHS, Base, Contestant, Options, contestants
from benchmarks.pretrained.clinc_data import FULL, Corpus, Protocol, default_folder, draw, merged, read
from benchmarks.pretrained.clinc_methods import Features, Wording
from benchmarks.pretrained.clinc_scores import final_accuracy, learn_in_turn
from benchmarks.pretrained.model import load

TUNING_SEED = 1000
QUICK = Protocol(tasks=2, train=3, queries=2)
SCORES = ("accuracy", "forgetting", "backward transfer")


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
    chosen = _chosen(methods)
    if quick:
        chosen = {name: each._replace(grid=each.grid[:2]) for name, each in chosen.items()}
    protocol = FULL if full else QUICK if quick else Protocol()
    corpus = read(data or default_folder())
    labels = sum(len(task.labels) for task in draw(corpus, protocol, seeds[0], tuning=False))
    loaded, tokenizer = load(model)
    source = "SmolLM2-135M-Instruct" if model is None else str(model)
    wording = Wording(tokenizer)
    base = Base(loaded, wording, Features(loaded, wording, DEPTHS))
    bench = Bench(base, corpus, protocol, cache, {"model": source})
    rows = [_row(bench, name, contestant, seeds) for name, contestant in chosen.items()]
    figures = {"part": "clinc", **asdict(protocol), "labels": labels, "model": source, "seeds": seeds}
    return {**figures, "tuning_seed": TUNING_SEED, "rows": rows, "claims": _claims(rows)}


def _chosen(methods: Sequence[str] | None) -> dict[str, Contestant]:
    """All methods, or those that are named."""
    known = contestants()
    unknown = set(methods or ()) - set(known)
    if unknown:
        raise ValueError(f"no method {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    return {name: each for name, each in known.items() if methods is None or name in methods}


def _row(bench: Bench, name: str, contestant: Contestant, seeds: Sequence[int]) -> dict[str, Any]:
    """A method's chosen setting, and its scores: mean and standard deviation over seeds, and each."""
    tuned = bench.tune(name, contestant)
    found = [bench.result(name, contestant, tuned["setting"], seed) for seed in seeds]
    row: dict[str, Any] = {"method": name, **tuned}
    for score in (*SCORES, "seconds"):
        values = [each[score] for each in found]
        row |= {score: mean(values), f"± {score}": spread(values), f"{score}, seeds": values}
    return {**row, "matrices": [each["matrix"] for each in found]}


COMPARISONS = (  # ours, theirs, in words
    ("3 levels", "1 level", "three levels are ahead of one level"),
    ("3 levels", "in context", "three levels are ahead of in-context learning"),
    ("3 levels", "EWC", "three levels are ahead of EWC"),
    ("3 levels, in context", "in context", "three levels and a context are ahead of a context alone"),
)


def _claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Where both methods of a comparison were run."""
    row = {row["method"]: row for row in rows}
    return [
        {
            "claim": text,
            "holds": row[ours]["accuracy"] > row[theirs]["accuracy"],
            "because": "final accuracy: "
            + ", ".join(f"{name} {plus_minus(row[name], 'accuracy')}" for name in (ours, theirs)),
        }
        for ours, theirs, text in COMPARISONS
        if {ours, theirs} <= set(row)
    ]


def display(figures: dict[str, Any]) -> None:
    title = f"CLINC150, {figures['tasks']} tasks one after the other, {len(figures['seeds'])} seeds"
    rows = []
    for row in figures["rows"]:
        texts = {score: "–" if row[score] is None else plus_minus(row, score) for score in SCORES}
        setting = {key: value for key, value in row["setting"].items() if key != "levels"}
        chosen = ", ".join(f"{key} {value}" for key, value in setting.items())
        rows.append({"method": row["method"], "setting": chosen, **texts, "learning (s)": row["seconds"]})
    show(f"{title} (chance with {figures['labels']} labels: {1 / figures['labels']:.3f})", rows)


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
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of: {', '.join(contestants())}")
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
