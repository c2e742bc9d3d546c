"""The ways of keeping what was read: nothing, the context, levels, fine-tuning of all weights, LoRA.

Each is a `Student`: it learns from ids in one pass and in their order, and is then asked. What the students
learn stays apart from the model that they are given, which serves all of them.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.pretrained.asking import View
from nested_learning.continual import Level, stack_levels

HAS_PEFT = importlib.util.find_spec("peft") is not None
MLP = ["gate_proj", "up_proj", "down_proj"]
RANK = 8  # rank of LoRA's adapters
IGNORED = -100  # target of a token that is not learned
AVERAGED = "three levels, averaged"
# shares of the next faster level that slower ones take over at each write, as on CLINC150
TAKEN_OVER = (0.2, 0.4)
CLIP = 1.0  # largest norm of the gradient of a mean loss


@dataclass(frozen=True)
class Method:
    """A way of keeping what was read.

    Args:
        name: name of the method.
        settings: all settings but the rate, as JSON values.
        open: (model, rate) to a student of its own, within a scope.
        rates: to choose from; none where there is nothing to tune.
    """

    name: str
    settings: dict[str, Any]
    open: Callable[[Any, Any], AbstractContextManager[Student]]
    rates: tuple[float, ...] = ()


class Student(Protocol):
    """Something that reads once and keeps what it can."""

    def learn(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Read ids [T] and learn those in the boolean mask [T]; those after the last chunk may be left."""

    def active(self) -> AbstractContextManager[View]:
        """The student to be asked, inside the scope."""


class Unchanged:
    """Learns nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def learn(self, ids: Tensor, mask: Tensor | None = None) -> None:
        pass

    def active(self) -> AbstractContextManager[View]:
        return nullcontext(View(self.model))


class InContext:
    """Keeps the last `window` tokens, and has them before every question."""

    def __init__(self, model: Any, window: int) -> None:
        self.model, self.window = model, window
        self.kept = torch.empty(0, dtype=torch.long)

    def learn(self, ids: Tensor, mask: Tensor | None = None) -> None:
        self.kept = torch.cat([self.kept, ids])[-self.window :]

    def active(self) -> AbstractContextManager[View]:
        return nullcontext(View(self.model, self.kept))


class Levels:
    """`nested_learning.continual`: deltas that are written at several frequencies.

    Args:
        model: the base model.
        levels: fast to slow.
        alone: each chunk of the fastest level is read from an empty context but for one token; else after
            what came before it, as far as the default window goes.
        answers: indices of the levels that are in force when it is asked; None for all.
    """

    def __init__(
        self, model: Any, levels: Sequence[Level], alone: bool = False, answers: Sequence[int] | None = None
    ) -> None:
        window = {"window": levels[0].chunk_size + 1, "overlap": 1} if alone else {}
        self.learner, self.answers = stack_levels(model, levels=levels, **window), answers

    def learn(self, ids: Tensor, mask: Tensor | None = None) -> None:
        self.learner.observe(ids, learn_mask=mask)

    @contextmanager
    def active(self) -> Iterator[View]:
        with self.learner.active(levels=self.answers) as model:
            yield View(model)


class Tuned:
    """AdamW on some parameters of a model, a step for each chunk; its other weights stay.

    The steps are taken on copies in float32: a small one would be lost to the rounding of bfloat16 weights.
    """

    def __init__(self, model: Any, parameters: Sequence[nn.Parameter], rate: float, chunk: int) -> None:
        self.model, self.parameters, self.chunk = model, list(parameters), chunk
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=rate, weight_decay=0.0, fused=True)

    def learn(self, ids: Tensor, mask: Tensor | None = None) -> None:
        targets = ids if mask is None else ids.masked_fill(~mask, IGNORED)
        for chunk, target in zip(ids.split(self.chunk), targets.split(self.chunk), strict=True):
            if (target[1:] != IGNORED).any():
                self._step(chunk, target)

    def _step(self, ids: Tensor, targets: Tensor) -> None:
        loss = self.model(input_ids=ids[None], labels=targets[None], use_cache=False).loss
        found = torch.autograd.grad(loss, self.parameters)
        for master, g in zip(self.masters, found, strict=True):
            master.grad = g.float()
        nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.copy_(master)

    def active(self) -> AbstractContextManager[View]:
        return nullcontext(View(self.model))


@contextmanager
def fine_tuned(model: Any, rate: float, chunk: int) -> Iterator[Student]:
    """Fine-tuning of all weights of a copy."""
    own = copy.deepcopy(model)
    yield Tuned(own, [p for p in own.parameters() if p.requires_grad], rate, chunk)


@contextmanager
def lora(model: Any, rate: float, chunk: int) -> Iterator[Student]:
    """Adapters of rank 8 on all MLPs, taken away again on leaving.

    Raises:
        ValueError: peft is not installed.
    """
    if not HAS_PEFT:
        raise ValueError("LoRA needs peft: pip install peft, or leave it out by --methods")
    from peft import LoraConfig, get_peft_model

    frozen = [p for p in model.parameters() if p.requires_grad]
    options = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MLP, task_type="CAUSAL_LM")
    torch.manual_seed(0)  # decides the adapters' initial factors
    adapted = get_peft_model(model, options).eval()
    try:
        yield Tuned(adapted, [p for p in adapted.parameters() if p.requires_grad], rate, chunk)
    finally:
        adapted.unload()
        for p in frozen:
            p.requires_grad_()


@dataclass(frozen=True)
class Plan:
    """Settings that the methods of a part have in common, and the rates that each may choose from.

    Fine-tuning and LoRA see each chunk by itself, as training does; levels see it after earlier ones, as far
    as their default window goes, or by itself too.

    Args:
        chunks: tokens between two writes of the three levels, fast to slow. One level has the fastest; so
            do the steps of fine-tuning and LoRA.
        window: tokens that the context holds.
        rates: by method; "three levels, averaged" only takes part where it has rates.
        alone: levels see each of the fastest level's chunks by itself.
    """

    chunks: tuple[int, int, int]
    window: int
    rates: dict[str, tuple[float, ...]]
    alone: bool = False


def adam_levels(chunks: Sequence[int], rate: float) -> list[Level]:
    """Levels with one rate: Adam's steps are as large whatever a chunk sums, so slow levels move less."""
    return [Level(chunk, rate, rule="adam") for chunk in chunks]


