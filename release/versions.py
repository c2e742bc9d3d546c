"""The version of a release, wherever it stands, and its notes.

CHANGELOG.md is the source of the notes; `nested_learning/_version.py` is that of the version, which
pyproject.toml reads and CITATION.cff repeats.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = "nested_learning/_version.py"
# Per file a pattern of its version, and for those that have one, of the date of the release.
VERSIONS = {
    SOURCE: r'^__version__ = "(?P<value>[^"]+)"$',
    "CHANGELOG.md": r"^## \[(?P<value>\d[^\]]*)\]",
    "CITATION.cff": r'^version: "?(?P<value>[^"\s]+)"?$',
}
DATES = {
    "CHANGELOG.md": r"^## \[\d[^\]]*\] - (?P<value>\d{4}-\d\d-\d\d)$",
    "CITATION.cff": r'^date-released: "(?P<value>[\d-]+)"$',
}
PYPROJECT = 'version = { attr = "nested_learning._version.__version__" }'


def _first(root: Path, patterns: dict[str, str]) -> dict[str, str]:
    """Per file the first match of its pattern; "none" where there is none."""
    found = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
        found[name] = "none" if match is None else match["value"]
    return found


def version(root: Path = ROOT) -> str:
    """The version of the package, without importing it."""
    return _first(root, {SOURCE: VERSIONS[SOURCE]})[SOURCE]


def disagreements(root: Path = ROOT) -> list[str]:
    """What is not of one version: sentences, none where all agree.

    Args:
        root: folder of the repository.
    """
    found = []
    if PYPROJECT not in (root / "pyproject.toml").read_text(encoding="utf-8"):
        found.append(f"pyproject.toml does not take its version from {SOURCE}; expected the line {PYPROJECT}")
    for what, patterns in (("version", VERSIONS), ("date", DATES)):
        values = _first(root, patterns)
        if len(set(values.values())) > 1 or "none" in values.values():
            told = ", ".join(f"{name} has {value}" for name, value in values.items())
            found.append(f"one {what} is expected of the newest release: {told}")
    return found


def notes(release: str, root: Path = ROOT) -> str:
    """The notes of a release: its part of CHANGELOG.md, without the heading.

    Args:
        release: a version such as "0.1.0", or "Unreleased".
        root: folder of the repository.

    Raises:
        ValueError: CHANGELOG.md has no such part.
    """
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.split(r"^## \[([^\]]+)\].*$", text, flags=re.MULTILINE)
    by_version = dict(zip(parts[1::2], parts[2::2], strict=True))
    if release not in by_version:
        raise ValueError(f"CHANGELOG.md has no part {release!r}; it has {', '.join(by_version)}")
    links = r"^\[[^\]]+\]: \S+$"  # of versions, at the end of the file
    return re.sub(links, "", by_version[release], flags=re.MULTILINE).strip() + "\n"
