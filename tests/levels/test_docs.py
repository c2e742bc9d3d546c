"""The code in docs/levels.md runs as printed, and prints what its comments say."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "levels.md"


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # one writes a picture
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    shown = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {"__name__": "docs"})
        shown.append(capsys.readouterr().out)
    comments = re.findall(r"^# (.*)$", blocks[0], re.MULTILINE)
    assert len(comments) == 3
    assert "\n".join(comments) in shown[0]
    (handles,) = re.findall(r"  # (\[.*\])$", blocks[1], re.MULTILINE)
    assert handles in shown[1]
    assert "{'projections': ['read.weight', 'read.bias'], 'initial': [" in shown[2]
    assert "fast weights: initial" in shown[3]
