"""Two new languages in sequence: what is left of the first after the second (Fig. 8 in miniature).

Sentence pairs of Kalamang and English are read in one pass, then pairs of a made-up language; the English
sides are learned, and no method but the context and retrieval sees more before a pair than what its chunk
has. Translations of held-out sentences into English are scored by chrF after each lesson; retention is the
score on Kalamang after both lessons relative to that after the first. A learning rate is chosen for the mean
of the three scores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.data_files import MADE_UP, missing_files, read_text
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import Base, PretrainedMethod, Teaching, load_base
from nested_learning.evals.methods.pretrained.asking import View, continuations
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.methods.pretrained.features import DEPTHS
from nested_learning.evals.methods.pretrained.method import (
    FINE_TUNING,
    IN_CONTEXT,
    LORA,
    NO_ADAPTATION,
    ONE_LEVEL,
    RETRIEVAL,
    TAKEN_OVER,
    THREE_LEVELS,
    THREE_LEVELS_AVERAGED,
)
from nested_learning.evals.of_pretrained import OfPretrained
from nested_learning.evals.registry import register_task
from nested_learning.evals.report.figures import grouped_bars
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.languages.chrf import chrf
from nested_learning.evals.tasks.languages.sentences import (
    LanguageLesson,
    SentencePair,
    kalamang,
    lessons,
    made_up_pairs,
)

DATA = "kalamang_examples.csv"
FIRST, KEPT, SECOND = "A after A", "A after B", "B after B"
RATES = {
    "fine-tuning": (1e-4, 2e-4, 4e-4),
    "lora": (3e-4, 1e-3, 3e-3),
    "one-level": (5e-5, 1e-4, 2e-4),
    "two-levels": (1e-4, 2e-4, 4e-4),
    "three-levels": (1e-4, 2e-4, 4e-4),
    "two-levels-averaged": (1e-4, 2e-4, 4e-4),
    "three-levels-averaged": (1e-4, 2e-4, 4e-4),
}
SHARES = {"two-levels-averaged": TAKEN_OVER[:1], "three-levels-averaged": TAKEN_OVER}


@dataclass(frozen=True)
class LanguagesOptions:
    """Numbers of pairs and tokens that are read and translated.

    Args:
        model: "smollm2", "random", a folder, or a name on the hub that is downloaded.
        data: folder of kalamang_examples.csv; "made-up": none is needed.
        train: pairs that are read of each language.
        test: sentences that are translated.
        new_tokens: most tokens of a translation.
        batch: translations at a time.
        chunks: tokens between two writes of the three levels, fast to slow.
        window: tokens that the context holds.
        rates: how many settings of each method are tried.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    model: str = PACKAGED
    data: str = ""
    train: int = 200
    test: int = 50
    new_tokens: int = 24
    batch: int = 10
    chunks: tuple[int, int, int] = (256, 1024, 2048)
    window: int = 4096
    rates: int = 3
    seeds: int = 3
    tuning_seeds: int = 1


def score(view: View, lesson: LanguageLesson, options: LanguagesOptions, base: Base) -> float:
    """chrF of the greedy translations of a lesson's test sentences."""
    line_break = base.ids("\n")[-1]
    prompts = [torch.tensor(base.ids(pair.prompt)) for pair in lesson.test]
    found = continuations(view, prompts, options.new_tokens, line_break, options.batch)
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    # text after a line break is cut off: one token may hold the break and more
    translations = [text.partition("\n")[0].strip() for text in texts]
    return chrf(translations, [pair.english for pair in lesson.test])


def floors(lesson: LanguageLesson) -> dict[str, float]:
    """chrF of one and the same training sentence for every test sentence: on average, and the best of all."""
    references = [pair.english for pair in lesson.test]
    scores = [chrf([pair.english] * len(references), references) for pair in lesson.train]
    return {"mean": fmean(scores), "best": max(scores)}


def pairs_of(options: LanguagesOptions) -> list[SentencePair]:
    """The sentence pairs that lessons are drawn from."""
    return made_up_pairs() if options.data == MADE_UP else kalamang(read_text(options.data, DATA))


