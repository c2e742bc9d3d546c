"""The notebooks: five ways into the library, kept with the outputs of the code that they show.

`python -m notebooks` runs them; what it writes has small pictures, so that a reader who runs nothing sees
them, and a fingerprint of the code, so that a test finds outputs of other code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
STAMP = "nested_learning"  # key of the metadata that says what was run, and how long it took
MAX_BYTES = 200_000  # of a notebook with its outputs


def paths() -> list[Path]:
    """The notebooks in their order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    """A notebook as JSON has it."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def source(cell: dict[str, Any]) -> str:
    """The text of a cell, which a file has as lines or as one string."""
    return "".join(cell["source"])


def code(notebook: dict[str, Any]) -> list[str]:
    """The text of the code cells."""
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def fingerprint(notebook: dict[str, Any]) -> str:
    """A checksum of the code."""
    return hashlib.sha256("\n\n".join(code(notebook)).encode()).hexdigest()[:16]
