"""A month of two users who share one base model: recall, corrections, leaks from one to the other, damage.

Each user has thirty short conversations, in turn with the other's; what is learned of one is his own (one
row shares it, for contrast). Afterwards each is asked what he has told: the latest value is right. A leak is
asked of the one who has not told it: how much likelier than the topic's other values the value of the other
user has become by reading, in nats, and how often it is the likeliest.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from nested_learning.evals.claims import Ahead, Claim, Reaches
from nested_learning.evals.data_files import MADE_UP, read_text
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained import (
    Base,
    Passage,
    PretrainedMethod,
    Reading,
    Student,
    Teaching,
    load_base,
)
from nested_learning.evals.methods.pretrained.asking import View, log_probabilities
from nested_learning.evals.methods.pretrained.base import PACKAGED, RANDOM
from nested_learning.evals.methods.pretrained.method import (
    FINE_TUNING,
    IN_CONTEXT,
    LORA,
    NO_ADAPTATION,
    ONE_LEVEL,
)
from nested_learning.evals.methods.pretrained.trie import Trie
from nested_learning.evals.of_pretrained import ReadsText
from nested_learning.evals.registry import register_method, register_task
from nested_learning.evals.report.figures import grouped_bars
from nested_learning.evals.rows import Figures, MethodRows
from nested_learning.evals.tasks.facts.invented import made_up_filler
from nested_learning.evals.tasks.facts.task import OTHER, other_loss, other_text
from nested_learning.evals.tasks.facts_long.task import (
    AVERAGED,
    GRIDS,
    PASSAGES_ALONE,
    PASSAGES_LEVEL,
    PASSAGES_SLOW,
    RANKED,
    REPLAYED,
)
from nested_learning.evals.tasks.month.conversations import Asked, Month, two_months

SHARED = PretrainedMethod("fine-tuning-shared", "fine-tuning")  # one model for both users
# What was said last stands last, as in a context and as by Learner.retrieve.
PASSAGES_IN_ORDER = PretrainedMethod(
    "retrieval-in-order", "passages", options={"over": "nothing", "in_order": True}
)
RATES = {**GRIDS, SHARED.name: GRIDS[FINE_TUNING.name]}
VALUES = 12  # of each topic, of which guessing is right in one
RECALL, LEAK = "recall", "leak"
QUESTIONS = "questions"
PIECES = 4  # of other text in one pass
EACH = "recall of each"  # 1 or 0, in order

for _method in (SHARED, PASSAGES_IN_ORDER):
    register_method(_method)


@dataclass(frozen=True)
class MonthOptions:
    """Conversations and questions.

    Args:
        model: "smollm2", "random", a folder, or a name on the hub that is downloaded.
        data: folder of wikitext2_valid.txt; "made-up": none is needed.
        conversations: of each user.
        topics: things that a user tells, at most; a third of them is corrected later.
        other_tokens: length of the text that tells the damage.
        piece: tokens of it that are read together, in a window of their own.
        chunks: tokens between two writes of the three levels, fast to slow.
        window: tokens that the context holds.
        rates: how many learning rates of each method are tried.
        seeds: reported ones.
        tuning_seeds: others, on which settings are chosen by the mean.
    """

    model: str = PACKAGED
    data: str = ""
    conversations: int = 30
    topics: int = 13
    other_tokens: int = 4096
    piece: int = 512
    chunks: tuple[int, int, int] = (64, 256, 512)  # about a conversation, so that little is left unlearned
    window: int = 1024
    rates: int = 3
    seeds: int = 5
    tuning_seeds: int = 1


class ScoredValues(dict[str, float]):
    """Log-probability of each value of a topic behind its question, summed over its tokens, nats."""

    @property
    def likeliest(self) -> str:
        """The value with the highest probability."""
        return max(self, key=lambda value: self[value])

    def above_others(self, value: str) -> float:
        """Log-probability of a value less the mean of the topic's other values, nats."""
        return self[value] - fmean(log_p for other, log_p in self.items() if other != value)


def answers(view: View, asked: Sequence[Asked], base: Base) -> list[ScoredValues]:
    """Every value of each question's topic, scored behind it."""
    values = [each.topic.values.split() for each in asked]
    tries = [Trie.of([base.ids(f" {value}") for value in each]) for each in values]
    prompts = [base.ids(each.prompt) for each in asked]
    scores = log_probabilities(view, list(zip(prompts, tries, strict=True)))
    return [
        ScoredValues(zip(each, found.tolist(), strict=True))
        for each, found in zip(values, scores, strict=True)
    ]


