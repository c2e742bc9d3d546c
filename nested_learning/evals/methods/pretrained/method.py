"""Pretrained models that learn from what they read, as methods: one set for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from nested_learning._errors import unknown
from nested_learning.continual import Level, Replay
from nested_learning.continual.labels.class_head import HeadSettings
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained.base import Base
from nested_learning.evals.methods.pretrained.learned_starts import starts_for
from nested_learning.evals.methods.pretrained.passages import HAS_BM25, PassageStudent
from nested_learning.evals.methods.pretrained.students import (
    ClassifierStudent,
    ExampleStudent,
    LevelStudent,
    RetrievalStudent,
    Student,
    WindowStudent,
    by_itself,
)
from nested_learning.evals.methods.pretrained.tuning import (
    HAS_PEFT,
    ElasticStudent,
    ReplayStudent,
    Steps,
    TunedStudent,
    adapted,
    own_copy,
)

PIECE = 64  # tokens of an example that levels replay, at most
KEPT = 2  # examples of each label that replay keeps
TAKEN_OVER = (0.2, 0.4)  # shares of the next faster level that slower ones take over at each write


@dataclass(frozen=True)
class Teaching:
    """Circumstances that all methods of a task have in common.

    Attributes:
        chunks: tokens between two writes of the levels, fast to slow, which is also the length of a block.
        window: tokens that a context holds.
        rule: of levels that learn from text.
        alone: levels see each of the fastest level's chunks by itself; else after earlier ones, as far as
            their default window goes.
        weights: what fine-tuning trains: "all", or the "mlp"s, as levels do.
        examples: passages of one step of fine-tuning and its kind; None: a block.
        clip: largest norm of their gradients; None: no bound.
        reading: positions of the context in which a text is read that is scored while it is learned, and
            tokens of it that a new one begins with.
        practice: ids of texts on which rates and starts are learned; none of them is reported.
    """

    chunks: tuple[int, int, int]
    window: int
    rule: str = "gd"
    alone: bool = True
    weights: Literal["all", "mlp"] = "all"
    examples: int | None = None
    clip: float | None = None
    reading: tuple[int, int] = (1024, 128)
    practice: Sequence[Sequence[int]] = ()

    @property
    def levels_window(self) -> tuple[int, int] | None:
        """Window of levels that are asked after they have read."""
        return by_itself(self.chunks[0]) if self.alone else None


@dataclass(frozen=True)
class PretrainedMethod(Method):
    """A pretrained model with a way of keeping what it reads.

    Attributes:
        way: name of the way, a key of `WAYS`.
        options: of the way, besides those that `settings` choose.
        labelled: it needs labels.
    """

    kind: ClassVar[str] = "pretrained"
    way: str
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    labelled: bool = field(default=False, kw_only=True)

    def open(self, base: Base, teaching: Teaching, seed: int) -> AbstractContextManager[Student]:
        """A student of its own, within a scope; the base model is as it was on leaving.

        Raises:
            ValueError: no such way or option, an option is missing, or a package is.
        """
        if self.way not in WAYS:
            raise unknown("way of learning", self.way, WAYS)
        given = {**self.options, **self.settings}
        try:
            return WAYS[self.way](base, teaching, seed, **given)
        except TypeError as error:
            raise ValueError(f"settings of {self.name!r} are {given}: {error}") from error

    def lacking(self) -> str | None:
        """The package that is missing, and how to get it; None: nothing."""
        if self.way == "lora" and not HAS_PEFT:
            return f"{self.name!r} needs peft: pip install peft"
        if self.way == "passages" and not HAS_BM25:
            return f"{self.name!r} needs bm25s: pip install bm25s"
        return None


Way = Callable[..., AbstractContextManager[Student]]


def _nothing(base: Base, teaching: Teaching, seed: int) -> AbstractContextManager[Student]:
    return nullcontext(Student(base.model))


def _in_context(
    base: Base, teaching: Teaching, seed: int, kept: int | None = None, order: str = "stream"
) -> AbstractContextManager[Student]:
    """The last `window` tokens, or `kept` examples of each label."""
    if kept is None:
        return nullcontext(WindowStudent(base.model, teaching.window, teaching.chunks[0]))
    return nullcontext(ExampleStudent(base.model, teaching.window, kept, order, seed))


def _retrieval(
    base: Base, teaching: Teaching, seed: int, examples: int = 8, depth: float = 0.67
) -> AbstractContextManager[Student]:
    return nullcontext(RetrievalStudent(base.model, base.features, examples, depth))


def _classifier(
    base: Base, teaching: Teaching, seed: int, depth: float, pooling: str, kind: str = "lda", **options: Any
) -> AbstractContextManager[Student]:
    settings = HeadSettings(kind, **options)
    return nullcontext(ClassifierStudent(base.model, base.features, depth, pooling, settings))


def _steps(teaching: Teaching, lr: float) -> Steps:
    return Steps(lr, teaching.chunks[0], teaching.examples, teaching.clip, teaching.reading)


def _fine_tuning(
    base: Base, teaching: Teaching, seed: int, lr: float, average: float | None = None
) -> AbstractContextManager[Student]:
    model, weights = own_copy(base.model, teaching.weights)
    return nullcontext(TunedStudent(model, weights, _steps(teaching, lr), average))


@contextmanager
def _lora(base: Base, teaching: Teaching, seed: int, lr: float) -> Iterator[Student]:
    with adapted(base.model) as (_, weights):  # the adapters lie within the base model
        yield TunedStudent(base.model, weights, _steps(teaching, lr))


def _elastic(
    base: Base, teaching: Teaching, seed: int, lr: float, strength: float
) -> AbstractContextManager[Student]:
    model, weights = own_copy(base.model, teaching.weights)
    return nullcontext(ElasticStudent(model, weights, _steps(teaching, lr), strength))


def _replay(base: Base, teaching: Teaching, seed: int, lr: float) -> AbstractContextManager[Student]:
    model, weights = own_copy(base.model, teaching.weights)
    return nullcontext(ReplayStudent(model, weights, _steps(teaching, lr), KEPT, seed))


def learning_levels(teaching: Teaching, count: int, lr: float, share: float = 1.0) -> list[Level]:
    """Levels that all learn and answer; each has `share` of the rate of the next faster one."""
    return [
        Level(chunk, lr * share**index, rule=teaching.rule)
        for index, chunk in enumerate(teaching.chunks[:count])
    ]


def averaging_levels(teaching: Teaching, lr: float, consolidate: list[float]) -> list[Level]:
    """Levels of which the fastest learns; each slower one is a moving average of the one before."""
    slow = zip(teaching.chunks[1:], consolidate, strict=False)
    return [
        Level(teaching.chunks[0], lr, rule=teaching.rule),
        *(Level(chunk, 0.0, consolidate=share) for chunk, share in slow),
    ]


def _levels(
    base: Base, teaching: Teaching, seed: int, levels: int, lr: float, share: float = 1.0
) -> AbstractContextManager[Student]:
    found = learning_levels(teaching, levels, lr, share)
    return nullcontext(LevelStudent(base.model, found, teaching.levels_window))


def _averaged_levels(
    base: Base,
    teaching: Teaching,
    seed: int,
    lr: float,
    consolidate: list[float],
    kept: int = 0,
    replayed: float = 0.0,
) -> AbstractContextManager[Student]:
    """The slowest level answers, behind `kept` examples of each label; `replayed` is Replay's share."""
    examples = ExampleStudent(base.model, teaching.window, kept) if kept else None
    replay = (
        Replay(share=replayed, choose="label", piece=min(PIECE, teaching.chunks[0]), seed=seed)
        if replayed
        else None
    )
    found = averaging_levels(teaching, lr, consolidate)
    answers = [len(found) - 1]
    return nullcontext(
        LevelStudent(base.model, found, teaching.levels_window, answers, examples, replay=replay)
    )


