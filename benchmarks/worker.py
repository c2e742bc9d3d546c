"""A process of `--against`: the cases of this checkout with the package of a folder.

`benchmarks.against` starts it in the root of this checkout: `python -m benchmarks.worker FOLDER CASE SETTINGS
THREADS`. It answers in lines of JSON: first {"works": [names]}, or {"error": sentence}; then, for each line
{"call": name} that it reads, {"start": seconds, "end": seconds} of that call, by the monotonic clock that all
processes of a machine share. It ends when its input ends: that is, with the parent, however that ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any


def load_package(folder: Path) -> None:
    """Import nested_learning from `folder`, before anything else could import it from elsewhere.

    Raises:
        ImportError: it came from elsewhere, or does not import.
    """
    sys.path.insert(0, str(folder))
    try:
        import nested_learning
    finally:
        sys.path.remove(str(folder))
    found = Path(nested_learning.__file__).resolve()
    if folder.resolve() not in found.parents:
        raise ImportError(f"nested_learning was imported from {found.parent}, not from {folder}")


def commands() -> queue.Queue[str]:
    """The lines of standard input, read beside the work, so that its end ends a running call too."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main(folder: str, case: str, settings: str, threads: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes where errors go

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    lines = commands()
    try:
        load_package(Path(folder))
        import torch

        from benchmarks.cases import CASES

        torch.set_num_threads(int(threads))
        works = CASES[case](**json.loads(settings))
    except Exception as error:  # an old package may lack what a case needs
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(works=list(works))
    while True:
        work = works[json.loads(lines.get())["call"]]
        try:
            start = time.perf_counter()
            work()
            answer(start=start, end=time.perf_counter())
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
