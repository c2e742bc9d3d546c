"""API keys: a file of hashes, one `USER HASH` a line. A key is shown when it is made, and kept nowhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from nested_learning._files import write_text

PREFIX = "nl-"
LONGEST_USER = 256


def hashed(key: str) -> str:
    """sha256 (hex) of a key. Keys have 256 random bits: there is nothing for a slow hash to slow down."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def add_key(path: str | os.PathLike[str], user: str) -> str:
    """A new key of a user, whose hash is added to the file.

    Raises:
        ValueError: the name is empty, too long or has white space or '#' in it; the file is damaged.
        OSError: the file cannot be written; one that is there is left as it was.
    """
    if not user or len(user) > LONGEST_USER or user.startswith("#") or any(c.isspace() for c in user):
        raise ValueError(
            f"the user {user!r} cannot be in a file of keys; expected 1 to {LONGEST_USER} characters without "
            "white space, the first of them not #"
        )
    path = Path(path)
    before = _text(path) if path.exists() else ""
    _parsed(before, path)
    key = PREFIX + secrets.token_urlsafe(32)
    if not path.exists():
        path.touch(mode=0o600)
    ended = before if not before or before.endswith("\n") else before + "\n"
    write_text(path, f"{ended}{user} {hashed(key)}\n")
    return key


class KeyFile:
    """The users of a file of keys. It is read again when it has changed, so a key can be taken away any time.

    Args:
        path: path of the file.

    Raises:
        ValueError: a line is not `USER HASH`.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._entries: list[tuple[str, str]] = []
        self._read()

    def _read(self) -> None:
        status = self._path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._entries = _parsed(_text(self._path), self._path)
            self._stamp = stamp

    def user(self, key: str) -> str | None:
        """The user of a key; None for a key that is not in the file. It takes as long for any key.

        Raises:
            ValueError, OSError: the file has become unreadable: nobody is let in then.
        """
        self._read()
        given, found = hashed(key), None
        for user, known in self._entries:
            if hmac.compare_digest(given, known):
                found = user
        return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        message = f"the file of keys {path} is not in UTF-8 ({error}); convert it, or name another"
        raise ValueError(message) from error


def _parsed(text: str, path: Path) -> list[tuple[str, str]]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        if len(fields) != 2 or len(fields[1]) != 64 or not set(fields[1]) <= set("0123456789abcdef"):
            raise ValueError(
                f"line {number} of the file of keys {path} is not 'USER HASH' with a sha256 in hexadecimal; "
                "make keys with `nested-learning serve --keys FILE --add_key USER …`"
            )
        entries.append((fields[0], fields[1]))
    return entries