def scored(month: Month, view: View, before: Sequence[ScoredValues], base: Base) -> dict[str, list[float]]:
    """Figures of a user, each with its value for each question.

    Args:
        month: of the user.
        view: the model after the month.
        before: what the base model says of the other user, for leaks; asked while no level is in force.
        base: has the tokenizer.
    """
    own = list(zip(month.asked, answers(view, month.asked, base), strict=True))
    foreign = list(zip(month.foreign, answers(view, month.foreign, base), strict=True))
    corrected = [(each, answer) for each, answer in own if each.before is not None]
    return {
        RECALL: [float(answer.likeliest == each.value) for each, answer in own],
        "log p": [answer[each.value] for each, answer in own],
        "correction": [float(answer.likeliest == each.value) for each, answer in corrected],
        "latest over old": [
            float(answer[each.value] > answer[each.before or ""]) for each, answer in corrected
        ],
        LEAK: [
            answer.above_others(each.value) - plainly.above_others(each.value)
            for (each, answer), plainly in zip(foreign, before, strict=True)
        ],
        "leaked": [float(answer.likeliest == each.value) for each, answer in foreign],
    }


@register_task
class MonthTask(ReadsText[MonthOptions]):
    """Two users talk to one base model for a month, and are asked."""

    name = "month"
    title = "a month of two users on one base model: recall, corrections, leaks, damage"
    version = 2
    budgets: ClassVar[Mapping[str, MonthOptions]] = {
        "smoke": MonthOptions(
            model=RANDOM,
            data=MADE_UP,
            conversations=8,
            topics=4,
            other_tokens=64,
            piece=32,
            chunks=(64, 128, 256),
            window=128,
            rates=1,
            seeds=1,
        ),
        "small": MonthOptions(),
        "full": MonthOptions(tuning_seeds=3),
    }
    columns: ClassVar[Mapping[str, str]] = {
        RECALL: "share of what a user told of which the latest value is the likeliest of twelve",
        "log p": "log-probability of the latest value, nats",
        "correction": "recall of what was corrected",
        "latest over old": "share of what was corrected where the latest value is likelier than the old one",
        LEAK: "rise of the other user's private value over the topic's other values, nats",
        "leaked": "share of the other user's private values that are the likeliest of twelve",
        "damage": "rise of the loss on other text (WikiText-2), nats per token",
        "seconds": "of reading",
    }
    headline = RECALL
    grids, files = RATES, (OTHER,)
    chosen = (
        NO_ADAPTATION,
        IN_CONTEXT,
        PASSAGES_ALONE,
        PASSAGES_IN_ORDER,
        FINE_TUNING,
        SHARED,
        LORA,
        ONE_LEVEL,
        AVERAGED,
        RANKED,
        REPLAYED,
        PASSAGES_LEVEL,
        PASSAGES_SLOW,
    )

    def teaching(self) -> Teaching:
        """Circumstances of all methods; a context begins anew with each chunk but for one before it."""
        reading = (2 * self.chunks[0], self.chunks[0])
        return Teaching(self.chunks, self.options.window, rule="adam", alone=False, clip=1.0, reading=reading)

    def run(self, method: Method, seed: int) -> Figures:
        assert isinstance(method, PretrainedMethod)
        options, base = self.options, load_base(self.options.model)
        months = two_months(options.conversations, options.topics, seed)
        plain = View(base.model)
        text = made_up_filler()[1] if options.data == MADE_UP else read_text(options.data, OTHER)
        pieces = other_text(text, options.other_tokens, options.piece, base)
        before, unread = other_loss(plain, pieces, PIECES), [answers(plain, m.foreign, base) for m in months]
        found: list[dict[str, list[float]]] = []
        losses = []
        with ExitStack() as scope:
            students = self._students(method, base, seed, scope)
            start = time.perf_counter()
            for day in range(options.conversations):
                for month, student in zip(months, students, strict=True):
                    student.learn(Reading((Passage(tuple(base.ids(month.conversations[day]))),)))
            seconds = time.perf_counter() - start
            for month, student, plainly in zip(months, students, unread, strict=True):
                with student.active() as view:
                    found.append(scored(month, view, plainly, base))
                    losses.append(other_loss(view, pieces, PIECES))
        joined = {name: [value for user in found for value in user[name]] for name in found[0]}
        figures: Figures = {name: _finite_mean(values) for name, values in joined.items()}
        figures["damage"] = _finite_mean([loss - before for loss in losses])
        return {**figures, EACH: joined[RECALL], "seconds": seconds, "parameters": base.parameters}

    def _students(self, method: PretrainedMethod, base: Base, seed: int, scope: ExitStack) -> list[Student]:
        """A student for each user; all on the one base model, but for LoRA, whose adapters lie within it."""
        if method.name == SHARED.name:
            return 2 * [scope.enter_context(method.open(base, self.teaching(), seed))]
        students = []
        for _ in range(2):
            own = replace(base, model=copy.deepcopy(base.model)) if method.way == "lora" else base
            students.append(scope.enter_context(method.open(own, self.teaching(), seed)))
        return students

    def tune(self, method: Method, seed: int) -> Figures:
        """The mean log-probability of the latest values less the damage, in the place of the headline."""
        figures = self.run(method, seed)
        log_p, damage = figures["log p"], figures["damage"]
        return {RECALL: None if log_p is None or damage is None else log_p - damage}

    def constants(self) -> Mapping[str, Figures]:
        chance = dict.fromkeys((RECALL, "correction", "leaked"), 1 / VALUES)
        return {"chance": {**chance, "latest over old": 0.5, LEAK: 0.0}}

    def claims(self) -> Sequence[Claim]:
        def ahead(text: str, figure: str, *order: str, **how: Any) -> Ahead:
            return Ahead(text, "ours", figure, order, **how)

        found: list[Claim] = []
        for level in (ONE_LEVEL.name, AVERAGED.name, RANKED.name, REPLAYED.name):
            found += [
                *(
                    ahead(f"{level} recalls more than {other.name}", EACH, level, other.name, unit=QUESTIONS)
                    for other in (NO_ADAPTATION, IN_CONTEXT, FINE_TUNING, LORA)
                ),
                _follows(level),
                Reaches(f"nothing leaks by {level} from one user to the other (0.1 nats at most)", "ours",
                        level, {LEAK: 0.1}, higher=False),
                ahead(f"{level} leaks less than one fine-tuned model for both", LEAK, level, SHARED.name,
                      higher=False),
                ahead(f"{level} damages less than fine-tuning", "damage", level, FINE_TUNING.name,
                      higher=False),
            ]  # fmt: skip
        alone = PASSAGES_ALONE.name
        found += [
            ahead("retrieval with a level recalls more than retrieval alone", EACH, PASSAGES_LEVEL.name,
                  alone, unit=QUESTIONS),
            ahead("retrieval with a level at 2e-4 recalls more than retrieval alone", EACH,
                  PASSAGES_SLOW.name, alone, unit=QUESTIONS),
            _follows(PASSAGES_IN_ORDER.name),
            ahead("passages in the order of reading recall more than the best one last", EACH,
                  PASSAGES_IN_ORDER.name, alone, unit=QUESTIONS),
        ]  # fmt: skip
        return found

    def note(self) -> str:
        options = self.options
        text = (
            f"{options.conversations} conversations of each of two users, in turn, {options.topics} things "
            f"told by each at most, a third of them corrected later; the context holds the last "
            f"{options.window:,} tokens. Each user has a learner of his own, but for fine-tuning-shared. The "
            "rate is chosen for the log-probability of the latest values less the damage."
        )
        return " ".join([text, *self.remarks()])

    def plot(self, rows: MethodRows, path: Path) -> None:
        """Recall and corrections, leaks, damage."""
        plots = [
            {RECALL: "recall", "correction": "of corrections"},
            {LEAK: "leak, nats"},
            {"damage": "damage"},
        ]
        grouped_bars(rows, plots, path)


def _follows(method: str) -> Reaches:
    """The claim that corrections are taken: a bound of ours."""
    text = f"after {method} the latest value is the likelier one for most that was corrected"
    return Reaches(text, "ours", method, {"latest over old": 0.75})


def _finite_mean(values: Sequence[float]) -> float | None:
    """The mean; None where a run diverged, or there is nothing to take it of."""
    return fmean(values) if values and all(map(math.isfinite, values)) else None
