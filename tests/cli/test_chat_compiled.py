"""`nested-learning chat --compile`: the same conversation through torch.compile."""

from __future__ import annotations

import pytest

from nested_learning.continual import compiled_calls
from tests.cli.test_chat import chat, folder  # noqa: F401 - fixtures
from tests.continual.test_compiled_learner import Counting


@pytest.mark.slow
def test_the_same_answers_without_compiling_again(chat, monkeypatch):  # noqa: F811
    lines = ["hello there", "and a longer line", "so that the window closes", "once more", "/surprise"]
    expected = chat(lines)
    backend = Counting()
    monkeypatch.setattr(compiled_calls, "BACKEND", backend)
    assert chat(lines, "--compile") == expected
    assert 0 < backend.graphs <= 24
