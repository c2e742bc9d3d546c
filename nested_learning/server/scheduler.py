"""One thread that runs the model for everybody, in short turns.

Jobs are generators: each `next` is a turn, such as one token of an answer or one chunk of a lesson. Users
take turns in a ring, and so do the jobs of one user. A job that nobody waits for runs while no other is
there, or within a share of the time.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


class JobCancelled(Exception):
    """End of a job whose further turns nobody wants."""


class Job:
    """Turns that are taken on the scheduler's thread.

    Attributes:
        result: the generator's return value, or its exception; `JobCancelled` where it was cancelled.
    """

    def __init__(self, turns: Generator[None, None, Any], is_awaited: Callable[[], bool]) -> None:
        self._turns = turns
        self._is_awaited = is_awaited
        self._cancelled = False
        self.result: Future[Any] = Future()
        # From here on nobody who stops waiting can cancel it: the thread could not set what it came to.
        self.result.set_running_or_notify_cancel()

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for it; one that was cancelled is put away at once."""
        return self._cancelled or self._is_awaited()

    def cancel(self) -> None:
        """Let no further turn be taken."""
        self._cancelled = True

    def take_turn(self, count: int) -> bool:
        """Take up to `count` turns in a row. Returns whether there are more."""
        try:
            for _ in range(count):
                if self._cancelled:
                    self._turns.close()
                    self.result.set_exception(JobCancelled())
                    return False
                next(self._turns)
            return True
        except StopIteration as end:
            self.result.set_result(end.value)
        except BaseException as error:  # a job's end is its own, whatever it is: the thread goes on
            self.result.set_exception(error)
        return False


class DutyCycle:
    """Time of jobs that nobody waits for, held below a share of all time since others came.

    Args:
        share: largest share, between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._spent = {True: 0.0, False: 0.0}
        self._last = 0.0

    def begin(self) -> None:
        """Start counting anew: jobs that are waited for have come, or the last of them has gone."""
        self._spent = {True: 0.0, False: 0.0}

    def add(self, seconds: float, is_awaited: bool) -> None:
        """Count a turn."""
        self._spent[is_awaited] += seconds
        if not is_awaited:
            self._last = seconds

    def has_room(self) -> bool:
        """Whether a turn as long as the last one would stay within the share."""
        spent = self._spent[False] + self._last
        return spent < self._share * (spent + self._spent[True])


class Scheduler:
    """The thread and its ring of users.

    Args:
        duty: share of the time of jobs that nobody waits for.
        kept: number of users between whom switching is free.
        turns: turns in a row that a user takes when there are more users than that.
    """

    def __init__(self, duty: float = 0.2, kept: int = 1, turns: int = 16) -> None:
        self.duty = DutyCycle(duty)
        self._kept = kept
        self._turns = turns
        self._ring: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._visitors = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the present turn; all jobs are cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        for jobs in self._ring.values():
            for job in jobs:
                job.cancel()
                job.take_turn(1)
        self._ring.clear()

    def submit(
        self, user: str, turns: Generator[None, None, Any], is_awaited: Callable[[], bool] = lambda: True
    ) -> Job:
        """A job of a user, in line behind those that the user has.

        Args:
            user: name of the user.
            turns: the job, each `next` of which is a turn.
            is_awaited: asked before each turn: whether somebody waits for the job.

        Raises:
            JobCancelled: the scheduler has ended.
        """
        job = Job(turns, is_awaited)
        with self._changed:
            if self._stopping:
                raise JobCancelled("the scheduler has ended")
            self._ring.setdefault(user, deque()).append(job)
            self._changed.notify_all()
        return job

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """Other threads may take the model's lock inside the scope: the scheduler leaves it free between
        turns, long enough for a thread that waits for it."""
        with self._changed:
            self._visitors += 1
        try:
            yield
        finally:
            with self._changed:
                self._visitors -= 1

    # The thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        contended = False
        while True:
            with self._changed:
                while not self._ring and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                user, job, both, count = self._choose()
            if both != contended:
                contended = both
                self.duty.begin()
            if self._visitors:
                time.sleep(0.0005)  # a thread that waits for a lock gets it only if nobody takes it at once
            begun, is_awaited = time.perf_counter(), job.is_awaited
            goes_on = job.take_turn(count if is_awaited else 1)
            self.duty.add(time.perf_counter() - begun, is_awaited)
            with self._changed:
                self._put_back(user, job, goes_on)

    def _choose(self) -> tuple[str, Job, bool, int]:
        """(user, job, whether there are jobs of both kinds, turns in a row)."""
        first: dict[bool, dict[str, Job]] = {True: {}, False: {}}
        for user, jobs in self._ring.items():
            for job in jobs:
                first[job.is_awaited].setdefault(user, job)
        both = bool(first[True] and first[False])
        wanted = not self.duty.has_room() if both else bool(first[True])
        user, job = next(iter(first[wanted].items()))
        return user, job, both, self._turns if len(first[True]) > self._kept else 1

    def _put_back(self, user: str, job: Job, goes_on: bool) -> None:
        """Move user and job to the end of the ring, or the job out of it."""
        jobs = self._ring[user]
        jobs.remove(job)
        if goes_on:
            jobs.append(job)
        if jobs:
            self._ring.move_to_end(user)
        else:
            del self._ring[user]
