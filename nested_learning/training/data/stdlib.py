"""Text that every Python carries: the language reference's topics and the standard library's sources.

English (pydoc's topics, docstrings) and code, about 9 MB, without a download. Files are read and parsed,
never imported or run. Docstrings stay in place inside their sources, so no text comes twice.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

TOPICS = "pydoc_data/topics.py"

_NO_LIBRARY_TEXT = ("test", "tests", "idle_test", "idlelib", "turtledemo", "__pycache__")
_NOT_PYTHONS_OWN = ("site-packages", "dist-packages", "lib-dynload", "_bundled")
_TABLES = ("encodings", "pydoc_data")  # the topics of pydoc_data are read by themselves
_SKIPPED_FOLDERS = {*_NO_LIBRARY_TEXT, *_NOT_PYTHONS_OWN, *_TABLES}
# Files that differ from one machine to the next.
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "sitecustomize", "usercustomize")


def stdlib_documents(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(name, text) of each topic and source file under `root`, by default the running Python's library.

    Files that are missing, unreadable, empty or not UTF-8 are left out. Line ends are `\\n` everywhere.

    Raises:
        ValueError: the installation carries no sources (an embedded or stripped Python).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    names = list(_source_names(root))
    found = False
    for name, text in [*_topics(root), *((name, _text(root / name)) for name in names)]:
        if text.strip():
            found = True
            yield name, text
    if not found:
        raise ValueError(
            f"this Python carries no sources of its standard library under {str(root)!r}; "
            "give a text file or folder of your own with --data PATH"
        )


def _source_names(root: Path) -> Iterator[str]:
    """Relative names of the sources, with forward slashes, sorted folder by folder."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if not _skipped(s))
        for file in sorted(files):
            if file.endswith(".py") and not _skipped(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _skipped(name: str) -> bool:
    return name in _SKIPPED_FOLDERS or name.startswith(_SKIPPED_PREFIXES)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def _topics(root: Path) -> Iterator[tuple[str, str]]:
    """The topics of pydoc's help, from the file's one literal dictionary.

    Topics quote each other at length ("compound" holds all compound statements). From the longest to the
    shortest, a topic whose paragraphs were mostly seen already is left out: otherwise training would see
    much of the validation text.
    """
    topics = _literal_topics(_text(root / TOPICS))
    seen: set[str] = set()
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        text = topics[topic]
        paragraphs = {p.strip() for p in text.split("\n\n") if len(p.strip()) >= 60}
        if paragraphs and 2 * len(paragraphs - seen) > len(paragraphs):
            yield f"{TOPICS}#{topic}", text
        seen |= paragraphs


def _literal_topics(source: str) -> dict[str, str]:
    """The dictionary `topics` in the module's source; empty where the file is missing or of another form."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        return {}
    for node in module.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "topics" for t in node.targets):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                return {}
            if isinstance(value, dict):
                return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}
    return {}