def averaged_levels(chunks: Sequence[int], rate: float) -> list[Level]:
    """Levels of which the fastest learns, by Adam; each slower one is a moving average of the one before."""
    fast, middle, slow = chunks
    return [
        Level(fast, rate, rule="adam"),
        Level(middle, 0.0, consolidate=TAKEN_OVER[0]),
        Level(slow, 0.0, consolidate=TAKEN_OVER[1]),
    ]


def standard(plan: Plan) -> list[Method]:
    """All methods, each with the same tokens in the same order, in one pass."""
    fast, rates = plan.chunks[0], plan.rates

    def stacked(
        levels: Callable[[float], Sequence[Level]], answers: Sequence[int] | None = None
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {"levels": [level.describe() for level in levels(1.0)]}
        if plan.alone:
            settings["alone"] = True
        if answers is not None:
            settings["answers"] = list(answers)
        return {
            "settings": settings,
            "open": lambda model, rate: nullcontext(Levels(model, levels(rate), plan.alone, answers)),
        }

    averaged = [
        Method(name, **stacked(lambda rate: averaged_levels(plan.chunks, rate), [2]), rates=rates[name])
        for name in (AVERAGED,)
        if name in rates
    ]
    return [
        Method("no adaptation", {}, lambda model, _: nullcontext(Unchanged(model))),
        Method(
            "in context", {"window": plan.window}, lambda model, _: nullcontext(InContext(model, plan.window))
        ),
        Method(
            "fine-tuning",
            {"chunk": fast},
            lambda model, rate: fine_tuned(model, rate, fast),
            rates["fine-tuning"],
        ),
        Method(
            "LoRA",
            {"chunk": fast, "rank": RANK},
            lambda model, rate: lora(model, rate, fast),
            rates["LoRA"],
        ),
        Method(
            "one level", **stacked(lambda rate: adam_levels(plan.chunks[:1], rate)), rates=rates["one level"]
        ),
        Method(
            "three levels",
            **stacked(lambda rate: adam_levels(plan.chunks, rate)),
            rates=rates["three levels"],
        ),
        *averaged,
    ]
