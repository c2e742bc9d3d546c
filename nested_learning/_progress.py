"""Bars with the time left, for work that takes longer than two seconds, on a terminal alone.

A thread of its own paints the bar, so that whoever works only counts, and an interruption, which comes to the
main thread, meets no half-written line. One bar is shown at a time, that of the outermost work; what runs in
other threads, in the processes of an evaluation or in those of a distributed run but the first shows none.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

DELAY = 2.0  # seconds of work before its bar appears
PERIOD = 0.2  # seconds between two paintings
COLUMNS = 80  # of a terminal that does not tell its width
ECHO = 2  # columns of the ^C that a terminal writes behind the bar
FORM = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit}s [{elapsed}, {remaining} left{postfix}]"
FRACTION = 1000  # counts from here on are shown as 1.2k
# Other libraries read these once, when they are imported; later their functions have the say.
OFF_SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


class Progress:
    """Count of the work that is done, and of all that there is.

    Attributes:
        what: the work, in a word or two.
        total: number of units of all the work; None where it is not known.
        unit: what is counted, in the singular.
        done: units that are done.
        note: words that stand behind the bar.
    """

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        self.what, self.unit, self.note = what, unit, ""
        self.begin(total)

    def begin(self, total: float | None, done: float = 0) -> None:
        """Count from here on, with what was done before, which says nothing about the speed."""
        self.total, self.done, self._before, self._start = total, done, done, time.monotonic()

    def advance(self, count: float = 1) -> None:
        """Count further units as done."""
        self.done += count

    def line(self, columns: int, plain: bool = False) -> str:
        """The bar as a line of at most `columns` characters, in ASCII where it is to be `plain`."""
        from tqdm import tqdm

        elapsed = time.monotonic() - self._start
        if not self.unit:
            return f"{self.what} [{tqdm.format_interval(elapsed)}]{self.note and f' {self.note}'}"[:columns]
        most = max(self.done, self.total or 0)
        return str(
            tqdm.format_meter(
                self.done,
                self.total,
                elapsed,
                ncols=columns,
                prefix=self.what,
                ascii=plain,
                unit=f" {self.unit}",
                unit_scale=most >= FRACTION,
                bar_format=FORM if self.total else None,
                postfix=self.note,
                initial=self._before,
            )
        )


class _Painter(threading.Thread):
    """Shows a bar on a terminal until it is told to end, and leaves an empty line."""

    def __init__(self, progress: Progress, terminal: TextIO) -> None:
        super().__init__(name="progress bar", daemon=True)
        self.progress, self.terminal = progress, terminal
        self.ended = threading.Event()

    def run(self) -> None:
        if self.ended.wait(DELAY):
            return
        plain = not (getattr(self.terminal, "encoding", None) or "").lower().startswith("utf")
        try:
            while True:
                room = max(_columns(self.terminal) - 1, ECHO + 1)  # the last column would break the line
                line = self.progress.line(room - ECHO, plain)
                self._write(f"\r{line.ljust(room - ECHO)}")
                if self.ended.wait(PERIOD):
                    break
            self._write(f"\r{' ' * room}\r")
        except (OSError, ValueError):  # the terminal is gone; the work goes on
            return

    def _write(self, text: str) -> None:
        self.terminal.write(text)
        self.terminal.flush()

    def end(self) -> None:
        self.ended.set()
        self.join(1.0)  # a terminal that stands still holds up nothing


_working = False  # whether there is an outer work, which has the bar
_silent = False


@contextmanager
def progress(what: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
    """Show a bar for the work in the block, if it takes longer than two seconds and someone looks on.

    Bars of transformers, datasets and huggingface_hub for parts of the work are not shown meanwhile.

    Args:
        what: the work, in a word or two.
        total: number of units of all the work; None where it is not known, or changes later.
        unit: what is counted, in the singular; "" for work that has no steps, whose time is shown.

    Yields:
        the count, to be advanced.
    """
    global _working
    count = Progress(what, total, unit)
    if _working or threading.current_thread() is not threading.main_thread():
        yield count
        return
    terminal = _terminal()
    painter = None if terminal is None else _Painter(count, terminal)
    with _others_silent():
        _working = True
        try:
            if painter:
                painter.start()
            yield count
        finally:
            _working = False
            if painter:
                painter.end()


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Show no bars in the block, also none of transformers, datasets and huggingface_hub.

    Args:
        silent: False leaves everything as it is.
    """
    global _silent
    if not silent:
        yield
        return
    before, _silent = _silent, True
    try:
        with _others_silent():
            yield
    finally:
        _silent = before


def on_terminal() -> bool:
    """Whether standard error is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _terminal() -> TextIO | None:
    """The terminal that a bar would stand on; None where none is to be shown."""
    first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
    return sys.stderr if first and not _silent and on_terminal() else None


def _columns(terminal: TextIO) -> int:
    """Width of a terminal; some say that it is zero, and some do not say."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


@contextmanager
def _others_silent() -> Iterator[None]:
    """Let other libraries show no bars of their own in the block, nor in processes that begin in it."""
    before = {name: os.environ.get(name) for name in OFF_SWITCHES}
    os.environ.update(dict.fromkeys(OFF_SWITCHES, "1"))
    transformers = sys.modules.get("transformers.utils.logging")
    if transformers and not transformers.is_progress_bar_enabled():
        transformers = None
    modules = [sys.modules.get(name) for name in ("huggingface_hub.utils.tqdm", "datasets.utils.tqdm")]
    others = [(module, module.are_progress_bars_disabled()) for module in modules if module]
    if transformers:
        transformers.disable_progress_bar()
    for module, was_off in others:
        if not was_off:
            module.disable_progress_bars()
    try:
        yield
    finally:
        if transformers:
            transformers.enable_progress_bar()  # and huggingface_hub's with them
        for module, was_off in others:
            if was_off != module.are_progress_bars_disabled():
                module.disable_progress_bars() if was_off else module.enable_progress_bars()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
