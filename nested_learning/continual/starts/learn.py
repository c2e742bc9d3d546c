"""`learn_starts`: rates and starts for levels, learned on texts of the kind that they will read."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.deltas import DOWN, UP
from nested_learning.continual.files import fingerprint
from nested_learning.continual.find import memory_dtype
from nested_learning.continual.inputs import TextOrIds, read_batch
from nested_learning.continual.learner import Learner
from nested_learning.continual.reader import Reader
from nested_learning.continual.starts import exact as through_writes
from nested_learning.continual.starts.first_order import first_order, read_whole
from nested_learning.continual.starts.gradient import Beginning, MetaGradient
from nested_learning.continual.starts.starts import LevelStart, Starts, start_values
from nested_learning.continual.writing import DeltaWriter
from nested_learning.memory.state import Weights
from nested_learning.optimizers.checks import COUNT, NON_NEGATIVE

EVALUATIONS = 10  # of the held-out texts, evenly over the steps
FARTHEST = 80.0  # the logarithm of a rate, up or down: float32 holds e to this power
SMALLER = "give the levels smaller rates, or take a smaller lr_rates and lr_starts"


class StartsDiverged(RuntimeError):
    """Rates or starts with which the levels' losses are NaN or infinite, so that there is nothing to keep."""


@torch.inference_mode(False)
@torch.enable_grad()
def learn_starts(
    learner: Learner,
    texts: TextOrIds,
    *,
    steps: int,
    exact: bool = False,
    rank: int | None = 8,
    lr_rates: float = 0.05,
    lr_starts: float = 3e-4,
    batch_size: int = 1,
    held_out: TextOrIds | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Starts:
    """A rate and a start for each matrix that a learner's levels write to, for texts of a kind.

    Each text is read as `observe` reads it, from the starts: every token is scored before it is learned
    from. What is made small is the mean of these next-token losses, by Adam on the logarithms of the rates
    and on the starts; the base model stays as it is. With `exact=False` the gradient takes the writes'
    directions as given (`starts.first_order` has the formula) and costs what reading with learning costs;
    with `exact=True` it flows through the writes of a window (`starts.exact`). Long: it describes twelve
    arguments.

    Args:
        learner: the learner whose model, levels and way of reading are used, from its own starts where it has
            some; its memory is not touched. Give the result to `stack_levels(starts=…)`.
        texts: a text, ids [T], a list of texts or of ids, or ids [B, T]. A text is best a few windows long.
        steps: steps of Adam.
        exact: differentiate through the writes. Not for "m3", sparse levels, re-reading, distillation and
            `anchor_kl`.
        rank: rank of the starts of levels with full deltas; None for whole matrices. Levels with a rank of
            their own have starts of that one, sparse levels none.
        lr_rates: learning rate of the logarithms of the rates; 0 to learn no rates.
        lr_starts: learning rate of the starts; 0 to learn no starts.
        batch_size: texts per step, in random order.
        held_out: texts on which the mean loss is taken before the first step and ten times on the way: what
            was best on them is returned. None for the result of the last step.
        seed: seed of the order of the texts.
        progress: called after each step with its number, from 1, and the mean loss of its texts.

    Returns:
        the starts, whose `report` has the losses.

    Raises:
        ValueError: a value is out of its range, no level learns, a level has `consolidate`, there is no text
            longer than the fastest level's chunk, or `exact` does not fit.
        StartsDiverged: the loss on `held_out` is NaN or infinite before the first step, or a rate grows
            without bound.

    Warns:
        RuntimeWarning: a step was left out, since its loss or gradient was NaN or infinite.
    """
    _check_numbers({"steps": steps, "batch_size": batch_size, "rank": 1 if rank is None else rank})
    _check_learning_rates(lr_rates, lr_starts)
    _check_levels(learner.reader)
    if exact:
        through_writes.check_exact(learner.reader)
    rows = _long_enough("texts", texts, learner)
    judged = [] if held_out is None else _long_enough("held_out", held_out, learner)
    course = _Course(learner, rank, lr_rates, lr_starts, exact)
    judge, losses = _Judge(course, judged, steps), list[float]()
    for step, chosen in zip(range(1, steps + 1), _batches(rows, batch_size, seed), strict=False):
        losses.append(course.step(chosen))
        if progress is not None:
            progress(step, losses[-1])
        judge.after(step)
    report = {
        "exact": exact,
        "steps": steps,
        "losses": [_finite(loss) for loss in losses],
        "held_out": [[step, _finite(loss)] for step, loss in judge.losses.items()],
    }
    return course.starts(judge.result(), report)


def _finite(loss: float) -> float | None:
    """The loss as JSON holds it."""
    return loss if math.isfinite(loss) else None


def _batches(rows: Sequence[Tensor], size: int, seed: int) -> Iterator[list[Tensor]]:
    """Batches without end: all texts in random order, then all again in another one."""
    order, pending = torch.Generator("cpu").manual_seed(seed), list[int]()
    while True:
        chosen: list[Tensor] = []
        while len(chosen) < size:
            pending = pending or torch.randperm(len(rows), generator=order, device="cpu").tolist()
            chosen.append(rows[pending.pop()])
        yield chosen


class _Judge:
    """What of a course was best on texts held out; without any, what it ends with.

    Attributes:
        losses: on these texts, by the steps made before.
    """

    def __init__(self, course: _Course, texts: Sequence[Tensor], steps: int) -> None:
        self._course, self._texts, self._steps = course, texts, steps
        self.losses = {0: course.loss(texts)} if texts else {}
        if not all(map(math.isfinite, self.losses.values())):
            raise StartsDiverged(f"the loss on texts held out is {self.losses[0]} before a step; {SMALLER}")
        self._best = course.result()

    def after(self, step: int) -> None:
        """Take the loss if it is time: `EVALUATIONS` times over all steps, and at the last one."""
        due = step * EVALUATIONS // self._steps > (step - 1) * EVALUATIONS // self._steps
        if self._texts and (due or step == self._steps):
            loss = self._course.loss(self._texts)
            if math.isfinite(loss) and loss <= min(self.losses.values()):
                self._best = self._course.result()
            self.losses[step] = loss

    def result(self) -> tuple[LevelStart, ...]:
        """Of the course: the best, the later one of two that are equal."""
        return self._best if self._texts else self._course.result()


def _check_numbers(counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        COUNT.check(name, count)


def _check_learning_rates(lr_rates: float, lr_starts: float) -> None:
    for name, lr in (("lr_rates", lr_rates), ("lr_starts", lr_starts)):
        NON_NEGATIVE.check(name, lr)
    if not lr_rates and not lr_starts:
        raise ValueError("lr_rates and lr_starts are both 0; expected one above 0: nothing would be learned")


def _check_levels(reader: Reader) -> None:
    """Raise ValueError where no level learns, or one takes over what another has learned."""
    if not any(writer.learns for writer in reader.writers):
        raise ValueError("no level learns, since all have lr=0: give one a rate, such as lr=0.1")
    for writer in reader.writers:
        if writer.level.consolidate:
            raise ValueError(
                f"level {writer.index} has consolidate={writer.level.consolidate}, so that what it has is "
                "not of its own writes alone; leave it out where rates and starts are learned, or make the "
                "level an average (average_of)"
            )


def _long_enough(name: str, texts: TextOrIds, learner: Learner) -> list[Tensor]:
    """Ids of the texts in which a token is read after a write. ValueError if there are none."""
    size = min(writer.level.chunk_size for writer in learner.reader.writers if writer.learns)
    rows = read_batch(texts, learner.tokenizer, learner.model).rows
    found = [ids for ids in rows if len(ids) > size]
    if not found:
        raise ValueError(
            f"{name} has no text longer than the fastest chunk of {size} tokens (the longest has "
            f"{max(len(ids) for ids in rows)}): nothing would be read after a write"
        )
    return found


class _Course:
    """Rates and starts on their way.

    Args:
        learner: the learner that they are for.
        rank: rank of the starts of levels with full deltas; None for whole matrices.
        lr_rates, lr_starts: learning rates of the logarithms of the rates, and of the starts.
        exact: whether gradients flow through the writes.
    """

    def __init__(
        self, learner: Learner, rank: int | None, lr_rates: float, lr_starts: float, exact: bool
    ) -> None:
        inner = learner.reader
        self._writers = _twins(inner.writers)
        self._reader = Reader(inner.model, self._writers, inner.plan, inner.anchors)
        self._exact = exact
        earlier = inner.anchors.starts
        before = earlier.levels if earlier else tuple(LevelStart() for _ in self._writers)
        self._rates: list[Weights] = []
        self._tensors: list[Weights] = []
        self._learned: list[list[str]] = []  # names of the tensors that are learned
        self._given = [bool(start.tensors) for start in before]
        for writer, start in zip(self._writers, before, strict=True):
            self._rates.append(
                {
                    slot: torch.tensor(
                        math.log(start.rates.get(slot, 1.0)), dtype=torch.float64, device="cpu"
                    )
                    for slot in (writer.keys if writer.learns else ())
                }
            )
            with inner.workspace.bare():
                tensors = _first_tensors(writer, start, rank if lr_starts else 0)
            self._tensors.append(tensors)
            fixed = [name for name in tensors if writer.fixed_down and name.endswith(DOWN)]
            self._learned.append([name for name in tensors if name not in fixed] if lr_starts else [])
        own = [t for rates in self._rates for t in rates.values()] if lr_rates else []
        starts = [self._tensors[index][name] for index, names in enumerate(self._learned) for name in names]
        if lr_starts and not starts and not own:
            raise ValueError("sparse levels have no starts, and lr_rates is 0; expected something to learn")
        groups = [{"params": own, "lr": lr_rates}, {"params": starts, "lr": lr_starts}]
        self._optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        for t in (*own, *starts):
            t.requires_grad_()

    def _values(self) -> list[Weights]:
        """The start of each slot, in the graph of what is learned."""
        pairs = zip(self._writers, self._tensors, strict=True)
        return [start_values(tensors, w.targets, w.level.rank is None) for w, tensors in pairs]

    def _beginning(self, values: Sequence[Weights]) -> Beginning:
        rates = tuple({slot: t.item() for slot, t in own.items()} for own in self._rates)
        learned = tuple(frozenset(s for s, t in own.items() if t.requires_grad) for own in values)
        for writer, own in zip(self._writers, rates, strict=True):
            for value in own.values():
                if not abs(value) < FARTHEST:
                    raise StartsDiverged(f"a rate's factor has become e to the power of {value:g}; {SMALLER}")
            writer.rates = {slot: math.exp(value) for slot, value in own.items()}
        return Beginning(tuple({s: t.detach() for s, t in own.items()} for own in values), rates, learned)

    def loss(self, rows: Sequence[Tensor]) -> float:
        """Mean next-token loss of all pairs of texts, levels learning as they read."""
        with torch.no_grad():
            begin = self._beginning(self._values())
        losses = torch.cat([read_whole(self._reader, begin, ids)[1:] for ids in rows])
        return float(losses.mean(dtype=torch.float64))

    def step(self, rows: Sequence[Tensor]) -> float:
        """One step of Adam. Returns the mean of the texts' losses before it."""
        self._optimizer.zero_grad()
        values = self._values()
        begin = self._beginning(values)
        gradient = through_writes.exact if self._exact else first_order
        found = [gradient(self._reader, begin, ids) for ids in rows]
        loss = math.fsum(each.loss for each in found) / len(found)
        if not all(each.is_finite for each in found):
            warnings.warn(
                f"a step of learning starts was left out: its loss is {loss}, and a gradient may be NaN or "
                "infinite; try smaller rates of the levels, or a smaller lr_starts",
                RuntimeWarning,
                stacklevel=3,
            )
            return loss
        for each in found:
            self._backward(values, each, 1 / len(found))
        self._optimizer.step()
        return loss

    def _backward(self, values: Sequence[Weights], found: MetaGradient, share: float) -> None:
        """Add a text's gradient to what is learned."""
        outputs, grads = [], []
        for own, by_slot in zip(values, found.starts, strict=True):
            for slot, g in by_slot.items():
                outputs.append(own[slot])
                grads.append(g.to(own[slot].dtype) * share)
        if outputs:
            torch.autograd.backward(outputs, grads, retain_graph=True)
        for own, by_slot in zip(self._rates, found.log_rates, strict=True):
            for slot, g in by_slot.items():
                if own[slot].requires_grad:
                    before = own[slot].grad
                    own[slot].grad = g * share if before is None else before + g * share

    def result(self) -> tuple[LevelStart, ...]:
        """What the levels begin with now, on the CPU."""
        return tuple(
            LevelStart(
                {slot: math.exp(t.item()) for slot, t in rates.items()},
                {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()} if kept else {},
            )
            for rates, tensors, kept in zip(self._rates, self._tensors, self._has_start(), strict=True)
        )

    def _has_start(self) -> list[bool]:
        """Whether each level has a start, other than the factors that it would begin with anyway."""
        return [bool(names) or given for names, given in zip(self._learned, self._given, strict=True)]

    def starts(self, levels: tuple[LevelStart, ...], report: dict[str, Any]) -> Starts:
        """The result as a value of its own."""
        with self._reader.workspace.bare():
            base = fingerprint(self._reader.model)
        settings = tuple(json.loads(json.dumps(writer.level.describe())) for writer in self._writers)
        weights = tuple(tuple(target.name for target in writer.targets) for writer in self._writers)
        return Starts(base, settings, weights, levels, report)


def _twins(writers: Sequence[DeltaWriter]) -> list[DeltaWriter]:
    """Writers with the same settings and rates of their own."""
    twins: list[DeltaWriter] = []
    for writer in writers:
        faster = None if writer.faster is None else twins[writer.faster.index]
        averaged = None if writer.averaged is None else twins[writer.averaged.index]
        settings = (writer.index, writer.level, writer.targets, writer.seed)
        twins.append(DeltaWriter(*settings, faster, averaged, writer.fisher or None))
    return twins


def _first_tensors(writer: DeltaWriter, start: LevelStart, rank: int | None) -> Weights:
    """What the start of a level is made of before the first step: `rank` is for full deltas, 0 for none."""
    if not writer.learns or writer.sparse is not None:
        return {}
    tensors: Weights = {}
    for target in writer.targets:
        names = (target.name, target.name + DOWN, target.name + UP)
        dtype, device = memory_dtype(target.weight), target.weight.device
        found = {n: start.tensors[n].to(device, dtype, copy=True) for n in names if n in start.tensors}
        own = writer.level.rank or (rank and min(rank, *target.features))
        if not found and own:
            found = dict(zip(names[1:], writer.initial_factors(target, own), strict=True))
        elif not found and own is None:
            found = {target.name: torch.zeros(target.shape, dtype=dtype, device=device)}
        tensors.update(found)
    return tensors
