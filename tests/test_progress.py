"""Bars with the time left: on terminals alone, only for long work, gone without a trace."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import datasets
import huggingface_hub.utils as hub
import pytest
from transformers.utils import logging

import nested_learning
from nested_learning import _progress
from nested_learning._progress import progress, quiet
from tests.cli.terminals import BAR, program_in_terminal, show_at_once, terminal_as_stderr

LONG = """\
import sys, time
from nested_learning._progress import progress
try:
    with progress("learning", 1000, "token") as bar:
        while True:
            time.sleep(0.05)
            bar.advance(1 if bar.done < 900 else 0)
            if {ends} and bar.done == 60:
                break
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
"""


def work(steps=10, what="learning", seconds=0.03):
    with progress(what, steps, "token") as bar:
        for _ in range(steps):
            time.sleep(seconds)
            bar.advance()


@pytest.mark.parametrize("columns", [0, 40, 120])
def test_a_bar_with_the_time_left_fits_the_terminal_and_goes(monkeypatch, columns):
    show_at_once(monkeypatch)
    monkeypatch.setattr(_progress, "PERIOD", 0.02)
    with terminal_as_stderr(monkeypatch, columns) as terminal:
        work()
    bars = [line for line in terminal.paintings() if line]
    assert len(bars) > 3
    assert all(line.startswith("learning:") and len(line) < (columns or 80) for line in bars)
    if columns != 40:
        assert all(BAR.search(line) for line in bars)
    assert any("00:00 left" in line or columns == 40 for line in bars)
    assert terminal.screen() == []


def test_the_counts_and_notes_are_shown(monkeypatch):
    show_at_once(monkeypatch)
    monkeypatch.setattr(_progress, "PERIOD", 0.02)
    with terminal_as_stderr(monkeypatch, 120) as terminal, progress("training", unit="step") as bar:
        bar.begin(2000, 500)
        time.sleep(0.1)
        bar.done, bar.note = 1500, "loss 2.1"
        time.sleep(0.1)
    assert "training: 0 step [00:00" in terminal.text
    assert " 25%|" in terminal.text
    assert "? left" in terminal.text  # what was done before says nothing about the speed
    assert "75%|" in terminal.text
    assert "1.50k/2.00k steps [00:00, 00:00 left, loss 2.1]" in terminal.text


def test_work_without_steps_shows_its_time(monkeypatch):
    show_at_once(monkeypatch)
    with terminal_as_stderr(monkeypatch) as terminal, progress("writing"):
        pass
    assert terminal.paintings()[1] == "writing [00:00]"
    assert terminal.screen() == []


def test_short_work_shows_nothing(monkeypatch):
    with terminal_as_stderr(monkeypatch) as terminal:
        work()
    assert terminal.text == ""


def test_after_an_exception_the_line_is_empty(monkeypatch):
    show_at_once(monkeypatch)
    with terminal_as_stderr(monkeypatch) as terminal:
        with pytest.raises(RuntimeError), progress("learning", 10, "token"):
            raise RuntimeError
        print("error: no", file=sys.stderr)
        work(what="again")
    assert "again:" in terminal.text
    assert terminal.screen() == ["error: no"]


def test_inner_work_has_no_bar_of_its_own(monkeypatch):
    show_at_once(monkeypatch)
    with terminal_as_stderr(monkeypatch) as terminal:
        with progress("outer", 2, "run"):
            work(what="inner")
        work(what="later")
    assert "outer:" in terminal.text
    assert "later:" in terminal.text
    assert "inner" not in terminal.text


def test_other_threads_and_processes_have_none(monkeypatch):
    show_at_once(monkeypatch)
    with terminal_as_stderr(monkeypatch) as terminal:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            work()
            patch.setenv("RANK", "0")
            patch.setattr("multiprocessing.parent_process", lambda: "a process")
            work()
    assert terminal.text == ""


def test_a_pipe_gets_nothing(monkeypatch):
    monkeypatch.setattr(_progress, "DELAY", 0.0)
    reader, writer = os.pipe()
    with monkeypatch.context() as patch, open(writer, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        work()
        patch.setattr(sys, "stderr", None)
        work()
    with open(reader) as stream:
        assert stream.read() == ""


def test_a_terminal_that_goes_away_stops_no_work(monkeypatch):
    show_at_once(monkeypatch)
    monkeypatch.setattr(_progress, "PERIOD", 0.01)
    with terminal_as_stderr(monkeypatch), progress("learning", 10, "token") as bar:
        sys.stderr.close()
        time.sleep(0.1)
        bar.advance()
    assert bar.done == 1


def bars_of_others():
    return (
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
        not datasets.are_progress_bars_disabled(),
    )


@contextlib.contextmanager
def switched(transformers_on, hub_on, datasets_on):
    """Bars of other libraries on or off, and as they were behind the block."""
    before = bars_of_others()

    def switch(first, second, third):
        (logging.enable_progress_bar if first else logging.disable_progress_bar)()
        (hub.enable_progress_bars if second else hub.disable_progress_bars)()
        (datasets.enable_progress_bars if third else datasets.disable_progress_bars)()

    switch(transformers_on, hub_on, datasets_on)
    try:
        yield
    finally:
        switch(*before)


@pytest.mark.parametrize("states", [(True, True, True), (True, False, True), (False, True, False)])
def test_quiet_silences_other_libraries_and_leaves_them_as_they_were(monkeypatch, states):
    show_at_once(monkeypatch)
    with switched(*states), terminal_as_stderr(monkeypatch) as terminal:
        assert bars_of_others() == states
        with nested_learning.quiet():
            assert bars_of_others() == (False, False, False)
            assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
            work()
            with quiet():
                pass
            work()
        assert bars_of_others() == states
        with quiet(False):
            assert bars_of_others() == states
        assert terminal.text == ""
        with pytest.raises(RuntimeError), quiet():
            raise RuntimeError
        with progress("learning", 1, "token"):
            assert bars_of_others() == (False, False, False)
        assert bars_of_others() == states
    assert "learning" in terminal.text


def test_after_two_seconds_and_gone_after_ctrl_c():
    """In a real program, whose terminal writes ^C behind the bar."""
    start = time.monotonic()
    with program_in_terminal(["-c", LONG.format(ends=False)], 60) as (terminal, process):
        terminal.wait_for(r"[1-9]\d*/1\.00k")
        assert time.monotonic() - start > 2
        os.write(terminal.leader, b"\x03")
        assert process.wait(30) == 0
    assert "^C" in terminal.text
    assert terminal.screen() == ["interrupted"]


def test_the_end_of_a_real_program_leaves_nothing():
    with program_in_terminal(["-c", LONG.format(ends=True)]) as (terminal, process):
        assert process.wait(60) == 0
    assert BAR.search(terminal.text)
    assert terminal.screen() == []
