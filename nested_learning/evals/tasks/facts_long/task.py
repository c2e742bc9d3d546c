"""Made-up facts told in the first quarter of a text that is longer than the context, asked at its end.

The facts, the questions and the figures are those of the task `facts`. Each run reads two texts from the base
model: one tells every fact once, the other four times. Damage is what the loss on other text has risen by, in
nats per token. Rates are chosen at the shortest of the three lengths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning.evals.claims import Ahead, Claim, Reaches
from nested_learning.evals.data_files import MADE_UP
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import (
    Base,
    Passage,
    PretrainedMethod,
    Reading,
    Teaching,
    load_base,
)
from nested_learning.evals.methods.pretrained.asking import View
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.methods.pretrained.method import FINE_TUNING, LORA, NO_ADAPTATION, ONE_LEVEL
from nested_learning.evals.of_pretrained import ReadsText
from nested_learning.evals.registry import register_method, register_task
from nested_learning.evals.report.figures import grouped_bars
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.facts.invented import BREAK, make_facts, stream
from nested_learning.evals.tasks.facts.task import (
    ANSWERS,
    CLOZE_EACH,
    FILLER,
    OTHER,
    PARAPHRASED_EACH,
    RATES,
    measure,
    of_pieces,
    other_loss,
    other_text,
    questions,
    texts,
)

ONCE, OFTEN = "once", "often"  # how often a fact was told: the ends of the figures' names
SHORT_CONTEXT = PretrainedMethod("context-2k", "context")
LONG_CONTEXT = PretrainedMethod("context-8k", "context")
AVERAGED = PretrainedMethod(
    "level-averaged",
    "stack",
    options={
        "levels": [{"chunk": 0, "rule": "adam", "decay": 0.1}, {"chunk": 1, "lr": 0.0, "consolidate": 0.4}]
    },
)
RANKED = PretrainedMethod(  # the level of Learner.auto
    "level-rank-8", "stack", options={"levels": [{"chunk": 0, "rule": "adam", "rank": 8}]}
)
REPLAYED = PretrainedMethod(  # half of what is learned is read again, the most surprising of it most often
    "level-replay",
    "stack",
    options={
        "levels": [{"chunk": 0, "rule": "adam"}],
        "replay": {"share": 0.5, "choose": "surprise"},
    },
)
PASSAGES = PretrainedMethod("retrieval-context", "passages", options={"over": "context"})
PASSAGES_ALONE = PretrainedMethod("retrieval-alone", "passages", options={"over": "nothing"})
PASSAGES_LEVEL = PretrainedMethod("retrieval-level", "passages", options={"over": "levels", "levels": 1})
# At a rate of its own: what is looked up need not be learned as well.
PASSAGES_SLOW = replace(PASSAGES_LEVEL, name="retrieval-slow-level")
GRIDS = {
    **RATES,
    AVERAGED.name: RATES[ONE_LEVEL.name],
    RANKED.name: (1e-3, 2e-3, 4e-3),
    REPLAYED.name: (1e-4, 2e-4, 4e-4),
    PASSAGES_LEVEL.name: RATES[ONE_LEVEL.name],
    PASSAGES_SLOW.name: (2e-4,),
}

for _method in (
    SHORT_CONTEXT,
    LONG_CONTEXT,
    AVERAGED,
    RANKED,
    REPLAYED,
    PASSAGES,
    PASSAGES_ALONE,
    PASSAGES_LEVEL,
    PASSAGES_SLOW,
):
    register_method(_method)


@dataclass(frozen=True)
class LongFactsOptions:
    """Lengths of the text and of the contexts.

    Args:
        model: "smollm2", "random", a folder, or a name on the hub that is downloaded.
        data: folder of tinyshakespeare.txt and wikitext2_valid.txt; "made-up": none is needed.
        facts: told in the text.
        reads: how often each is told in a text.
        told_once: whether another text tells each but once, of which there are figures too.
        tokens: length of the text.
        tuning_tokens: length of the text on which rates are chosen.
        told_within: share of the text, from its beginning, that tells the facts; where that is too short
            for them, at least twice their length.
        other_tokens: length of the text that tells the damage.
        piece: tokens of it that are read together, in a window of their own.
        batch: questions in one pass.
        chunks: tokens between two writes of the three levels, fast to slow.
        contexts: tokens that the short and the long context hold, the last ones of the text.
        rates: how many learning rates of each method are tried.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    model: str = PACKAGED
    data: str = ""
    facts: int = 40
    reads: int = 4
    told_once: bool = True
    tokens: int = 32_768
    tuning_tokens: int = 8192
    told_within: float = 0.25
    other_tokens: int = 4096
    piece: int = 512
    batch: int = 20
    chunks: tuple[int, int, int] = (256, 1024, 2048)
    contexts: tuple[int, int] = (2048, 8192 - 1024)  # passages and a question have room after the long one
    rates: int = 3
    seeds: int = 3
    tuning_seeds: int = 1


