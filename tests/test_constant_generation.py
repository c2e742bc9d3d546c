from __future__ import annotations

import pytest

from benchmarks.generation import measure


@pytest.mark.slow
def test_hope_generates_in_constant_time_and_memory():
    figures = measure("hope-tiny")
    assert figures["ratio_of_time"] <= 1.15
    (size,) = set(figures["cache_bytes_after"].values())
    # Where a context ends with a chunk, the anchors may be the current weights and are then held once.
    assert max(figures["cache_bytes"].values()) <= size


def test_the_transformers_cache_grows():
    """The same measure tells a growing cache from a constant one."""
    figures = measure("transformer-tiny", contexts=(8, 64), tokens=4)
    assert figures["cache_bytes"][64] == 8 * figures["cache_bytes"][8]
    assert figures["cache_bytes_after"][8] > figures["cache_bytes"][8]
