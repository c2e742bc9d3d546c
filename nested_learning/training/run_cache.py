"""Finished results in a folder, each under all that decides it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nested_learning._files import existing
from nested_learning._tensor_files import parse_json
from nested_learning.training.run_folder import write_json

FORMAT, VERSION = "nested_learning.finished", 1


class RunCache:
    """A folder with a JSON file per result, named by the digest of its key.

    A file that is damaged, or holds another key, counts as absent, with a warning.

    Args:
        folder: made with the first result; None: nothing is kept.

    Raises:
        ValueError: it, or what is to hold it, is no folder.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not (place := existing(self.folder)).is_dir():
            raise ValueError(f"results are kept in a folder, but {place} is something else; name another")

    def find(self, key: dict[str, Any], check: Callable[[Any], None] = lambda result: None) -> Any:
        """The result that was kept under the key, or None.

        Args:
            key: all that decides the result.
            check: raises ValueError for a result that is damaged.
        """
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            if not path.is_file():
                raise ValueError("it is no file")
            saved = parse_json(path.read_text(encoding="utf-8"))
            if (
                not isinstance(saved, dict)
                or saved.get("format") != FORMAT
                or saved.get("version") != VERSION
            ):
                raise ValueError("it is no finished result of this version")
            if saved.get("key") != json.loads(json.dumps(key)) or "result" not in saved:
                raise ValueError("it belongs to other settings")
            check(saved["result"])
        except (ValueError, OSError) as error:
            warnings.warn(f"{path} is passed over: {error}", RuntimeWarning, stacklevel=2)
            return None
        return saved["result"]

    def keep(self, key: dict[str, Any], result: Any) -> Any:
        """Write the result, whole or not at all, and give it back."""
        path = self.path(key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, "version": VERSION, "key": key, "result": result})
        return result

    def get(
        self,
        key: dict[str, Any],
        compute: Callable[[], Any],
        check: Callable[[Any], None] = lambda result: None,
    ) -> Any:
        """The kept result, see `find`, or that of `compute`, which is kept."""
        found = self.find(key, check)
        return self.keep(key, compute()) if found is None else found

    def path(self, key: dict[str, Any]) -> Path | None:
        """Path of the file for a key; None where nothing is kept."""
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.json"
