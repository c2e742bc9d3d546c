"""A run with `max_minutes`: its end, evaluations, checkpoints and learning rate follow the clock.

The number of steps is not fixed beforehand: on a machine that others use, too, a step can take a hundred
times as long as it took while it was measured, and whatever was fixed then is wrong for hours. So the place
in the schedule is the share of the time that is used up, and after each step the time that is left decides
whether there is another one. What comes after the last step (evaluation, checkpoint, model, sample) is set
aside, at what it cost the last time. Process 0 reads its clock and tells the others, or they would part.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nested_learning.training.config import DEFAULT_EVALS, DEFAULT_SAVES, TrainConfig
from nested_learning.training.optim import decayed, warmed_up
from nested_learning.training.process import process_state

MOST_STEPS = 2**30  # for the Trainer, which wants a number: far above what any run takes
EVALUATING = 0.5  # share of the time above which evaluations between the first and the last are left out


class RunClock(TrainerCallback):
    """The time of one run. It begins when this object is made, and goes on behind a checkpoint's.

    Args:
        config: the run, with `max_minutes`.
        now: seconds of a clock that never goes back.
    """

    def __init__(self, config: TrainConfig, now: Callable[[], float] | None = None) -> None:
        assert config.max_minutes is not None
        self.budget = 60 * config.max_minutes
        self.config = config
        self.optim = config.optim
        self.now = now or time.monotonic
        self.begun = self._mark = self.now()
        self.earlier = 0.0  # seconds of the run before it was interrupted
        self.trained_from: float | None = None  # seconds of the run when its first step began
        self.warm_at: float | None = None  # share of the training time at which warm-up ended
        self.used = 0.0  # share of the training time at the end of the last step
        self.factor = 1.0  # learning rate as a fraction of the peak
        # By what came last: seconds, and those of a step at that time.
        self.costs: dict[str, list[float]] = {}
        self._steps: deque[float] = deque(maxlen=3)  # seconds of the last steps

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, without those between an interruption and going on."""
        return self.earlier + self.now() - self.begun

    def took(self, what: str, seconds: float) -> None:
        """Keep what an "evaluation", a "checkpoint" or the "sample" costs."""
        self.costs[what] = [seconds, max(self._steps, default=math.nan)]

    def place(self) -> dict[str, Any]:
        """The place in the run: plain numbers, for a checkpoint."""
        names = ("trained_from", "warm_at", "used", "factor", "costs")
        return {"seconds": self.seconds} | {name: getattr(self, name) for name in names}

    def go_on(self, place: dict[str, Any]) -> None:
        """Go on from where `place` was taken: the time of this process so far counts, too."""
        self.earlier = float(place["seconds"])
        for name in ("trained_from", "warm_at"):
            setattr(self, name, None if place[name] is None else float(place[name]))
        self.used, self.factor = float(place["used"]), float(place["factor"])
        self.costs = {what: [float(each) for each in cost] for what, cost in place["costs"].items()}
        if not all(map(math.isfinite, (self.earlier, self.used, self.factor))):
            raise ValueError(f"its place in the time of the run is {place}")

    # What the Trainer calls ---------------------------------------------------------------------------------

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._mark = self.now()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.took("evaluation", self._lap())

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.took("checkpoint", self._lap())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate of the step that begins."""
        if self.trained_from is None:
            self.trained_from = self.seconds
        if not self._steps:  # a stream that was read up to here again is no part of a step
            self._mark = self.now()
        evaluated = (state.global_step + 1) % state.eval_steps == 0
        [self.factor] = _told(self._factor(state.global_step, evaluated))
        kwargs["lr_scheduler"].follow()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Decide whether that was the last step, and whether the model is evaluated and saved."""
        self._steps.append(self._lap())
        for cost in self.costs.values():
            if math.isnan(cost[1]) and len(self._steps) == self._steps.maxlen:  # of before the first step
                cost[1] = max(self._steps)
        before, self.used = self.used, self._share(self.seconds)
        evaluation = self._cost("evaluation")
        due = int(DEFAULT_EVALS * self.used) > int(DEFAULT_EVALS * before)
        dear = (DEFAULT_EVALS + 1) * evaluation > EVALUATING * self.budget
        evaluate = control.should_evaluate or (self.config.eval_every is None and due and not dear)
        due = int(DEFAULT_SAVES * self.used) > int(DEFAULT_SAVES * before)
        save = control.should_save or (self.config.save_every is None and due)
        # The nearest whole step: half a step too much or too little.
        left = self._left() - (evaluation if evaluate else 0.0)
        stop = left < self._steps[-1] / 2
        stop, evaluate, save = (bool(flag) for flag in _told(stop, evaluate or stop, save or stop))
        control.should_evaluate, control.should_save, control.should_training_stop = evaluate, save, stop
        more = max(2, int(left / max(self._steps[-1], 1e-9)))  # two: the Trainer must not stop by itself
        state.max_steps = state.global_step if stop else min(args.max_steps, state.global_step + more)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.max_steps = args.max_steps  # from which the Trainer has its samples per second

    # Times --------------------------------------------------------------------------------------------------

    def _lap(self) -> float:
        """Seconds since the last step, evaluation or checkpoint ended."""
        last, self._mark = self._mark, self.now()
        return self._mark - last

    def _cost(self, what: str) -> float:
        """Seconds that it would take: as long as last time, longer by as much as steps have become longer.

        They have where each of the last is longer than any of those around then; one alone says nothing.
        """
        seconds, step = self.costs.get(what, (0.0, math.nan))
        slower = min(self._steps, default=math.nan) / step if step else math.nan
        return seconds * (slower if slower > 1 else 1.0)

    def _end(self) -> float:
        """Seconds of the run at which training has to end, for all to be written in time."""
        # The model is written by itself, too, at a third of a checkpoint or a little more.
        after = self._cost("evaluation") + 1.5 * self._cost("checkpoint") + self._cost("sample")
        return self.budget - after

    def _left(self) -> float:
        return self._end() - self.seconds

    def _share(self, seconds: float) -> float:
        """Share of the training time that is used up when the run has taken so many seconds."""
        begin = self.trained_from or 0.0
        time = self._end() - begin
        return min(1.0, max(self.used, (seconds - begin) / time)) if time > 0 else 1.0

    def _factor(self, step: int, evaluated: bool) -> float:
        """The learning rate of a step as a fraction of the peak, by the time at which the step will end."""
        expected = self._steps[-1] if self._steps else 0.0
        share = self._share(self.seconds + expected)
        left = self._left() - expected - (self._cost("evaluation") if evaluated else 0.0)
        if left < expected / 2:  # the last step, as far as one can tell: the schedule ends with it
            return decayed(self.optim, 1.0)
        warm = warmed_up(self.optim, step, share)
        if warm < 1:
            return warm
        if self.warm_at is None:
            self.warm_at = share
        return decayed(self.optim, (share - self.warm_at) / max(1 - self.warm_at, 1e-9))


class ClockSchedule(LRScheduler):
    """Learning rates by a run's clock; its state has the clock's place.

    Args:
        optimizer: the optimizer, at the peak rates.
        clock: the clock of the run.
    """

    def __init__(self, optimizer: Optimizer, clock: RunClock) -> None:
        self.clock = clock
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [base * self.clock.factor for base in self.base_lrs]

    def follow(self) -> None:
        """Give the optimizer the rates of the moment."""
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("last_epoch", "base_lrs", "_last_lr")}
        return kept | {"clock": self.clock.place()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.go_on(state_dict["clock"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "clock"})


def _told(*values: float) -> list[float]:
    """The values of process 0, on all processes."""
    if process_state().num_processes == 1:
        return list(values)
    return broadcast(torch.tensor(values, dtype=torch.float32, device=process_state().device)).tolist()
