"""Documents that a pretrained model cannot have read: where they are found, and whether they are unchanged.

The manifest names files of packages that requirements.lock pins. `benchmarks.unread_documents` chose them:
their package's last release before November 2024 has none of their paths, and no file of the old releases
shares a fifth of their 5-grams of words. Files of one's own come from a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

from nested_learning.evals.data_files import MADE_UP
from nested_learning.evals.tasks.facts.invented import made_up_filler

SHORT, LONG, TUNING = 16, 4, 4  # documents of the manifest by part
KINDS = {".py": "source", ".md": "docs", ".rst": "docs", ".txt": "docs"}


@dataclass(frozen=True)
class UnreadDocument:
    """A document: one or more files, one after the other.

    Attributes:
        package: package that has the files; empty: they lie in a folder of the user's.
        version: version of the package.
        kind: "source", "tests" or "docs".
        part: "short", "long" or "tuning".
        paths: of the files, in the folder of installed packages, or anywhere.
        digests: SHA-256 of each file; None where anything is right.
        made_up: text that stands for the files, in trials.
    """

    package: str
    version: str
    kind: str
    part: str
    paths: tuple[str, ...]
    digests: tuple[str, ...] | None = None
    made_up: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """Its first file, and how many more."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def problem(self) -> str | None:
        """The file that is missing or changed, by name; None: all are as they should be."""
        if self.made_up:
            return None
        if self.package:
            try:
                found = distribution(self.package).version
            except PackageNotFoundError:
                return f"{self.paths[0]}: {self.package} is not installed"
            pinned = f"; the pinned {self.package} is {self.version}, here {found}"
        else:
            pinned = ""
        for place, path in enumerate(self.paths):
            where = self._where(path)
            if not where.is_file():
                return f"{path} is missing{pinned}"
            digest = hashlib.sha256(where.read_bytes()).hexdigest()
            if self.digests is not None and digest != self.digests[place]:
                return f"{path} has changed{pinned}"
        return None

    def text(self) -> str:
        """The files' text.

        Raises:
            ValueError: a file is missing, changed or not UTF-8.
        """
        if (problem := self.problem()) is not None:
            raise ValueError(problem)
        if self.made_up:
            return self.made_up
        try:
            return "\n".join(self._where(path).read_text(encoding="utf-8") for path in self.paths)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name} is no text in UTF-8: {error}") from error

    def _where(self, path: str) -> Path:
        return Path(str(distribution(self.package).locate_file(path))) if self.package else Path(path)


@cache
def manifest() -> tuple[UnreadDocument, ...]:
    """Documents of the package's manifest: the short ones, the long ones, those for tuning."""
    content = (files("nested_learning.evals.tasks.longdoc") / "documents.json").read_text(encoding="utf-8")
    found = [
        UnreadDocument(
            each["package"],
            each["version"],
            each["kind"],
            each["part"],
            tuple(file["path"] for file in each["files"]),
            tuple(file["sha256"] for file in each["files"]),
        )
        for each in json.loads(content)["documents"]
    ]
    return tuple(each for part in ("short", "long", "tuning") for each in found if each.part == part)


def of_folder(folder: str, counts: tuple[int, int, int]) -> tuple[UnreadDocument, ...]:
    """Documents of a folder: the first files by name tune, the next are read short, the next long.

    Args:
        folder: with text files (.py, .md, .rst, .txt), also in folders below.
        counts: short, long and tuning documents.

    Raises:
        ValueError: there are not enough files.
    """
    found = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix in KINDS and path.is_file())
    short, long, tuning = counts
    if len(found) < short + long + tuning:
        raise ValueError(
            f"{folder} has {len(found)} files of {', '.join(KINDS)}; expected {short} short, {long} long and "
            f"{tuning} tuning documents: add files, or change the options short, long and tuning"
        )
    parts: list[str] = ["tuning"] * tuning + ["short"] * short + ["long"] * long
    documents = [
        UnreadDocument("", "", KINDS[Path(path).suffix], part, (path,))
        for path, part in zip(found, parts, strict=False)
    ]
    return tuple(documents[tuning:] + documents[:tuning])


def documents_of(option: str, counts: tuple[int, int, int]) -> tuple[UnreadDocument, ...]:
    """Documents of the option `documents`: a folder, "made-up", or, where empty, the manifest.

    Args:
        option: the option.
        counts: short, long and tuning documents of a folder, or made up; the manifest is given whole.

    Raises:
        ValueError: a folder has too few.
    """
    if option == MADE_UP:
        parts: list[str] = ["short"] * counts[0] + ["long"] * counts[1] + ["tuning"] * counts[2]
        text = made_up_filler()[0]
        return tuple(
            UnreadDocument("", "", "docs", part, (f"made-up {place}",), made_up=text[100 * place :])
            for place, part in enumerate(parts)
        )
    if option:
        return of_folder(option, counts)
    return manifest()


def listed(documents: Sequence[UnreadDocument]) -> str:
    """How many documents there are of each package and kind, in words."""
    counted: dict[str, int] = {}
    for each in documents:
        words = f"{each.package} {each.version} ({each.kind})" if each.package else each.kind
        counted[words] = counted.get(words, 0) + 1
    return ", ".join(f"{count} of {words}" for words, count in sorted(counted.items()))
