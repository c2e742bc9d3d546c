"""The journal of one user: what is to be learned, on the disk before an answer ends.

A line per entry, `CRC JSON`, appended and flushed to the disk. A line that was cut off by a crash was never
acknowledged and is passed over, as is a damaged one; each stands for itself. Once the memory that holds the
lessons is on the disk the lines go, and with them the text.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nested_learning._files import NO_ROOM, write_bytes


@dataclass(frozen=True)
class Entry:
    """A lesson, and the beginnings of a conversation that are known with it.

    Attributes:
        number: number of the entry; they go up.
        conversation: conversation that it belongs to.
        texts: texts to learn, in order.
        hashes: hashes of the beginnings (`prefixes.chain`).
        head: the last of them that ends with a user's message.
    """

    number: int
    conversation: str
    texts: tuple[str, ...]
    hashes: tuple[str, ...] = ()
    head: str | None = None

    def line(self) -> bytes:
        """The entry as a line of the file."""
        text = json.dumps(asdict(self), ensure_ascii=True).encode("ascii")
        return b"%08x %s\n" % (zlib.crc32(text), text)

    @classmethod
    def parsed(cls, line: bytes) -> Entry | None:
        """The entry of a line; None where it is damaged."""
        crc, _, text = line.partition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            return None
        try:
            values: Any = json.loads(text)
            names = {field.name for field in fields(cls)}
            if not isinstance(values, dict) or set(values) != names or not isinstance(values["number"], int):
                return None
            texts, hashes = tuple(values["texts"]), tuple(values["hashes"])
        except (ValueError, TypeError, RecursionError):
            return None
        if not all(isinstance(text, str) for text in (*texts, *hashes, values["conversation"])):
            return None
        return cls(values["number"], values["conversation"], texts, hashes, values["head"])


class Journal:
    """A journal's file. It is there only while it has entries.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, entry: Entry) -> None:
        """Add an entry and flush it to the disk.

        Raises:
            OSError: it could not be written; the file is as it was before.
        """
        is_new = not self._path.exists()
        with open(self._path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            torn = before > 0 and not self._ends_a_line(before)
            try:
                write_whole(file.fileno(), (b"\n" if torn else b"") + entry.line())
                os.fsync(file.fileno())
            except OSError as error:
                os.ftruncate(file.fileno(), before)
                why = NO_ROOM.get(error.errno or 0, error.strerror or "it cannot be written")
                raise OSError(error.errno, why, str(self._path)) from error
        if is_new:
            sync_folder(self._path.parent)

    def _ends_a_line(self, size: int) -> bool:
        with open(self._path, "rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"

    def after(self, number: int) -> tuple[list[Entry], int]:
        """(whole entries later than `number`, how many lines are damaged)."""
        if not self._path.exists():
            return [], 0
        found = [Entry.parsed(line) for line in self._path.read_bytes().split(b"\n") if line]
        entries = {entry.number: entry for entry in found if entry is not None and entry.number > number}
        return [entries[n] for n in sorted(entries)], sum(entry is None for entry in found)

    def compact(self, number: int) -> None:
        """Remove the entries up to `number`; a memory on the disk holds them.

        Raises:
            OSError: the file cannot be written; it is as it was before.
        """
        left, _ = self.after(number)
        if left:
            write_bytes(self._path, b"".join(entry.line() for entry in left))
        else:
            self._path.unlink(missing_ok=True)


def write_whole(file: int, data: bytes) -> None:
    """Write all of `data` to a file's number."""
    while data:
        data = data[os.write(file, data) :]


def sync_folder(path: Path) -> None:
    """Have a folder's names on the disk, where the system can do that."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        pass
    finally:
        os.close(number)
