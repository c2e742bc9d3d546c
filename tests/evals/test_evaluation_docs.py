"""The code in docs/evaluation.md runs as printed, and its claim gets a verdict."""

import re
from pathlib import Path

from nested_learning.evals import known_tasks, registry

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_TASKS", dict(known_tasks()))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    share, verdict = capsys.readouterr().out.split(" ", 1)
    assert 0.2 < float(share) < 0.35  # of "e": 6 / 22
    assert "Verdict(verdict='" in verdict
