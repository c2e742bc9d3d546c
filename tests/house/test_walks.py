"""Bounds on how many functions, in how many files, a reader has to follow for the four main ways."""

from __future__ import annotations

import pytest

from tests.house.walk import WALKS

# functions, files
BOUNDS = {"forward": (70, 16), "backward": (90, 20), "layer": (38, 12), "token": (48, 14)}


@pytest.mark.parametrize("name", WALKS)
def test_bound(name):
    found = WALKS[name]()
    functions, files = BOUNDS[name]
    assert len(found) <= functions, "\n".join(sorted(f"{file}: {function}" for file, function in found))
    assert len({file for file, _ in found}) <= files, sorted({file for file, _ in found})