def _stack(
    base: Base,
    teaching: Teaching,
    seed: int,
    levels: list[dict[str, Any]],
    replay: Mapping[str, Any] | None = None,
    **learning: Any,
) -> AbstractContextManager[Student]:
    """Levels as they are laid out, in the window of the task's `reading`; `replay` are settings of Replay."""
    found = stacked(teaching, levels, learning)
    kept = None if replay is None else Replay(**replay, seed=seed)
    return nullcontext(LevelStudent(base.model, found, teaching.reading, replay=kept))


def _started(
    base: Base, teaching: Teaching, seed: int, levels: list[dict[str, Any]], starts: Mapping[str, Any]
) -> AbstractContextManager[Student]:
    """Levels as `_stack` has them, with rates and starts learned on the task's texts for practice."""
    found = stacked(teaching, levels, {})
    begins = starts_for(base.model, found, teaching.reading, teaching.practice, **starts)
    return nullcontext(LevelStudent(base.model, found, teaching.reading, starts=begins))


def stacked(
    teaching: Teaching, levels: Sequence[Mapping[str, Any]], learning: Mapping[str, Any]
) -> list[Level]:
    """Levels of `stack_levels` from their settings.

    Args:
        teaching: has the chunk sizes.
        levels: settings of each Level; `chunk` is the index of its chunk size.
        learning: further settings of all that say no `lr`: those that learn from text.
    """
    found = []
    for each in levels:
        given = {**({} if "lr" in each else learning), **each}
        size = teaching.chunks[given.pop("chunk")]
        found.append(Level(size, **given))
    return found


