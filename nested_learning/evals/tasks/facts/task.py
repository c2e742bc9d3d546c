"""Made-up facts, read in a long text and asked in a new window: recall and damage.

Forty facts are told at random places of a text longer than the model's positions. Afterwards each is asked
as a cloze in the words that were read, and in two paraphrases; the loss on other text tells the damage. A
learning rate is chosen for the mean log-probability of the answers, over both ways of asking, less the loss
on the other text, in nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.data_files import MADE_UP, read_text
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import (
    Base,
    Passage,
    PretrainedMethod,
    Reading,
    Teaching,
    load_base,
)
from nested_learning.evals.methods.pretrained.asking import Answered, View, ask
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.methods.pretrained.method import (
    FINE_TUNING,
    IN_CONTEXT,
    LORA,
    NO_ADAPTATION,
    ONE_LEVEL,
    THREE_LEVELS,
)
from nested_learning.evals.of_pretrained import ReadsText
from nested_learning.evals.registry import register_task
from nested_learning.evals.report.figures import grouped_bars
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.facts.invented import BREAK, Fact, made_up_filler, make_facts, stream

CLOZE_EACH, PARAPHRASED_EACH = "cloze of each fact", "paraphrased of each"  # 1 or 0, in order
FILLER, OTHER = "tinyshakespeare.txt", "wikitext2_valid.txt"
ANSWERS = 12  # of each relation, of which guessing is right in one
RATES = {
    "fine-tuning": (1e-4, 2e-4, 4e-4),
    "lora": (1e-3, 3e-3, 1e-2),
    "one-level": (2e-4, 4e-4, 8e-4),
    "two-levels": (1e-4, 2e-4, 4e-4),
    "three-levels": (1e-4, 2e-4, 4e-4),
}


@dataclass(frozen=True)
class FactsOptions:
    """Numbers of facts and tokens that are read and asked.

    Args:
        model: "smollm2", "random", a folder, or a name on the hub that is downloaded.
        data: folder of tinyshakespeare.txt and wikitext2_valid.txt; "made-up": none is needed.
        facts: told in the text.
        reads: how often each is told.
        tokens: length of the text.
        other_tokens: length of the text that tells the damage.
        piece: tokens of it that are read together, in a window of their own.
        batch: questions in one pass.
        chunks: tokens between two writes of the three levels, fast to slow.
        window: tokens that the context holds.
        rates: how many learning rates of each method are tried.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    model: str = PACKAGED
    data: str = ""
    facts: int = 40
    reads: int = 4
    tokens: int = 10_240
    other_tokens: int = 4096
    piece: int = 512
    batch: int = 20
    chunks: tuple[int, int, int] = (256, 1024, 2048)
    window: int = 8192 - 512  # the longest that is asked after it has 512 tokens
    rates: int = 3
    seeds: int = 3
    tuning_seeds: int = 1


@dataclass(frozen=True)
class FactQuestion:
    """Ids [n] of a sentence that ends with its answer, the last `answer` of them."""

    ids: Tensor
    answer: int
    paraphrased: bool


def questions(facts: Sequence[Fact], base: Base) -> list[FactQuestion]:
    """The sentence of each fact that was read, and its paraphrases."""
    found = []
    for fact in facts:
        answer = base.ids(f" {fact.answer}")
        for sentence in (fact.told, *fact.paraphrases):
            ids = torch.tensor(base.ids(BREAK + sentence) + answer)
            found.append(FactQuestion(ids, len(answer), sentence != fact.told))
    return found


def texts(data: str) -> tuple[str, str]:
    """The filler and the other text of the option `data`."""
    if data == MADE_UP:
        return made_up_filler()
    return read_text(data, FILLER), read_text(data, OTHER)


