"""docs/models.md lists what the package registers, and its Python runs as written."""

import re
from pathlib import Path

import torch

from nested_learning import layers
from nested_learning.layers import MIXERS
from tests.layers import test_table_vs_oracle as against_oracle

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def rows_of_the_table() -> dict[str, str]:
    """{name of the mixer: name of the class}, from the first table, whose rows may hold several of each."""
    rows = {}
    table = PAGE.split("| mixer | class |")[1].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        mixers, classes = (re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:3])
        rows |= dict(zip(mixers, classes, strict=True))
    return rows


def test_table_lists_exactly_the_registered_memories_and_attentions():
    package = {
        name: mixer.__name__
        for name, mixer in MIXERS.items()
        if issubclass(mixer, layers.MemoryLayer | layers.Attention)
        and mixer.__module__.startswith("nested_learning.")
    }
    assert rows_of_the_table() == package


def test_every_class_of_the_table_can_be_imported_and_has_a_case():
    elsewhere = {"Titans", "SelfModifyingTitans", "Attention", "SlidingWindowAttention"}
    cases = {case.layer for case in against_oracle.EXACT_ROWS + against_oracle.ANCHORED_ROWS}
    assert set(rows_of_the_table().values()) - elsewhere == cases
    assert elsewhere | cases <= set(layers.__all__)


def test_its_exact_rows_are_those_compared_as_exact():
    exact = {name for name in rows_of_the_table() if re.search(rf"^\| `{name}` \|.*\| exact \|$", PAGE, re.M)}
    compared = {case.layer for case in against_oracle.EXACT_ROWS} - {"ComposedMemory"}
    assert {MIXERS[name].__name__ for name in exact} == compared


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block writes a file
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    torch.manual_seed(0)
    namespace = {"__name__": "models_page"}
    for block in blocks:
        exec(compile(block, "docs/models.md", "exec"), namespace)
    y, _ = namespace["layer"](torch.randn(2, 9, 256))
    assert y.shape == (2, 9, 256)
    assert y.isfinite().all()
    assert namespace["config"].mixer == "memory"
    assert isinstance(
        layers.ComposedMemory(8, 2, **namespace["config"].mixer_options["memory"]), torch.nn.Module
    )
