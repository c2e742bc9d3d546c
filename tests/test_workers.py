"""Worker processes end with the process that they work for."""

import os
import signal
import subprocess
import sys
import time

import pytest

WORK = """
import multiprocessing, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from nested_learning._workers import at_work, end_with_parent, interrupts_held

def work(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
"""

PARENT = """
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    start = end_with_parent if sys.argv[2] == "watched" else None
    with ProcessPoolExecutor(1, context, start) as pool:
        pool.submit(work, sys.argv[1]).result()
"""


def within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path, number):
    script = tmp_path / "parent.py"
    script.write_text(WORK + PARENT)
    started = {}
    for way in ("watched", "left"):
        path = tmp_path / way
        parent = subprocess.Popen([sys.executable, str(script), str(path), way])
        try:
            assert within(60, lambda path=path: path.is_file() and path.read_text())
            started[way] = int(path.read_text())
        finally:
            parent.send_signal(number)
            parent.wait(60)
    try:
        assert within(20, lambda: not alive(started["watched"]))
        assert alive(started["left"])  # what is tested would else hold by itself
    finally:
        if alive(started["left"]):
            os.kill(started["left"], signal.SIGKILL)


INTERRUPTED = """
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    context = multiprocessing.get_context("spawn")
    with at_work(ProcessPoolExecutor(2, context, end_with_parent)) as pool:
        with interrupts_held():
            pool.submit(os.getpid).result()  # this worker waits for work when the interrupt comes
            future = pool.submit(work, sys.argv[1])
            late = pool.submit(time.sleep, 600)  # its process may still be importing
        future.result()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "parent"])
def test_an_interrupt_ends_a_pool_at_once_and_without_a_word_of_its_workers(tmp_path, whole_group):
    script, path = tmp_path / "parent.py", tmp_path / "worker"
    script.write_text(WORK + INTERRUPTED)
    parent = subprocess.Popen(
        [sys.executable, str(script), str(path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert within(60, lambda: path.is_file() and path.read_text())
        worker = int(path.read_text())
        (os.killpg if whole_group else os.kill)(parent.pid, signal.SIGINT)
        told = parent.communicate(timeout=60)[1]
    finally:
        parent.kill()
    assert not alive(worker)
    assert told.count("Traceback") == 1  # the parent's own