SMOKE = LongFactsOptions(
    model=RANDOM,
    data=MADE_UP,
    facts=3,
    reads=2,
    tokens=1024,
    tuning_tokens=512,
    other_tokens=64,
    piece=32,
    chunks=(64, 128, 256),
    contexts=(64, 256),
    rates=1,
    seeds=1,
)


def told_early(
    facts: Sequence[Any], reads: int, filler: str, tokens: tuple[int, float], base: Base, seed: int
) -> Tensor:
    """A text [T] that tells each fact `reads` times in its first part, and then nothing but filler.

    Args:
        facts: told.
        reads: how often each is.
        filler: one half of its paragraphs stands among the facts, the other behind them.
        tokens: length of the text, and the share of it that tells the facts.
        base: has the tokenizer.
        seed: decides the places of the facts and where the filler begins.

    Raises:
        ValueError: the facts do not fit, or there is too little filler.
    """
    length, share = tokens
    told = reads * sum(len(base.ids(fact.sentence + BREAK)) for fact in facts)
    early = min(length, max(int(share * length), 2 * told))
    paragraphs = filler.split(BREAK)
    halves = BREAK.join(paragraphs[::2]), BREAK.join(paragraphs[1::2])
    parts = [stream(facts, reads, halves[0], early, base, seed)]
    if early < length:
        parts.append(stream([], 0, halves[1], length - early, base, seed))
    return torch.cat(parts)


