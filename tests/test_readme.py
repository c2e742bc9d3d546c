"""The README's Python runs as written."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_figures_are_those_of_the_results():
    """Each figure with a decimal point or a comma in the table stands on the page of results too."""
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    results = (README.parent / "docs" / "results.md").read_text(encoding="utf-8")
    figures = re.findall(r"(?<![\w.])[−+]?\d[\d,]*[.,]\d+(?![\w.]*M)", " ".join(rows))
    assert len(figures) > 25
    known = set(re.findall(r"(?<![\w.])[−+]?\d[\d,]*[.,]\d+", results))
    assert [figure for figure in figures if figure not in known] == []


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
