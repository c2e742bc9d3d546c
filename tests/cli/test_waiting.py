"""How threads wait for each other in a command."""

import sys

import pytest

from nested_learning.cli import main


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not loaded torch and says nothing of waiting."""
    for name in main.WAITING:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    return monkeypatch


def waiting():
    return {name: main.os.environ[name] for name in main.WAITING if name in main.os.environ}


def test_threads_wait_asleep(fresh, capsys):
    assert main.main(["--version"]) == 0
    assert waiting() == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", main.WAITING)
def test_the_environment_decides(fresh, name):
    fresh.setenv(name, "1000")
    main.wait_asleep()
    assert waiting() == {name: "1000"}


def test_nothing_is_set_that_has_no_effect(fresh):
    fresh.setitem(sys.modules, "torch", object())
    main.wait_asleep()
    assert waiting() == {}
