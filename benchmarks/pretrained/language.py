"""Two new languages in sequence: what is left of the first after the second (Fig. 8 in miniature).

Sentence pairs of Kalamang and English are read in one pass, then pairs of a made-up language; the English
sides are learned, and no method but the context sees more before a pair than what its chunk has. Translations
of held-out sentences into English are scored by chrF after each lesson; retention is the score on Kalamang
after both lessons relative to that after the first. A learning rate is chosen for the mean of the three
scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import Claim, finite, mean, new_figure, plus_minus, save, spread
from benchmarks.harness import show
from benchmarks.pretrained.asking import View, continuations
from benchmarks.pretrained.chrf import chrf
from benchmarks.pretrained.invented import encode
from benchmarks.pretrained.methods import AVERAGED, Method, Plan, standard
from benchmarks.pretrained.request import Request
from benchmarks.pretrained.sentences import Lesson, kalamang, lessons
from benchmarks.pretrained.trials import Row, Trial, as_table, chosen, claim, compare

DATA = "kalamang_examples.csv"
FIRST, KEPT, SECOND = "A after A", "A after B", "B after B"


@dataclass(frozen=True)
class Size:
    """Numbers of pairs and tokens that are read and translated.

    Args:
        train: pairs that are read of each language.
        test: sentences that are translated.
        new_tokens: most tokens of a translation.
        batch: translations at a time.
    """

    train: int = 200
    test: int = 50
    new_tokens: int = 24
    batch: int = 10


PLAN = Plan(
    chunks=(256, 1024, 2048),
    window=4096,
    rates={
        "fine-tuning": (1e-4, 2e-4, 4e-4),
        "LoRA": (3e-4, 1e-3, 3e-3),
        "one level": (5e-5, 1e-4, 2e-4),
        "three levels": (1e-4, 2e-4, 4e-4),
        AVERAGED: (1e-4, 2e-4, 4e-4),
    },
    alone=True,
)
QUICK = Size(train=4, test=3, new_tokens=4, batch=2)
QUICK_PLAN = Plan(
    chunks=(64, 128, 256),
    window=128,
    rates=dict.fromkeys(("fine-tuning", "LoRA", "one level", "three levels", AVERAGED), (1e-3,)),
    alone=True,
)
FIGURES = {
    FIRST: "chrF: A after A",
    KEPT: "A after B",
    SECOND: "B after B",
    "retention": "retention",
}


def score(view: View, lesson: Lesson, size: Size, tokenizer: Any) -> float:
    """chrF of the greedy translations of a lesson's test sentences."""
    line_break = encode(tokenizer, "\n")[-1]
    prompts = [torch.tensor(encode(tokenizer, pair.prompt)) for pair in lesson.test]
    found = continuations(view, prompts, size.new_tokens, line_break, size.batch)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    # text after a line break is cut off: one token may hold the break and more
    translations = [text.partition("\n")[0].strip() for text in texts]
    return chrf(translations, [pair.english for pair in lesson.test])


def _trial(request: Request, method: Method, rate: float | None, seed: int, size: Size, plan: Plan) -> Trial:
    """Both lessons, tested after each."""
    model, tokenizer = request.loaded
    a, b = lessons(kalamang(request.text(DATA)), size.train, size.test, seed)
    figures = {}
    with method.open(model, rate) as student:
        student.learn(*a.blocks(tokenizer, plan.chunks[0]))
        with student.active() as view:
            figures[FIRST] = score(view, a, size, tokenizer)
        student.learn(*b.blocks(tokenizer, plan.chunks[0]))
        with student.active() as view:
            figures[KEPT], figures[SECOND] = (score(view, each, size, tokenizer) for each in (a, b))
    figures["retention"] = figures[KEPT] / figures[FIRST] if figures[FIRST] else math.nan
    figures["objective"] = fmean(figures[each] for each in (FIRST, KEPT, SECOND))
    return {name: finite(value) for name, value in figures.items()}


