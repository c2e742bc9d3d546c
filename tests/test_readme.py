"""The README's Python runs as written."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)  # they write a file
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    for block in blocks:
        above = text[: block.start(1)].count("\n")  # a traceback shows the README's line
        exec(compile("\n" * above + block[1], str(README), "exec"), namespace)
    assert namespace["loss"].isfinite()
    assert namespace["out"].shape == (2, 40 + 20)
    assert namespace["cache"].tokens_seen.tolist() == [300 + 40 + 19] * 2
