"""Every command takes --quiet; what takes long shows a bar on a terminal, and nothing in a pipe."""

from __future__ import annotations

import io

import pytest

from nested_learning.cli.main import COMMANDS, main
from nested_learning.evals import known_tasks, registry
from tests.cli.terminals import ANY_BAR, BAR, Terminal, show_at_once, terminal_as_stderr
from tests.cli.test_chat import GREEDY, LEVELS, folder  # noqa: F401 - a fixture
from tests.cli.test_cli import DATA, MODEL, text  # noqa: F401 - a fixture
from tests.cli.test_lens import hope_folder  # noqa: F401 - a fixture
from tests.evals.guessing import Coin

# What each command's bar says; None where all is done at once, or bars are of other libraries.
BARS = {
    "train": "training",
    "generate": "generating",
    "score": "scoring by position",
    "info": None,
    "levels": None,
    "lens": "reading",
    "chat": "learning",
    "serve": None,
    "export": "writing the checkpoint",
    "adapt": "training",
    "compare": "comparing",
    "eval": "evaluating",
}


@pytest.fixture(scope="module")
def memory(folder, tmp_path_factory):  # noqa: F811
    """The memory file of a short chat."""
    path = str(tmp_path_factory.mktemp("memory") / "memory.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("hello there\n"))
        assert main(["chat", "--model", folder, *LEVELS, *GREEDY, "--memory", path, "--quiet"]) == 0
    return path


@pytest.fixture
def arguments(request, folder, hope_folder, text, memory, tmp_path, monkeypatch):  # noqa: F811
    """A short call of each command."""
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there\n"))
    known_tasks()
    monkeypatch.setattr(registry, "_TASKS", {"coin": Coin})
    monkeypatch.setattr(registry, "_METHODS", {m.name: m for m in Coin(None).methods()})
    steps = ["--steps", "2", "--batch_size", "2", "--lr", "1e-2", "--data", text, *DATA]
    rarely = ["--eval_every", "100", "--save_every", "100", "--output", out]
    return {
        "train": [*MODEL, *steps, *rarely],
        "generate": [hope_folder, "--prompt", "a rose", "--max_new_tokens", "4", "--json"],
        "score": [hope_folder, "--data", text, "--max_blocks", "2", "--block_size", "16"],
        "info": ["hope-tiny"],
        "levels": ["hope-tiny"],
        "lens": [hope_folder, "--text", text, "--max_tokens", "40", "--output", f"{out}.html"],
        "chat": ["--model", folder, *LEVELS, *GREEDY],
        "serve": [
            *["--model", folder, "--memories", out],
            *["--keys", str(tmp_path / "keys.txt"), "--add_key", "anna"],
        ],
        "export": ["--model", folder, "--memory", memory, "--output", out],
        "adapt": ["--model", folder, *LEVELS, *steps, *rarely],
        "compare": [
            *["hope-tiny", "transformer-tiny", "--no-memory", "--validation_batches", "1"],
            *["--steps", "1", "--batch_size", "2", "--data", text, *DATA[:2]],
        ],
        "eval": ["coin", "--budget", "smoke"],
    }


def test_every_command_has_a_call_here(arguments):
    assert arguments.keys() == BARS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bar_on_a_terminal_none_with_quiet(command, arguments, monkeypatch):
    show_at_once(monkeypatch)
    monkeypatch.setattr("nested_learning._progress.PERIOD", 0.01)
    argv = [command, *arguments[command]]
    if BARS[command]:
        with terminal_as_stderr(monkeypatch) as loud:
            assert main(argv) == 0
        assert f"\r{BARS[command]}" in loud.text
        assert BAR.search(loud.text) or command == "export"
        assert not any(ANY_BAR.search(line) for line in loud.screen())
        monkeypatch.setattr("sys.stdin", io.StringIO("hello there\n"))
        argv += ["--overwrite"] if command in ("train", "adapt") else []
        argv = [f"{each}-quiet" if command == "export" and each.endswith("out") else each for each in argv]
    with terminal_as_stderr(monkeypatch) as silent:
        assert main([*argv, "--quiet"]) == 0
    assert not ANY_BAR.search(silent.text)
    assert "\r" not in silent.text.replace("\r\n", "\n")


@pytest.mark.parametrize("command", [command for command, bar in BARS.items() if bar])
def test_nothing_in_a_pipe(command, arguments, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nested_learning._progress.DELAY", 0.0)
        assert main([command, *arguments[command]]) == 0
    err = capsys.readouterr().err
    assert not ANY_BAR.search(err)
    assert "\r" not in err


def test_a_screen_knows_overwriting():
    terminal = Terminal()
    terminal.close()
    terminal.text = "a bar 50%\rb\r\nnext\r    \r\r\n"
    assert terminal.screen() == ["b bar 50%"]
    assert terminal.paintings() == ["a bar 50%", "b", "next", "", ""]