class LongFactsTask(ReadsText[LongFactsOptions]):
    """Facts that are told early in a long text are asked at its end."""

    columns: ClassVar[Mapping[str, str]] = {
        f"cloze {OFTEN}": "share of the facts told four times that are completed as they were told",
        f"paraphrased {OFTEN}": "share of their paraphrases that are completed rightly",
        f"damage {OFTEN}": "rise of the loss on other text (WikiText-2) by reading, nats per token",
        f"cloze {ONCE}": "as above, told once",
        f"paraphrased {ONCE}": "as above, told once",
        f"damage {ONCE}": "as above, told once",
        "seconds": "of reading the texts",
        "seconds of asking": "seconds of asking",
    }
    headline = f"cloze {OFTEN}"
    grids, files = GRIDS, (FILLER, OTHER)
    chosen = (
        NO_ADAPTATION,
        SHORT_CONTEXT,
        LONG_CONTEXT,
        PASSAGES_ALONE,
        PASSAGES,
        FINE_TUNING,
        LORA,
        ONE_LEVEL,
        AVERAGED,
        RANKED,
        REPLAYED,
        PASSAGES_LEVEL,
        PASSAGES_SLOW,
    )

    def teaching(self, method: Method) -> Teaching:
        """Circumstances of a method: the long context is that of the method of its name alone."""
        window = self.options.contexts[method.name == LONG_CONTEXT.name]
        reading = (4 * self.chunks[0], self.chunks[0])
        return Teaching(self.chunks, window, rule="adam", alone=False, clip=1.0, reading=reading)

    @property
    def readings(self) -> Mapping[str, int]:
        """How often the facts are told, by text: in the order in which the texts are read."""
        return {**({ONCE: 1} if self.options.told_once else {}), OFTEN: self.options.reads}

    def run(self, method: Method, seed: int) -> Figures:
        return self.taught(method, seed, self.options.tokens)

    def tune(self, method: Method, seed: int) -> Figures:
        """The objective of `facts`, its mean over the texts, in the place of the headline."""
        figures = self.taught(method, seed, self.options.tuning_tokens)
        found = [figures[f"objective {often}"] for often in self.readings]
        return {self.headline: None if None in found else fmean(found)}

    def taught(self, method: Method, seed: int, tokens: int) -> Figures:
        """Figures after reading `tokens` tokens that tell the facts often, and others that do so once."""
        assert isinstance(method, PretrainedMethod)
        options, base = self.options, load_base(self.options.model)
        filler, other = texts(options.data)
        facts = make_facts(options.facts, seed)
        asked, pieces = questions(facts, base), other_text(other, options.other_tokens, options.piece, base)
        before = other_loss(View(base.model), pieces, of_pieces(options.batch))
        found: Figures = {"seconds": 0.0, "seconds of asking": 0.0, "parameters": base.parameters}
        for often, reads in self.readings.items():
            text = told_early(facts, reads, filler, (tokens, options.told_within), base, seed)
            with method.open(base, self.teaching(method), seed) as student:
                start = time.perf_counter()
                student.learn(Reading((Passage(tuple(text.tolist())),)))
                found["seconds"] += time.perf_counter() - start
                with student.active() as view:
                    figures = measure(view, asked, pieces, options.batch)
            found["seconds of asking"] += figures.pop("seconds of asking")
            loss = figures["other loss"]
            figures["damage"] = None if loss is None or not math.isfinite(before) else loss - before
            found |= {f"{name} {often}": value for name, value in figures.items()}
        return found

    def constants(self) -> Mapping[str, Figures]:
        columns = (f"{name} {often}" for name in ("cloze", "paraphrased") for often in self.readings)
        return {"chance": dict.fromkeys(columns, 1 / ANSWERS)}

    def claims(self) -> Sequence[Claim]:
        def ahead(text: str, figure: str, *order: str, **how: Any) -> Ahead:
            return Ahead(text, "ours", f"{figure} {OFTEN}", order, **how)

        by_fact: dict[str, Any] = {"unit": "facts"}
        found: list[Claim] = []
        for level in (ONE_LEVEL.name, AVERAGED.name, RANKED.name, REPLAYED.name):
            found += [
                Reaches(f"{level} recalls 0.35 of the facts", "ours", level, {self.headline: 0.35}),
                ahead(f"{level} damages a third as much as fine-tuning at most", "damage", level,
                      FINE_TUNING.name, higher=False, factor=3.0),
                *(
                    ahead(f"{level} recalls more than {other.name}", CLOZE_EACH, level, other.name, **by_fact)
                    for other in (SHORT_CONTEXT, LONG_CONTEXT, FINE_TUNING, LORA)
                ),
            ]  # fmt: skip
        alone = PASSAGES_ALONE.name
        for both, words in ((PASSAGES_LEVEL.name, "a level"), (PASSAGES_SLOW.name, "a level at 2e-4")):
            found += [
                ahead(f"retrieval with {words} is not 0.02 below retrieval alone", CLOZE_EACH, both, alone,
                      margin=-0.02, **by_fact),
                ahead(f"retrieval with {words} completes more paraphrases", PARAPHRASED_EACH, both, alone,
                      unit="paraphrases"),
            ]  # fmt: skip
        return found

    def note(self) -> str:
        options = self.options
        often = " and ".join("once" if reads == 1 else f"{reads} times" for reads in self.readings.values())
        text = (
            f"{options.facts} facts, told {often} in the first "
            f"{options.told_within:.0%} of {options.tokens:,} tokens (or twice their own length, where that "
            f"is more), in one pass; rates are chosen at {options.tuning_tokens:,} tokens. The contexts hold "
            f"the last {options.contexts[0]:,} and {options.contexts[1]:,} tokens; retrieval puts six "
            "passages of 64 tokens before a question."
        )
        return " ".join([text, *self.remarks()])

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Recall and damage by method, told often and, where that was read, once."""
        plots = [
            {f"{name} {often}": f"{name}, told {often}" for often in self.readings}
            for name in ("cloze", "paraphrased", "damage")
        ]
        grouped_bars(rows, plots, path)


def _sized(tokens: int, seeds: int, *, told_once: bool) -> Mapping[str, LongFactsOptions]:
    """Options by budget; `told_once` is for "small", which takes half of the time without it."""
    full = LongFactsOptions(tokens=tokens, seeds=seeds, tuning_seeds=3)
    return {"smoke": SMOKE, "small": replace(full, told_once=told_once, tuning_seeds=1), "full": full}


@register_task
class Facts8kTask(LongFactsTask):
    """The text fits into the model's positions, and nearly into the long context."""

    name = "facts-8k"
    title = "made-up facts told early in 8,192 tokens: contexts, retrieval, levels, fine-tuning"
    budgets: ClassVar[Mapping[str, LongFactsOptions]] = _sized(8192, 3, told_once=True)


@register_task
class Facts32kTask(LongFactsTask):
    """No context holds the facts."""

    name = "facts-32k"
    title = "made-up facts told early in 32,768 tokens, which no context holds"
    budgets: ClassVar[Mapping[str, LongFactsOptions]] = _sized(32_768, 3, told_once=False)


@register_task
class Facts64kTask(LongFactsTask):
    """The facts lie still farther back."""

    name = "facts-64k"
    title = "made-up facts told early in 65,536 tokens, which no context holds"
    budgets: ClassVar[Mapping[str, LongFactsOptions]] = _sized(65_536, 1, told_once=False)
