"""The notebooks parse, import what exists, and have the outputs of their code; slowly, they run."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

import notebooks.__main__ as running
from notebooks import FOLDER, MAX_BYTES, STAMP, code, fingerprint, paths, read, source

ROOT = FOLDER.parent
LONGEST = 180  # seconds of CPU, which two cores share: the promise is three minutes on two
each_notebook = pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)


def test_there_are_five_and_they_are_linked():
    assert [path.name[0] for path in paths()] == list("12345")
    for page in ("README.md", "docs/notebooks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [path.name for path in paths() if f"notebooks/{path.name}" not in text] == [], page


def imported(text: str) -> list[tuple[str, str | None]]:
    """(module, name) of each import of a cell; a module alone has no name."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


@each_notebook
def test_what_it_imports_exists(path):
    found = [pair for text in code(read(path)) for pair in imported(text)]
    assert any(module.startswith("nested_learning") for module, _ in found)
    for module, name in found:
        there = importlib.import_module(module)
        assert name is None or hasattr(there, name), f"{module} has no {name}"


@each_notebook
def test_its_links_lead_somewhere(path):
    text = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(\s*([^)#\s]+)", text)
    assert links
    assert [link for link in links if not (FOLDER / link).is_file()] == []
    assert "**Read next:**" in source(read(path)["cells"][-1])


@each_notebook
def test_its_outputs_are_those_of_its_code(path):
    notebook = read(path)
    assert path.stat().st_size <= MAX_BYTES
    stamp = notebook["metadata"][STAMP]
    assert stamp["fingerprint"] == fingerprint(notebook), f"run python -m notebooks {path.name[0]} --write"
    assert stamp["cpu_seconds"] <= LONGEST
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # in one go
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert not re.search(r"/(home|root|tmp|Users)/", "".join(str(output) for output in outputs))


def test_an_unknown_notebook_is_refused(capsys):
    assert running.main(["9", "x"]) == 2
    assert "begins with 9 or x" in capsys.readouterr().err


@pytest.mark.slow
@each_notebook
def test_it_runs(path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook, stamp = running.execute(path)
    assert stamp["cpu_seconds"] <= LONGEST
    kept = running.tidy(notebook, stamp)
    assert any(
        "image/png" in output.get("data", {}) for cell in kept.cells for output in cell.get("outputs", [])
    )


@pytest.mark.slow
def test_a_notebook_that_raises_is_not_written(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    errors = pytest.importorskip("nbclient.exceptions")
    path = tmp_path / "1-broken.ipynb"
    cells = [nbformat.v4.new_code_cell("1 / 0")]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)), encoding="utf-8")
    before = path.read_bytes()
    monkeypatch.setattr(running, "paths", lambda: [path])
    with pytest.raises(errors.CellExecutionError, match="ZeroDivisionError"):
        running.main(["--write"])
    assert path.read_bytes() == before
