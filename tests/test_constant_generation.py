from __future__ import annotations

import pytest

from benchmarks.generation import measure


@pytest.mark.slow
def test_hope_generates_in_constant_time_and_memory():
    figures = measure("hope-tiny")
    assert figures["ratio_of_time"] <= 1.15
    # At a chunk's boundary anchors and current weights are the same numbers and held once; within one, twice.
    for moment in ("cache_bytes", "cache_bytes_after"):
        assert len(set(figures[moment].values())) == 1


def test_the_transformers_cache_grows():
    """The same measure tells a growing cache from a constant one."""
    figures = measure("transformer-tiny", contexts=(8, 64), tokens=4)
    assert figures["cache_bytes"][64] == 8 * figures["cache_bytes"][8]
    assert figures["cache_bytes_after"][8] > figures["cache_bytes"][8]
