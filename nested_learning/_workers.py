"""Processes that work for another one, and end with it."""

from __future__ import annotations

import multiprocessing
import os
from threading import Thread


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has ended, also where that was killed.

    Without it a worker of a ProcessPoolExecutor whose parent was killed finishes its work and then waits for
    more for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, name="end with parent", daemon=True).start()
