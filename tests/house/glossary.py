"""The links of docs/glossary.md from equations to lines of the code.

python -m tests.house.glossary          # prints the links that miss
python -m tests.house.glossary --fix    # moves each to the nearest line that carries the number
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "glossary.md"
_ROW = re.compile(r"\| (?P<numbers>\d+(?:, \d+)*) \|.*\]\((?P<path>[^)#]+)#L(?P<line>\d+)\) \|$")
_CITED = re.compile(r"\beq (\d+(?:[-/,] ?\d+)*)")


class Link(NamedTuple):
    """A row of the table of equations."""

    numbers: tuple[int, ...]
    path: Path
    line: int
    row: int  # line of the page, from 0


def links() -> list[Link]:
    """All links of the page."""
    found = []
    for row, text in enumerate(PAGE.read_text(encoding="utf-8").splitlines()):
        if match := _ROW.match(text):
            numbers = tuple(int(number) for number in match["numbers"].split(", "))
            found.append(Link(numbers, (PAGE.parent / match["path"]).resolve(), int(match["line"]), row))
    return found


def cited(text: str) -> set[int]:
    """The numbers of equations that a line carries, ranges such as "eq 83-93" included."""
    numbers: set[int] = set()
    for match in _CITED.finditer(text):
        for part in re.split(r"[/,] ?", match[1]):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def holds(link: Link) -> bool:
    """Whether the line that a link points at carries all of its numbers."""
    lines = link.path.read_text(encoding="utf-8").splitlines() if link.path.is_file() else []
    return link.line <= len(lines) and set(link.numbers) <= cited(lines[link.line - 1])


def fix() -> None:
    """Move each link that misses to the nearest line that carries its numbers; code before docstrings."""
    page = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    for link in links():
        if holds(link) or not link.path.is_file():
            continue
        lines = link.path.read_text(encoding="utf-8").splitlines()
        carrying = [n for n, text in enumerate(lines, 1) if set(link.numbers) <= cited(text)]
        if carrying:
            in_code = [n for n in carrying if "#" in lines[n - 1]] or carrying
            line = min(in_code, key=lambda n: abs(n - link.line))
            page[link.row] = re.sub(r"#L\d+\)", f"#L{line})", page[link.row])
    PAGE.write_text("".join(page), encoding="utf-8")


if __name__ == "__main__":
    if "--fix" in sys.argv[1:]:
        fix()
    for link in links():
        if not holds(link):
            print(f"{link.path}:{link.line} does not carry eq {', '.join(map(str, link.numbers))}")