def other_text(text: str, tokens: int, piece: int, base: Base) -> list[Tensor]:
    """Pieces of the second half of a text."""
    ids = base.ids(text[len(text) // 2 :][: 16 * tokens])[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"{OTHER} is too short for {tokens} tokens of damage")
    return list(torch.tensor(ids).split(piece))


def other_loss(view: View, pieces: Sequence[Tensor], batch: int) -> float:
    """Mean loss on other text, nats per token; nothing is looked up for a text that asks nothing."""
    unaided = View(view.model, view.context)
    return float(torch.cat([answer.losses for answer in ask(unaided, pieces, batch)]).mean())


def of_pieces(batch: int) -> int:
    """Pieces of other text in one pass where so many questions are, which are shorter."""
    return max(1, batch // 4)


def measure(view: View, asked: Sequence[FactQuestion], other: Sequence[Tensor], batch: int) -> Figures:
    """The figures of a model: recall, log-probability (nats per token of the answer), perplexities."""
    start = time.perf_counter()
    lengths = [question.answer for question in asked]
    answers = ask(view, [question.ids for question in asked], batch, lengths)
    seconds = time.perf_counter() - start
    both = list(zip(asked, answers, strict=True))
    read = [_answer(question, answer) for question, answer in both if not question.paraphrased]
    rest = [_answer(question, answer) for question, answer in both if question.paraphrased]
    paraphrases = torch.cat([answer.losses for question, answer in both if question.paraphrased])
    loss = other_loss(view, other, of_pieces(batch))
    figures: dict[str, float] = {
        "cloze": _mean(hit for hit, _ in read),
        "cloze log p": _mean(log_p for _, log_p in read),
        "paraphrased": _mean(hit for hit, _ in rest),
        "paraphrased log p": _mean(log_p for _, log_p in rest),
        "paraphrase perplexity": _exp(float(paraphrases.mean())),
        "other loss": loss,
        "other perplexity": _exp(loss),
        "seconds of asking": seconds,
    }
    figures["objective"] = (figures["cloze log p"] + figures["paraphrased log p"]) / 2 - figures["other loss"]
    # a run that diverged has no figure where it is not finite, which JSON cannot hold
    finite: Figures = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {**finite, CLOZE_EACH: [hit for hit, _ in read], PARAPHRASED_EACH: [hit for hit, _ in rest]}


def _answer(question: FactQuestion, answered: Answered) -> tuple[float, float]:
    """Whether the whole answer is what greedy decoding writes, and the mean log-probability of its tokens.

    Greedy decoding writes it if each of its tokens is the likeliest after the ones before.
    """
    last = slice(-question.answer, None)
    return float(answered.hits[last].all()), -float(answered.losses[last].mean())


def _mean(values: Any) -> float:
    kept = list(values)
    return math.fsum(kept) / len(kept) if all(map(math.isfinite, kept)) else math.nan


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # where a float ends


@register_task
class FactsTask(ReadsText[FactsOptions]):
    """Facts that are read once in a long text are asked in a new window."""

    name = "facts"
    title = "made-up facts read in a long text, asked in a new window: recall and damage"
    budgets: ClassVar[Mapping[str, FactsOptions]] = {
        "smoke": FactsOptions(
            model=RANDOM,
            data=MADE_UP,
            facts=3,
            reads=2,
            tokens=512,
            other_tokens=64,
            piece=32,
            chunks=(64, 128, 256),
            window=128,
            rates=1,
            seeds=1,
        ),
        "small": FactsOptions(),
        "full": FactsOptions(seeds=5, tuning_seeds=3),
    }
    columns: ClassVar[Mapping[str, str]] = {
        "cloze": "share of the facts that are completed as they were told",
        "cloze log p": "log-probability of the answer, nats per token",
        "paraphrased": "share of the paraphrases that are completed rightly",
        "paraphrased log p": "log-probability of the answer, nats per token",
        "paraphrase perplexity": "perplexity of the paraphrases",
        "other perplexity": "perplexity of other text (WikiText-2): the damage",
        "seconds": "of reading",
        "seconds of asking": "seconds of asking",
    }
    headline = "cloze"
    chosen = (NO_ADAPTATION, IN_CONTEXT, FINE_TUNING, LORA, ONE_LEVEL, THREE_LEVELS)
    grids, files = RATES, (FILLER, OTHER)

    def teaching(self) -> Teaching:
        """Circumstances of all methods; fine-tuning and LoRA see each chunk by itself, as training does."""
        return Teaching(self.chunks, self.options.window, rule="adam", alone=False, clip=1.0)

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, PretrainedMethod)
        options, base = self.options, load_base(self.options.model)
        filler, other = texts(options.data)
        facts = make_facts(options.facts, seed)
        text = stream(facts, options.reads, filler, options.tokens, base, seed)
        pieces = other_text(other, options.other_tokens, options.piece, base)
        with method.open(base, self.teaching(), seed) as student:
            start = time.perf_counter()
            student.learn(Reading((Passage(tuple(text.tolist())),)))
            seconds = time.perf_counter() - start
            with student.active() as view:
                figures = measure(view, questions(facts, base), pieces, options.batch)
        return {**figures, "seconds": seconds, "parameters": base.parameters}

    def tune(self, method: Method, seed: int) -> Figures:
        """The objective in the place of the headline: log-probability of the answers less the other loss."""
        return {self.headline: self.run(method, seed)["objective"]}

    def constants(self) -> Mapping[str, Figures]:
        return {"chance": {"cloze": 1 / ANSWERS, "paraphrased": 1 / ANSWERS}}

    def claims(self) -> Sequence[Claim]:
        def ahead(text: str, figure: str, *order: str, higher: bool = True) -> Ahead:
            return Ahead(text, "section 7.3", figure, order, higher)

        levels = THREE_LEVELS.name
        others = (NO_ADAPTATION, ONE_LEVEL, LORA, FINE_TUNING, IN_CONTEXT)
        damage = "other perplexity"
        return [
            *(
                ahead(f"three levels recall more than {other.name}", "cloze", levels, other.name)
                for other in others
            ),
            ahead("three levels recall more paraphrases than one", "paraphrased", levels, ONE_LEVEL.name),
            *(
                ahead(f"three levels damage less than {other.name}", damage, levels, other.name, higher=False)
                for other in (FINE_TUNING, ONE_LEVEL)
            ),
        ]

    def note(self) -> str:
        text = (
            f"{self.options.facts} facts told {self.options.reads} times among {self.options.tokens:,} "
            "tokens, in one pass; rates are chosen for the log-probability of the answers less the loss on "
            "other text."
        )
        return " ".join([text, *self.remarks()])

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Recall and damage by method."""
        names = {"cloze": "recall: cloze", "paraphrased": "recall: paraphrased", "other perplexity": "damage"}
        grouped_bars(rows, [{name: title} for name, title in names.items()], path)
