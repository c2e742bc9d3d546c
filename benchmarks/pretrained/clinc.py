"""Class-incremental intents: CLINC150's domains one after the other; a query does not tell its task.

A task is a domain with 15 intents and 20 training examples of each, seen once; after five tasks there are 75
labels, and a query is labelled by the most probable of all labels seen so far. 150 test queries, two of each
class, are asked at the end; accuracy is measured on these. One of the two is asked after every task too, for
forgetting (mean of the best accuracy of a task before the end, minus that at the end) and backward transfer.
"right task" is the share of queries that get a label of their own domain, right or wrong; "last task" the
share that get one of the domain learned last (there is as much of each).

Each method gets the setting with the best accuracy on validation queries at the end of a stream of three
tasks that is not reported; then the seeds decide domains, their order, examples and queries (from the test
split). Whatever is trained learns from the labels' tokens: fine-tuning, EWC, replay and joint training in
batches of 8 examples, levels at every 128 tokens, which are about as many. One level answers as it is; of two
or three the slowest answers, which every 512 or 2,048 tokens takes over a share of the next faster one and so
is an average of what that one was ("averaged" fine-tuning has an average too). "summed" levels all learn and
answer together. "joint" has all tasks at once, shuffled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.common import Claim, mean, new_figure, plus_minus, save, spread
from benchmarks.harness import show
from benchmarks.pretrained.clinc_contestants import DEPTHS, Base, Contestant, Options, contestants
from benchmarks.pretrained.clinc_data import FULL, Corpus, Protocol, draw, merged, read
from benchmarks.pretrained.clinc_methods import Features, Wording
from benchmarks.pretrained.clinc_scores import final_accuracy, learn_in_turn
from benchmarks.pretrained.request import Request
from benchmarks.pretrained.trials import TUNING_SEED

QUICK = Protocol(tasks=2, train=3, queries=2)
SCORES = ("accuracy", "forgetting", "backward transfer", "right task", "last task")


class Bench:
    """Runs of methods, kept in the cache.

    Args:
        request: model, cache and seeds.
        corpus: source of the tasks.
        protocol: share of it that is used.
    """

    def __init__(self, request: Request, corpus: Corpus, protocol: Protocol) -> None:
        self.request, self.corpus, self.protocol = request, corpus, protocol
        self.identity = {"part": "clinc", "model": request.model_name, **asdict(protocol)}

    @cached_property
    def base(self) -> Base:
        """Base model, wording and features, loaded when first needed."""
        model, tokenizer = self.request.loaded
        wording = Wording(tokenizer)
        return Base(model, wording, Features(model, wording, DEPTHS))

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
        """Scores of `learn_in_turn` on a reported seed."""
        return self._get(name, contestant, setting, seed, tuning=False)

    def _get(self, name: str, contestant: Contestant, setting: Options, seed: int, tuning: bool) -> Any:
        def work() -> Any:
            tasks = draw(self.corpus, self.protocol, seed, tuning)
            if contestant.is_joint:
                tasks = [merged(tasks, seed)]
            method = contestant.make(self.base, seed, setting)
            return (final_accuracy if tuning else learn_in_turn)(method, tasks)

        settings = {**self.identity, "method": name, "setting": setting, "seed": seed, "tuning": tuning}
        return self.request.cache.get(settings, work)


def run(request: Request) -> dict[str, Any]:
    """Every method, tuned, on the seeds.

    Raises:
        ValueError: no such method, no such model, no CLINC150, or a seed that tuned the methods.
    """
    if TUNING_SEED in request.seeds:
        raise ValueError(f"seed {TUNING_SEED} tunes the methods; report others")
    chosen = _chosen(request.methods)
    if request.quick:
        chosen = {name: each._replace(grid=each.grid[:2]) for name, each in chosen.items()}
    protocol = FULL if request.full else QUICK if request.quick else Protocol()
    corpus = read(request.data)
    labels = sum(len(task.labels) for task in draw(corpus, protocol, request.seeds[0], tuning=False))
    bench = Bench(request, corpus, protocol)
    rows = [_row(bench, name, contestant, request.seeds) for name, contestant in chosen.items()]
    figures = {**asdict(protocol), "labels": labels, "model": request.model_name}
    figures |= {"seeds": list(request.seeds), "tuning_seed": TUNING_SEED}
    return {**figures, "rows": rows, "claims": _claims(rows)}


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
    """Claims of the comparisons of which both methods were run."""
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
        setting = {key: value for key, value in row["setting"].items() if key not in ("levels", "answers")}
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
