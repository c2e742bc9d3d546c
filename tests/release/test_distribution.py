"""What the wheel and the sdist are to have, and what stops a release.

`make dist` builds both and tries them in an empty environment; it needs minutes and a package index.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch

import pytest

import release.smoke
from release import distribution
from release.__main__ import main
from release.distribution import NotReady, check_sdist, check_wheel, export, run, wheel_files
from release.versions import ROOT

TRACKED = [
    "nested_learning/__init__.py",
    "nested_learning/server/page.html",
    "tests/test_one.py",
    "README.md",
]


def tracked_files() -> list[str]:
    """Files of the repository, or a skip where the tests run without git."""
    try:
        return run("git", "ls-files", cwd=ROOT).splitlines()
    except (NotReady, OSError):
        pytest.skip("not a checkout of git")


def test_package_data_names_every_file_of_the_package_that_is_no_code():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(
        r"\[tool\.setuptools\.package-data\]\nnested_learning = (\[.*?\])", text, flags=re.DOTALL
    )
    globs = ast.literal_eval(listed[1])
    data = {name.partition("/")[2] for name in wheel_files(tracked_files()) if not name.endswith(".py")}
    assert data
    assert {name for name in data if not any(fnmatch(name, glob) for glob in globs)} == set()


def test_every_folder_of_code_is_a_package():
    code = {name for name in wheel_files(tracked_files()) if name.endswith(".py")}
    # A trained model's folder brings the few lines by which other programs load it: data, not a part.
    code = {name for name in code if not name.startswith("nested_learning/models/weights/")}
    folders = {name.rpartition("/")[0] for name in code}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in code} == set()


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*names, "nested_learning_torch-0.1.0.dist-info/METADATA"]:
            archive.writestr(name, "")
    return path


def test_a_wheel_has_the_package_and_nothing_else(tmp_path):
    right = ["nested_learning/__init__.py", "nested_learning/server/page.html"]
    check_wheel(wheel(tmp_path / "right.whl", right), TRACKED)
    with pytest.raises(NotReady, match=r"lacks nested_learning/server/page\.html: name it in package-data"):
        check_wheel(wheel(tmp_path / "less.whl", right[:1]), TRACKED)
    with pytest.raises(NotReady, match=r"has tests/test_one\.py, which is not in the repository's package"):
        check_wheel(wheel(tmp_path / "more.whl", [*right, "tests/test_one.py"]), TRACKED)


def sdist(path, names):
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"nested_learning_torch-0.1.0/{name}"), io.BytesIO())
    return path


def test_an_sdist_has_what_tells_of_the_package_too(tmp_path):
    right = [*TRACKED[:2], *distribution.ROOT_FILES, "PKG-INFO", "setup.cfg", "x.egg-info/SOURCES.txt"]
    check_sdist(sdist(tmp_path / "right.tar.gz", right), TRACKED)
    with pytest.raises(NotReady, match=r"lacks LICENSE"):
        check_sdist(sdist(tmp_path / "less.tar.gz", [name for name in right if name != "LICENSE"]), TRACKED)
    with pytest.raises(NotReady, match=r"has tests/test_one\.py"):
        check_sdist(sdist(tmp_path / "more.tar.gz", [*right, TRACKED[2]]), TRACKED)


def test_a_failing_step_is_shown_and_nothing_is_kept(tmp_path, monkeypatch, capsys):
    def broken(work):
        (work / "half").write_text("")
        run(sys.executable, "-c", "import sys; print('what it printed'); sys.exit(3)", cwd=work)

    monkeypatch.setattr(distribution, "build", broken)
    assert main(["build", "--output", str(tmp_path / "dist")]) == 1
    told = capsys.readouterr().err
    assert "what it printed" in told
    assert "ended with 3" in told
    assert not (tmp_path / "dist").exists()


def test_what_is_not_committed_stops_a_release(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], check=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distribution, "ROOT", tmp_path)
    git("init", "--quiet", ".")
    (tmp_path / "kept.txt").write_text("committed")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    names = export(tmp_path.with_name("exported"))
    assert names == ["kept.txt"]
    assert (tmp_path.with_name("exported") / "kept.txt").read_text() == "committed"
    (tmp_path / "new.txt").write_text("")
    with pytest.raises(NotReady, match=r"commit these changes, or take them away:\n.*new\.txt"):
        export(tmp_path.with_name("again"))


def test_the_smoke_test_refuses_a_package_that_is_not_the_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(release.smoke.sys, "prefix", str(tmp_path))
    with pytest.raises(AssertionError, match="not from"):
        release.smoke.step_import(distribution.version())
    with pytest.raises(AssertionError):
        release.smoke.step_import("9.9.9")
    (tmp_path / "nested_learning").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="a package of its own"):
        release.smoke.main(distribution.version())
