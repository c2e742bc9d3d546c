"""Made-up facts, read in a long text and asked in a new window: recall and damage.

Forty facts are told at random places of a text longer than the model's positions. Afterwards each is asked
as a cloze in the words that were read, and in two paraphrases; the loss on other text tells the damage. A
learning rate is chosen for the mean log-probability of the answers, over both ways of asking, less the loss
on the other text, in nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Claim, finite, new_figure, save
from benchmarks.harness import show
from benchmarks.pretrained.asking import Answered, View, ask
from benchmarks.pretrained.invented import BREAK, Fact, encode, make_facts, stream
from benchmarks.pretrained.methods import Method, Plan, standard
from benchmarks.pretrained.request import Request
from benchmarks.pretrained.trials import Row, Trial, as_table, chosen, claim, compare

FILLER, OTHER = "tinyshakespeare.txt", "wikitext2_valid.txt"


@dataclass(frozen=True)
class Size:
    """Numbers of facts and tokens that are read and asked.

    Args:
        facts: told in the text.
        tokens: length of the text.
        other_tokens: length of the text that tells the damage.
        piece: tokens of it that are read together, in a window of their own.
        batch: questions in one pass.
    """

    facts: int = 40
    tokens: int = 10_240
    other_tokens: int = 4096
    piece: int = 512
    batch: int = 20


PLAN = Plan(
    chunks=(256, 1024, 2048),
    window=8192 - 512,  # the longest that is asked after it has 512 tokens
    rates={
        "fine-tuning": (1e-4, 2e-4, 4e-4),
        "LoRA": (1e-3, 3e-3, 1e-2),
        "one level": (2e-4, 4e-4, 8e-4),
        "three levels": (1e-4, 2e-4, 4e-4),
    },
)
QUICK = Size(facts=3, tokens=512, other_tokens=64, piece=32)
QUICK_PLAN = Plan(
    chunks=(64, 128, 256),
    window=128,
    rates={"fine-tuning": (1e-3,), "LoRA": (1e-3,), "one level": (1e-3,), "three levels": (1e-3, 2e-3)},
)
FIGURES = {
    "cloze": "cloze recall",
    "cloze log p": "log p of the answer",
    "paraphrased": "recall, paraphrased",
    "paraphrased log p": "log p, paraphrased",
    "paraphrase perplexity": "perplexity of paraphrases",
    "other perplexity": "perplexity of WikiText-2",
    "learn, s": "s of reading",
    "ask, s": "s of asking",
}


@dataclass(frozen=True)
class Question:
    """Ids [n] of a sentence that ends with its answer, the last `answer` of them."""

    ids: Tensor
    answer: int
    paraphrased: bool


def questions(facts: Sequence[Fact], tokenizer: Any) -> list[Question]:
    """The sentence of each fact that was read, and its paraphrases."""
    found = []
    for fact in facts:
        answer = encode(tokenizer, f" {fact.answer}")
        for sentence in (fact.told, *fact.paraphrases):
            ids = torch.tensor(encode(tokenizer, BREAK + sentence) + answer)
            found.append(Question(ids, len(answer), sentence != fact.told))
    return found


def other_text(text: str, size: Size, tokenizer: Any) -> list[Tensor]:
    """Pieces of the second half of a text."""
    ids = encode(tokenizer, text[len(text) // 2 :][: 16 * size.other_tokens])[: size.other_tokens]
    if len(ids) < size.other_tokens:
        raise ValueError(f"{OTHER} is too short for {size.other_tokens} tokens of damage")
    return list(torch.tensor(ids).split(size.piece))


def measure(view: View, asked: Sequence[Question], other: Sequence[Tensor], size: Size) -> Trial:
    """The figures of a model: recall, log-probability (nats per token of the answer), perplexities."""
    start = time.perf_counter()
    answers = ask(view, [question.ids for question in asked], size.batch)
    seconds = time.perf_counter() - start
    both = list(zip(asked, answers, strict=True))
    read = [_answer(question, answer) for question, answer in both if not question.paraphrased]
    rest = [_answer(question, answer) for question, answer in both if question.paraphrased]
    paraphrases = torch.cat([answer.losses for question, answer in both if question.paraphrased])
    other_loss = torch.cat([answer.losses for answer in ask(view, other, size.batch // 4)]).mean()
    figures = {
        "cloze": _mean(hit for hit, _ in read),
        "cloze log p": _mean(log_p for _, log_p in read),
        "paraphrased": _mean(hit for hit, _ in rest),
        "paraphrased log p": _mean(log_p for _, log_p in rest),
        "paraphrase perplexity": _exp(float(paraphrases.mean())),
        "other loss": float(other_loss),
        "other perplexity": _exp(float(other_loss)),
        "ask, s": seconds,
    }
    figures["objective"] = (figures["cloze log p"] + figures["paraphrased log p"]) / 2 - figures["other loss"]
    return {name: finite(value) for name, value in figures.items()}


def _answer(question: Question, answered: Answered) -> tuple[float, float]:
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


def _trial(request: Request, method: Method, rate: float | None, reads: int, seed: int, size: Size) -> Trial:
    """Read, then ask."""
    model, tokenizer = request.loaded
    facts = make_facts(size.facts, seed)
    text = stream(facts, reads, request.text(FILLER), size.tokens, tokenizer, seed)
    other = other_text(request.text(OTHER), size, tokenizer)
    with method.open(model, rate) as student:
        start = time.perf_counter()
        student.learn(text)
        seconds = time.perf_counter() - start
        with student.active() as view:
            return {**measure(view, questions(facts, tokenizer), other, size), "learn, s": seconds}


def run(request: Request) -> dict[str, Any]:
    """Figures of every method, for each number of times that the facts are read."""
    size, plan = (QUICK, QUICK_PLAN) if request.quick else (Size(), PLAN)
    methods = chosen(standard(plan), request.methods)
    parts = {}
    for reads in request.reads:

        def trial(method: Method, rate: float | None, seed: int, reads: int = reads) -> Trial:
            settings = {"part": "facts", "model": request.model_name, "method": method.name, "rate": rate}
            settings |= {"settings": method.settings, "reads": reads, "seed": seed, "size": asdict(size)}
            return request.cache.get(settings, lambda: _trial(request, method, rate, reads, seed, size))

        parts[str(reads)] = compare(methods, request.seeds, trial, "objective")
    claims = [each for reads, rows in parts.items() for each in _claims(rows, reads)]
    return {"size": asdict(size), "seeds": list(request.seeds), "reads": parts, "claims": claims}


def _claims(rows: Sequence[Row], reads: str) -> list[Claim]:
    told = f" (facts told {reads} times)"
    levels = "three levels"
    return [
        *claim(rows, "three levels recall more than no adaptation" + told, "cloze", "no adaptation", levels),
        *claim(rows, "three levels recall more than one level" + told, "cloze", "one level", levels),
        *claim(
            rows,
            "three levels recall more paraphrases than one level" + told,
            "paraphrased",
            "one level",
            levels,
        ),
        *claim(rows, "three levels recall more than LoRA" + told, "cloze", "LoRA", levels),
        *claim(rows, "three levels recall more than fine-tuning" + told, "cloze", "fine-tuning", levels),
        *claim(rows, "three levels recall more than the context" + told, "cloze", "in context", levels),
        *claim(
            rows,
            "three levels damage less than fine-tuning" + told,
            "other perplexity",
            levels,
            "fine-tuning",
        ),
        *claim(
            rows, "three levels damage less than one level" + told, "other perplexity", levels, "one level"
        ),
    ]


def display(figures: dict[str, Any]) -> None:
    size, seeds = figures["size"], len(figures["seeds"])
    for reads, rows in figures["reads"].items():
        title = f"{size['facts']} facts told {reads} times in {size['tokens']:,} tokens, {seeds} seeds"
        show(title, as_table(rows, FIGURES))
    print("* a rate at the end of its grid")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Recall and damage by method, one row of bars for each number of readings."""
    figure, axes = new_figure(3)
    shown = ("cloze", "recall: cloze"), ("paraphrased", "recall: paraphrased"), ("other perplexity", "damage")
    width = 0.8 / len(figures["reads"])
    for index, (reads, rows) in enumerate(figures["reads"].items()):
        places = [place + index * width for place in range(len(rows))]
        for axis, (name, _) in zip(axes, shown, strict=True):
            values = [math.nan if row[name] is None else row[name] for row in rows]
            axis.bar(places, values, width, yerr=[row[f"± {name}"] for row in rows], label=f"told {reads}×")
            axis.set_xticks(places, [row["method"] for row in rows], rotation=40, ha="right")
    for axis, (_, title) in zip(axes, shown, strict=True):
        axis.set_title(title)
    axes[0].set_ylabel("share of the answers")
    axes[2].set_ylabel("perplexity of WikiText-2")
    axes[0].legend()
    save(figure, path)
