"""Callbacks of the Trainer: stopping on a signal, step times, steps on a bar."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nested_learning._progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one has the handlers of before."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen within the block. Only a program's main thread gets signals; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in SIGNALS:
            signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """After the step in which a signal came: save a checkpoint and stop, on all processes alike.

    Args:
        request: the signal that the handler of this process remembers.
        agree: maps this process's signal number (0 for none) to the largest over all processes, so that
            none of them goes on alone into a collective call.
    """

    def __init__(self, request: StopRequest, agree: Callable[[int], int]) -> None:
        self.request = request
        self.agree = agree
        self.stopped_by: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        number = self.agree(self.request.signal or 0)
        if number and state.global_step < state.max_steps:
            self.stopped_by = number
            control.should_save = True
            control.should_training_stop = True
        return control


class StepTimer(TrainerCallback):
    """Seconds of each training step, data loading included, evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._mark = 0.0

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    on_train_begin = on_evaluate = on_save = _reset

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._mark)
        self._reset()


class StepCounter(TrainerCallback):
    """The Trainer's steps on a bar, with the last losses behind it.

    Args:
        bar: counts the steps; its total follows the run's, which is an estimate where time is limited.
    """

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.begin(None, state.global_step)  # all of a limited time are known after a step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.total, self.bar.done = state.max_steps, state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, label in (("loss", "loss"), ("eval_loss", "validation")):
            if logs and key in logs:
                self._shown[label] = f"{logs[key]:.3f}"
        self.bar.note = ", ".join(f"{label} {value}" for label, value in self._shown.items())
