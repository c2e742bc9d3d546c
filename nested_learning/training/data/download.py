"""The one file this package downloads: Tiny Shakespeare, checked by its sha256 and kept in a cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from nested_learning._files import write_bytes
from nested_learning._progress import progress

SHAKESPEARE_NAME = "tinyshakespeare.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_MAX_BYTES = 16 << 20  # far above the file's 1.1 MB: a wrong answer does not fill the disk
_BLOCK = 1 << 16  # bytes between two counts


class DownloadError(ValueError):
    """A text is not here and could not be fetched."""


def cache_folder() -> Path:
    """NESTED_LEARNING_CACHE, or ~/.cache/nested_learning."""
    chosen = os.environ.get("NESTED_LEARNING_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "nested_learning"


def shakespeare_file() -> Path:
    """Path of Tiny Shakespeare: in NESTED_LEARNING_DATA, in the cache, or downloaded into the cache.

    Raises:
        DownloadError: it is nowhere and the download failed.
        ValueError: the file found or downloaded has another sha256.
    """
    path = find_shakespeare()
    if path is None:
        path = cache_folder() / SHAKESPEARE_NAME
        _keep(path, _checked(_fetch(SHAKESPEARE_URL), SHAKESPEARE_URL))
        return path
    _checked(path.read_bytes(), str(path))
    return path


def given_file(name: str) -> Path | None:
    """Path of a file in the folder that NESTED_LEARNING_DATA names; None where it is not there."""
    folder = os.environ.get("NESTED_LEARNING_DATA")
    path = Path(folder) / name if folder else None
    return path if path is not None and path.is_file() else None


def find_shakespeare() -> Path | None:
    """Path of Tiny Shakespeare in NESTED_LEARNING_DATA or in the cache; None where it is in neither."""
    cached = cache_folder() / SHAKESPEARE_NAME
    return given_file(SHAKESPEARE_NAME) or (cached if cached.is_file() else None)


def _fetch(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "nested_learning"}), timeout=30) as answer:
            length = getattr(answer, "length", None)  # where the server tells it
            parts: list[bytes] = []
            with progress("downloading", length, "byte") as bar:
                while bar.done < _MAX_BYTES and (part := answer.read(_BLOCK)):
                    parts.append(part)
                    bar.advance(len(part))
            return b"".join(parts)
    except (URLError, OSError) as error:
        raise DownloadError(
            f"could not download {url} ({error}). Without a network give a text of your own with "
            f"--data PATH, or put {SHAKESPEARE_NAME} into a folder and set NESTED_LEARNING_DATA to it."
        ) from error


def _checked(content: bytes, where: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{where} is not Tiny Shakespeare as expected: sha256 {found}, expected {SHAKESPEARE_SHA256}. "
            "Remove the file to have it downloaded again, or give your own text with --data PATH."
        )
    return content


def _keep(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise DownloadError(
            f"could not write {path} ({error}); set NESTED_LEARNING_CACHE to a folder that can be written"
        ) from error
