"""The code in docs/continual.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.continual.tiny_models import byte_llama

PAGE = Path(__file__).parents[2] / "docs" / "continual.md"


def test_every_block_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    model, tokenizer = byte_llama(hidden=48, layers=3)
    namespace = {
        "model": model,
        "tokenizer": tokenizer,
        "text": "The lighthouse of Varnholm was built by Ilse Brandt. " * 3,
        "other_text": "Bread is made of flour, water and salt. " * 3,
        "ids": torch.tensor([[1, 2, 3]]),
    }
    for block in blocks:
        exec(block, namespace)
    assert len(namespace["surprise"]) == len(namespace["text"])
    assert len(namespace["changes"]) == 3  # level 0 was reset: the last third is left
    assert len({write.row for write in namespace["learner"].writes}) == 2
    assert {(w.level, w.reread) for w in namespace["careful"].writes} == {(0, 0), (1, 0), (1, 1)}
