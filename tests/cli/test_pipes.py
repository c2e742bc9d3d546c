"""Streams that nobody reads, or that the caller has closed."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from safetensors.torch import load_file

from nested_learning.cli.main import main
from tests.cli.test_cli import run_folder, text  # noqa: F401 - fixtures


class _LeftPipe(io.StringIO):
    """A stdout whose reader leaves after some characters."""

    def __init__(self, path, room):
        super().__init__()
        self.file, self.room = path.open("w"), room

    def write(self, written):
        self.room -= len(written)
        if self.room < 0:
            raise BrokenPipeError
        return len(written)

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("room", [0, 3])
def test_a_state_is_saved_though_nobody_reads_the_text(monkeypatch, capsys, run_folder, tmp_path, room):  # noqa: F811
    argv = ["generate", run_folder, "--prompt", "ab", "--max_new_tokens", "6", "--seed", "1"]
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    assert main([*argv, "--save_state", str(whole)]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", _LeftPipe(tmp_path / "out", room))
        assert main([*argv, "--save_state", str(alone)]) == 0
        assert main(argv) == 0
    assert f"nobody read on; state saved in {alone}" in capsys.readouterr().err
    expected, found = load_file(whole), load_file(alone)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_closed_streams_are_as_empty_ones(monkeypatch, capsys, run_folder):  # noqa: F811
    for name in ("stdin", "stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sys.{name}", None)
            assert main(["info", "hope-tiny"]) == 0
            assert main(["lens", run_folder, "--text", "-"]) == 2
            assert getattr(sys, name) is not None
    assert "the text has 0 token(s)" in capsys.readouterr().err