@contextmanager
def _passages(
    base: Base,
    teaching: Teaching,
    seed: int,
    over: str,
    size: int = 64,
    count: int = 6,
    in_order: bool = False,
    **options: Any,
) -> Iterator[Student]:
    """Passages are looked up, and the way `over` keeps the text besides, with its own options."""
    with WAYS[over](base, teaching, seed, **options) as inner:
        yield PassageStudent(inner, base.tokenizer, size, count, in_order=in_order)


WAYS: dict[str, Way] = {
    "nothing": _nothing,
    "context": _in_context,
    "retrieval": _retrieval,
    "class means": _classifier,
    "fine-tuning": _fine_tuning,
    "lora": _lora,
    "ewc": _elastic,
    "replay": _replay,
    "levels": _levels,
    "averaged levels": _averaged_levels,
    "stack": _stack,
    "started stack": _started,
    "passages": _passages,
}

NO_ADAPTATION = PretrainedMethod("no-adaptation", "nothing")
IN_CONTEXT = PretrainedMethod("in-context", "context")
RETRIEVAL = PretrainedMethod("retrieval", "retrieval")
FINE_TUNING = PretrainedMethod("fine-tuning", "fine-tuning")
FINE_TUNING_AVERAGED = PretrainedMethod("fine-tuning-averaged", "fine-tuning")
LORA = PretrainedMethod("lora", "lora")
EWC = PretrainedMethod("ewc", "ewc", labelled=True)
REPLAY = PretrainedMethod("replay", "replay", labelled=True)
CLASS_MEANS = PretrainedMethod("class-means", "class means", labelled=True)
KERNEL_LDA = PretrainedMethod("kernel-lda", "class means", options={"kind": "kernel lda"}, labelled=True)
ONE_LEVEL = PretrainedMethod("one-level", "levels", options={"levels": 1})
TWO_LEVELS = PretrainedMethod("two-levels", "levels", options={"levels": 2})
THREE_LEVELS = PretrainedMethod("three-levels", "levels", options={"levels": 3})
TWO_LEVELS_AVERAGED = PretrainedMethod("two-levels-averaged", "averaged levels")
THREE_LEVELS_AVERAGED = PretrainedMethod("three-levels-averaged", "averaged levels")
TWO_LEVELS_REPLAY = PretrainedMethod("two-levels-replay", "averaged levels", labelled=True)
THREE_LEVELS_IN_CONTEXT = PretrainedMethod(
    "three-levels-in-context", "averaged levels", options={"kept": 1}, labelled=True
)
JOINT = PretrainedMethod("joint", "fine-tuning", labelled=True)  # a task gives it all readings at once

PRETRAINED = (
    NO_ADAPTATION,
    IN_CONTEXT,
    RETRIEVAL,
    FINE_TUNING,
    FINE_TUNING_AVERAGED,
    LORA,
    EWC,
    REPLAY,
    CLASS_MEANS,
    KERNEL_LDA,
    ONE_LEVEL,
    TWO_LEVELS,
    THREE_LEVELS,
    TWO_LEVELS_AVERAGED,
    THREE_LEVELS_AVERAGED,
    TWO_LEVELS_REPLAY,
    THREE_LEVELS_IN_CONTEXT,
    JOINT,
)
