"""Pseudo-terminals: what a person sees of a command, with its carriage returns, and what is left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence

from nested_learning import _progress

BAR = re.compile(r"\d+%\|.*\[\d\d:\d\d, (\d\d:\d\d|\?) left")  # one of this package's, with the time left
ANY_BAR = re.compile(r"%\||\d\d:\d\d[],<]|it/s")  # or of any other that tqdm draws


class Terminal:
    """A pseudo-terminal that remembers what is written to it.

    Args:
        columns: its width; 0 for one that does not tell it, as terminals of some programs do.

    Attributes:
        descriptor: of the side that a program writes to.
        text: all that was written so far.
    """

    def __init__(self, columns: int = 0) -> None:
        self.leader, self.descriptor = pty.openpty()
        fcntl.ioctl(
            self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24 * bool(columns), columns, 0, 0)
        )
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last writer has closed it
            while part := os.read(self.leader, 65536):
                self.text += part.decode("utf-8", "replace")

    def close(self) -> None:
        """Wait until all that was written is in `text`."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)
        self._reader.join(10)
        os.close(self.leader)

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Wait until a pattern is found in `text`."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.text!r}"
            time.sleep(0.02)

    def paintings(self) -> list[str]:
        """What each carriage return brought, without spaces at the end."""
        return [part.rstrip() for part in re.split(r"[\r\n]+", self.text)]

    def screen(self) -> list[str]:
        """The lines as they stand at the end, but for empty ones at the bottom."""
        lines = [""]
        column = 0
        for part in re.findall(r"\r|\n|[^\r\n]+", self.text):
            if part == "\r":
                column = 0
            elif part == "\n":
                lines.append("")
            else:
                line = lines[-1].ljust(column)
                lines[-1] = line[:column] + part + line[column + len(part) :]
                column += len(part)
        lines = [line.rstrip() for line in lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines


@contextlib.contextmanager
def terminal_as_stderr(monkeypatch, columns: int = 0) -> Iterator[Terminal]:
    """Let standard error be a terminal in the block; what it got is whole behind the block."""
    terminal = Terminal(columns)
    try:
        with (
            open(terminal.descriptor, "w", encoding="utf-8", closefd=False) as stream,
            monkeypatch.context() as patch,
        ):
            patch.setattr(sys, "stderr", stream)
            yield terminal
    finally:
        terminal.close()


def show_at_once(monkeypatch) -> None:
    """Let bars appear without delay, and be painted once at least, however short the work is."""
    painted = threading.Event()
    write, start = _progress._Painter._write, _progress._Painter.start

    def noted(self, text: str) -> None:
        write(self, text)
        painted.set()

    def awaited(self) -> None:
        painted.clear()
        start(self)
        assert painted.wait(30)

    monkeypatch.setattr(_progress, "DELAY", 0.0)
    monkeypatch.setattr(_progress._Painter, "_write", noted)
    monkeypatch.setattr(_progress._Painter, "start", awaited)


@contextlib.contextmanager
def program_in_terminal(
    arguments: Sequence[str], columns: int = 0, **options: object
) -> Iterator[tuple[Terminal, subprocess.Popen[bytes]]]:
    """Run a program whose controlling terminal it is, so that Ctrl-C typed into `leader` interrupts it."""
    terminal = Terminal(columns)
    descriptor = terminal.descriptor

    def take() -> None:
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits that it is ignored

    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=descriptor,
        stdout=descriptor,
        stderr=descriptor,
        start_new_session=True,
        preexec_fn=take,
        **options,  # type: ignore[call-overload]
    )
    try:
        yield terminal, process
    finally:
        process.kill()
        process.wait()
        terminal.close()
