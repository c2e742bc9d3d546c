"""Flags of levels: each one that there is says that levels are given."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from nested_learning.cli.level_flags import LEVEL_FLAGS, add_level_flags, gives_levels


def test_the_list_names_every_flag():
    parser = ArgumentParser(exit_on_error=False)
    before = {action.dest for action in parser._actions}
    add_level_flags(parser, chunk_sizes=(4,), level_lr=0.1)
    assert {action.dest for action in parser._actions} - before == set(LEVEL_FLAGS)


@pytest.mark.parametrize("flag", LEVEL_FLAGS)
def test_each_alone_gives_levels(flag):
    assert gives_levels(["--model", "m", f"--{flag}", "1"])
    assert gives_levels([f"--{flag}=1"])
    assert not gives_levels(["--model", flag])
