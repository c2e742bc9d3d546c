"""The documentation site: its pages, its links, and that the code of its guides runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from website.pages import (
    PACKAGES,
    PAGES,
    ROOT,
    api_page,
    linked_files,
    notebook_page,
    public_names,
    relinked,
    source_page,
)

DOCS = ROOT / "docs"
NAVIGATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    api = {f"api/{package.removeprefix('nested_learning.').replace('.', '-')}.md" for package, _ in PACKAGES}
    listed = re.findall(r": (\S+\.md)$", NAVIGATION.partition("\nnav:")[2], flags=re.MULTILINE)
    assert sorted(listed) == sorted(written | set(PAGES.values()) | api)


@pytest.mark.parametrize(
    ("page", "folder", "link", "expected"),
    [
        ("index.md", "", "docs/cms.md#cost", "cms.md#cost"),
        ("cms.md", "docs", "models.md", "models.md"),
        ("models.md", "docs", "../CONTRIBUTING.md", "contributing.md"),
        ("delta-rule.md", "nested_learning/ops", "./rows.py", "source/nested_learning/ops/rows.py.md"),
        ("glossary.md", "docs", "../nested_learning/_errors.py#L3",
         'source/nested_learning/_errors.py.md "nested_learning/_errors.py, line 3"'),
        ("cms.md", "docs", "absent.md", "absent.md"),
        ("cms.md", "docs", "https://arxiv.org/abs/2512.24695", "https://arxiv.org/abs/2512.24695"),
    ],
)  # fmt: skip
def test_links_lead_to_the_site(page, folder, link, expected):
    assert relinked(page, folder, f"see [this]({link}).") == f"see [this]({expected})."


def test_linked_code_is_a_page_with_a_fence_that_it_cannot_close():
    assert linked_files("docs", "[a](../Makefile) [b](cms.md) [c](../README.md) [d](../nothing)") == [
        "Makefile"
    ]
    text = source_page("tests/test_site.py")
    assert '````python linenums="1"' in text  # this file has a fence of three: ```


def test_a_notebook_is_a_page_with_its_code_and_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr("website.pages.ROOT", tmp_path)
    picture = {"output_type": "display_data", "data": {"image/png": "aGk=\n"}}
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "text"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
        {"cell_type": "code", "source": ["plot()"], "outputs": [picture]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    page = notebook_page("a.ipynb")
    assert page.startswith(
        "# One\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nplot()\n```\n"
    )
    assert page.endswith('<img alt="plot" src="data:image/png;base64,aGk=">\n')


def test_api_pages_name_what_is_public():
    assert {"Learner", "Level"} < set(public_names("nested_learning.continual"))
    assert "::: nested_learning.continual.stack_levels" in api_page("nested_learning.continual", "Continual")
    with pytest.raises(ValueError, match="__all__"):
        public_names("nested_learning.training")


@pytest.mark.parametrize("page", ["start.md", "lens.md", "coming-from.md"])
def test_code_of_the_guides_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": page}
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    page = (Path(tmp_path) / "glossary.html").read_text(encoding="utf-8")
    line = re.search(r'href="(source/[^"#]*)#(__codelineno-0-\d+)"', page)
    assert line is not None
    assert f'id="{line[2]}"' in (Path(tmp_path) / line[1]).read_text(encoding="utf-8")
