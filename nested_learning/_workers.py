"""Processes that work for another one, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from threading import Thread


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has ended, also where that was killed.

    Without it a worker of a ProcessPoolExecutor whose parent was killed finishes its work and then waits for
    more for ever. An interrupt (Ctrl-C reaches every process of a terminal) is the parent's to act on.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, name="end with parent", daemon=True).start()


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def at_work(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with the block: at once where an exception leaves it, an interrupt too.

    The pool alone would first wait for what they are at, which may take hours, and then throw it away.
    """
    with pool:
        try:
            yield pool
        except BaseException:
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
            raise


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A block in which processes are started that no interrupt reaches; one of this process comes after it.

    Until `end_with_parent` runs, a new process would answer an interrupt with a traceback of its imports.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which new processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