def floors(lesson: Lesson) -> dict[str, float]:
    """chrF of one and the same training sentence for every test sentence: on average, and the best of all."""
    references = [pair.english for pair in lesson.test]
    scores = [chrf([pair.english] * len(references), references) for pair in lesson.train]
    return {"mean": fmean(scores), "best": max(scores)}


def _floor_rows(request: Request, size: Size) -> list[Row]:
    """The floors of both languages over the seeds, as rows of the table; they need no model."""
    pairs = kalamang(request.text(DATA))
    found: dict[str, dict[str, list[float]]] = {"mean": {}, "best": {}}
    for seed in request.seeds:
        settings = {"part": "language", "floors": True, "seed": seed, "size": asdict(size)}

        def work(seed: int = seed) -> list[dict[str, float]]:
            return [floors(lesson) for lesson in lessons(pairs, size.train, size.test, seed)]

        for language, values in zip("AB", request.cache.get(settings, work), strict=True):
            for kind, value in values.items():
                found[kind].setdefault(language, []).append(value)
    rows = []
    for kind, name in (("mean", "floor: a training sentence"), ("best", "floor: the best one")):
        row: Row = {"method": name, "lr": "", "rate": None, "retention": 1.0, "± retention": 0.0}
        for figure in (FIRST, KEPT, SECOND):
            values = found[kind][figure[0]]
            row |= {figure: mean(values), f"± {figure}": spread(values)}
        rows.append(row)
    return rows


def run(request: Request) -> dict[str, Any]:
    """chrF of every method after each lesson."""
    size, plan = (QUICK, QUICK_PLAN) if request.quick else (Size(), PLAN)
    methods = chosen(standard(plan), request.methods)

    def trial(method: Method, rate: float | None, seed: int) -> Trial:
        settings = {"part": "language", "model": request.model_name, "method": method.name, "rate": rate}
        settings |= {"settings": method.settings, "seed": seed, "size": asdict(size)}
        return request.cache.get(settings, lambda: _trial(request, method, rate, seed, size, plan))

    rows = [*_floor_rows(request, size), *compare(methods, request.seeds, trial, "objective")]
    return {"size": asdict(size), "seeds": list(request.seeds), "rows": rows, "claims": _claims(rows)}


def _claims(rows: Sequence[Row]) -> list[Claim]:
    levels = AVERAGED
    names = [row["method"] for row in rows if row["method"] not in (levels, "floor: a training sentence")]
    learned = [
        claim(rows, f"{levels}, translate the first language better than {name}", FIRST, name, levels)
        for name in names
    ]
    kept = [
        claim(rows, f"after the second, {levels}, translate the first better than {name}", KEPT, name, levels)
        for name in names
    ]
    retained = [
        claim(rows, f"{levels}, retain more than {name}", "retention", name, levels)
        for name in ("in context", "one level", "three levels", "LoRA", "fine-tuning")
    ]
    return [each for group in (*learned, *kept, *retained) for each in group]


def display(figures: dict[str, Any]) -> None:
    size = figures["size"]
    title = (
        f"A is Kalamang, B a made-up language: {size['train']} pairs of each read, {size['test']} sentences "
        f"translated, {len(figures['seeds'])} seeds"
    )
    show(title, as_table(figures["rows"], FIGURES))
    print("* a rate at the end of its grid")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Bars of the three scores of each method; lines at the floor."""
    figure, [axis] = new_figure(1, width=8.0)
    rows = [row for row in figures["rows"] if not row["method"].startswith("floor")]
    best = next(row for row in figures["rows"] if row["method"] == "floor: the best one")
    for index, name in enumerate((FIRST, KEPT, SECOND)):
        places = [place + 0.27 * index for place in range(len(rows))]
        values = [math.nan if row[name] is None else row[name] for row in rows]
        axis.bar(places, values, 0.27, yerr=[row[f"± {name}"] for row in rows], label=name)
    axis.set_xticks([place + 0.27 for place in range(len(rows))], [row["method"] for row in rows])
    axis.axhline(best[FIRST], color="grey", linestyle=":", label=f"best constant: {plus_minus(best, FIRST)}")
    axis.set_ylabel("chrF")
    axis.legend(fontsize="small")
    save(figure, path)
