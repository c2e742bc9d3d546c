"""One version everywhere, and the notes of a release."""

from __future__ import annotations

import shutil

import pytest

import nested_learning
from release.__main__ import main
from release.versions import ROOT, disagreements, notes, version

FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "nested_learning/_version.py")


@pytest.fixture
def copied(tmp_path):
    """A folder with the files that say a version."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_file_has_the_same_version(capsys):
    assert disagreements() == []
    assert main(["check"]) == 0
    assert capsys.readouterr().out.strip() == version() == nested_learning.__version__


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("CITATION.cff", "version: 0.1.0", "version: 0.2.0", "CITATION.cff has 0.2.0"),
        ("nested_learning/_version.py", "0.1.0", "0.3.0", "_version.py has 0.3.0"),
        ("pyproject.toml", "_version.__version__", "_version.VERSION", "pyproject.toml does not take"),
        ("CHANGELOG.md", "## [0.1.0] -", "## [0.4.0] -", "CHANGELOG.md has 0.4.0"),
        ("CHANGELOG.md", "## [0.1.0] - ", "## [0.1.0], ", "CHANGELOG.md has none"),
        ("CITATION.cff", 'date-released: "2026', 'date-released: "2025', "one date is expected"),
        ("CITATION.cff", "date-released", "date-of-release", "CITATION.cff has none"),
    ],
)
def test_a_file_with_another_version_is_named(copied, name, old, new, told):
    assert disagreements(copied) == []
    text = (copied / name).read_text(encoding="utf-8")
    assert old in text
    (copied / name).write_text(text.replace(old, new), encoding="utf-8")
    found = disagreements(copied)
    assert len(found) == 1
    assert told in found[0]


def test_notes_are_one_part_of_the_changelog(tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n- new\n\n## [0.2.0] - 2026-02-01\n\n### Added\n\n- two\n\n"
        "## [0.1.0] - 2026-01-01\n\n- one [x]\n\n[0.2.0]: https://example.org/0.2.0\n",
        encoding="utf-8",
    )
    assert notes("Unreleased", tmp_path) == "- new\n"
    assert notes("0.2.0", tmp_path) == "### Added\n\n- two\n"
    assert notes("0.1.0", tmp_path) == "- one [x]\n"
    with pytest.raises(ValueError, match=r"no part '0\.3\.0'; it has Unreleased, 0\.2\.0, 0\.1\.0"):
        notes("0.3.0", tmp_path)


def test_the_command_prints_notes_and_refuses_an_unknown_version(capsys):
    assert main(["notes"]) == 0
    printed = capsys.readouterr().out
    assert printed == notes("0.1.0")
    assert len(printed) > 1000
    assert "### Added" in printed
    assert main(["notes", "9.9.9"]) == 2
    assert "9.9.9" in capsys.readouterr().err