@register_task
class LanguagesTask(OfPretrained[LanguagesOptions]):
    """Kalamang, then a made-up language, read as sentence pairs; sentences are translated into English."""

    name = "languages"
    title = "two new languages in sequence: what is left of the first after the second (Fig. 8 in miniature)"
    budgets: ClassVar[Mapping[str, LanguagesOptions]] = {
        "smoke": LanguagesOptions(
            model=RANDOM,
            data=MADE_UP,
            train=4,
            test=3,
            new_tokens=4,
            batch=2,
            chunks=(64, 128, 256),
            window=128,
            rates=1,
            seeds=1,
        ),
        "small": LanguagesOptions(),
        "full": LanguagesOptions(seeds=5, tuning_seeds=3),
    }
    columns: ClassVar[Mapping[str, str]] = {
        FIRST: "chrF of translations from Kalamang (A), after it was read",
        KEPT: "the same after the second language (B) was read too",
        SECOND: "chrF of translations from the second, after it was read",
        "retention": "A after B, relative to A after A",
        "seconds": "of reading",
    }
    headline = KEPT
    chosen = (
        NO_ADAPTATION,
        IN_CONTEXT,
        RETRIEVAL,
        FINE_TUNING,
        LORA,
        ONE_LEVEL,
        THREE_LEVELS,
        THREE_LEVELS_AVERAGED,
    )

    def unfit(self, method: PretrainedMethod) -> str | None:
        known = {*RATES, NO_ADAPTATION.name, IN_CONTEXT.name, RETRIEVAL.name}
        if method.name in known:
            return None
        return f"{method.name!r} needs labels; {self.name} reads sentence pairs with {sorted(known)}"

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        found: list[dict[str, Any]] = [{"lr": rate} for rate in RATES.get(method.name, ())] or [{}]
        if method.name in SHARES:
            found = [{**each, "consolidate": list(SHARES[method.name])} for each in found]
        if method.name == RETRIEVAL.name:
            found = [{"examples": 8, "depth": depth} for depth in DEPTHS]
        return found[: self.options.rates]

    def missing(self) -> str | None:
        return super().missing() or missing_files(self.options.data, (DATA,))

    def teaching(self) -> Teaching:
        """Circumstances of all methods: each sees a chunk by itself."""
        return Teaching(self.chunks, self.options.window, rule="adam", clip=1.0)

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, PretrainedMethod)
        options, base = self.options, load_base(self.options.model)
        a, b = lessons(pairs_of(options), options.train, options.test, seed)
        found: dict[str, float] = {}
        seconds = 0.0
        with method.open(base, self.teaching(), seed) as student:
            for lesson, asked in ((a, {FIRST: a}), (b, {KEPT: a, SECOND: b})):
                start = time.perf_counter()
                student.learn(lesson.reading(base))
                seconds += time.perf_counter() - start
                with student.active() as view:
                    found |= {name: score(view, each, options, base) for name, each in asked.items()}
        figures: Figures = {**found, "retention": found[KEPT] / found[FIRST] if found[FIRST] else None}
        return {**figures, "seconds": seconds, "parameters": base.parameters}

    def tune(self, method: Method, seed: int) -> Figures:
        """The mean of the three scores in the place of the headline."""
        figures = self.run(method, seed)
        return {self.headline: fmean(figures[name] for name in (FIRST, KEPT, SECOND))}

    def constants(self) -> Mapping[str, Figures]:
        options = self.options
        found = [
            [floors(lesson) for lesson in lessons(pairs_of(options), options.train, options.test, seed)]
            for seed in range(options.seeds)
        ]
        rows: dict[str, Figures] = {}
        for kind, name in (("mean", "a training sentence"), ("best", "the best training sentence")):
            a, b = (fmean(seed[language][kind] for seed in found) for language in (0, 1))
            rows[name] = {FIRST: a, KEPT: a, SECOND: b, "retention": 1.0}
        return rows

    def claims(self) -> Sequence[Claim]:
        levels = THREE_LEVELS_AVERAGED.name
        others = [method.name for method in self.methods() if method.name != levels]
        others.append("the best training sentence")

        def ahead(text: str, figure: str, *order: str) -> Ahead:
            return Ahead(text, "Fig. 8", figure, order)

        return [
            ahead("(7) more levels keep more of the first language", KEPT, levels, ONE_LEVEL.name),
            *(
                ahead(f"averaged levels translate the first language better than {o}", FIRST, levels, o)
                for o in others
            ),
            *(
                ahead(f"after the second they still translate the first better than {o}", KEPT, levels, o)
                for o in others
            ),
            *(
                ahead(f"averaged levels retain more than {o}", "retention", levels, o)
                for o in others
                if o in (IN_CONTEXT.name, ONE_LEVEL.name, THREE_LEVELS.name, LORA.name, FINE_TUNING.name)
            ),
        ]

    def note(self) -> str:
        text = (
            f"{self.options.train} sentence pairs of each language in one pass, {self.options.test} "
            "sentences translated; the rows of constant sentences are the floor. Fig. 8 has Kalamang and "
            "Manchu, without numbers in the text."
        )
        return " ".join([text, *self.remarks()])

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Bars of the three scores of each method, the floors among them."""
        grouped_bars(rows, [{name: f"chrF, {name}" for name in (FIRST, KEPT, SECOND)}], path)
