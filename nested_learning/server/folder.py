"""The files of one user: memories, the manifest that says which of them are in force, the journal, the lock.

    FOLDER/
      <hash of the user>/
        manifest.json      which memory is in force, which there are to go back to, the last entry it holds
        <number>.safetensors   memories, in the format of `Learner.memory`
        journal            lessons that no memory on the disk holds yet
        memory.lock        kept by the process that has the user loaded
      <hash of the user>.deleted-<random>/   on its way out

A memory is written under a new name, then the manifest is replaced: that rename commits it. What no manifest
names is a leftover. Deleting renames the folder, which cannot half happen, and removes what is in it after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nested_learning._files import write_text
from nested_learning._tensor_files import parse_json
from nested_learning.continual.files import locked
from nested_learning.server.journal import Journal, sync_folder
from nested_learning.server.prefixes import KnownPrefixes

FORMAT, VERSION = "nested_learning.server_memory", 1
DELETED, TRANSFER = ".deleted-", "transfer-"
LOCK = "memory.lock"
FILE_NAME = re.compile(r"\d{1,18}-[0-9a-f]{8}\.safetensors")
FOLDER_NAME = re.compile(r"[0-9a-f]{40}")


def folder_name(user: str) -> str:
    """Name of a user's folder: a hash, so that no user id becomes a path."""
    return hashlib.sha256(b"nested_learning.server:" + user.encode("utf-8", "surrogatepass")).hexdigest()[:40]


@dataclass
class Manifest:
    """Everything that is known of a user beside the memory's numbers.

    Attributes:
        applied: number of the last entry of the journal that the present memory holds, or that was undone.
        current: file of the present memory; None for an empty one.
        undo: (conversation, file of the memory before it or None) of conversations, oldest first.
        known: beginnings of conversations that were learned.
        writes: number of writes of each level, fast to slow.
        changed: seconds since 1970 of the last change; 0 if there was none.
        failed: number of lessons that could not be learned, after several tries.
    """

    applied: int = 0
    current: str | None = None
    undo: list[tuple[str, str | None]] = field(default_factory=list)
    known: KnownPrefixes = field(default_factory=KnownPrefixes)
    writes: list[int] = field(default_factory=list)
    changed: float = 0.0
    failed: int = 0

    @property
    def files(self) -> set[str]:
        """Names of all files that it stands for."""
        return {name for name in (self.current, *(before for _, before in self.undo)) if name is not None}

    def as_text(self) -> str:
        """The manifest as the file has it: JSON with a checksum."""
        values = {**self.__dict__, "known": self.known.as_json()}
        text = json.dumps({"format": FORMAT, "version": VERSION, **values}, sort_keys=True)
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})

    @classmethod
    def parsed(cls, text: str) -> Manifest:
        """The manifest of a file's text. ValueError where it is damaged or of another version."""
        outer = parse_json(text)
        if not isinstance(outer, dict) or not isinstance(outer.get("manifest"), str):
            raise ValueError("it is not what was written")
        inner = outer["manifest"]
        if outer.get("sha256") != hashlib.sha256(inner.encode()).hexdigest():
            raise ValueError("it does not have the checksum that was saved with it")
        values: Any = parse_json(inner)
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            raise ValueError("it is of another format or version")
        values["known"] = KnownPrefixes(**values["known"])
        values["undo"] = [(conversation, before) for conversation, before in values["undo"]]
        manifest = cls(**values)
        if not all(FILE_NAME.fullmatch(name) for name in manifest.files):
            raise ValueError("it names files that are not this server's")
        return manifest


class UserFolder:
    """A user's folder on the disk; nothing in it is kept in memory.

    Args:
        root: folder of all memories.
        name: `folder_name` of the user.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.journal = Journal(self.path / "journal")

    def lock(self) -> AbstractContextManager[None]:
        """Keep the folder from other processes; see `locked`. ValueError where one has it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return locked(self.path / "memory")

    def manifest(self) -> Manifest:
        """The manifest; a new one where there is none.

        Raises:
            ValueError: it is damaged.
        """
        path = self.path / "manifest.json"
        if not path.exists():
            return Manifest()
        try:
            return Manifest.parsed(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the manifest {path} is damaged: {error}") from error

    def commit(self, manifest: Manifest) -> None:
        """Put a manifest in force. OSError where it cannot be written: the one before stays in force."""
        write_text(self.path / "manifest.json", manifest.as_text())
        sync_folder(self.path)

    def new_file(self, number: int) -> Path:
        """A name for a memory that holds the journal's entries up to a number."""
        return self.path / f"{number}-{secrets.token_hex(4)}.safetensors"

    def transfer_file(self) -> Path:
        """A name for a memory on its way in or out."""
        return self.path / f"{TRANSFER}{secrets.token_hex(4)}.safetensors"

    def clean(self, kept: Iterable[str], *, transfers: bool = True) -> None:
        """Remove memories that are not among `kept`, what a crash has left of writing, and `transfers`."""
        kept = {*kept, "manifest.json", "journal", LOCK}
        for path in self.path.iterdir():
            if path.name not in kept and (transfers or TRANSFER not in path.name):
                path.unlink(missing_ok=True)

    def size(self, names: Iterable[str | None]) -> int:
        """Bytes of some of the memories together."""
        paths = [self.path / name for name in names if name is not None]
        return sum(path.stat().st_size for path in paths if path.exists())

    def delete_unused(self) -> None:
        """Remove the folder where there is nothing but the lock in it, for the one that holds the lock.

        A user who was only looked at leaves nothing behind, so that made-up names do not fill a disk.
        """
        with suppress(OSError):  # it is of no use, but no trouble either
            if {path.name for path in self.path.iterdir()} <= {LOCK}:
                self.delete()

    def delete(self) -> None:
        """Remove everything. It has happened when the folder has its new name.

        Raises:
            OSError: the folder cannot be renamed; everything is there as before.
        """
        if not self.path.exists():
            return
        away = self.path.with_name(f"{self.path.name}{DELETED}{secrets.token_hex(4)}")
        os.rename(self.path, away)
        sync_folder(self.path.parent)
        shutil.rmtree(away, ignore_errors=True)


def check_root(root: Path) -> None:
    """Make the folder of all memories where there is none, and a file in it, which goes again.

    Raises:
        OSError: that fails.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        why = error.strerror or error
        failure = OSError(f"the folder of memories {root} cannot be used: {why}; choose another --memories")
        failure.errno = error.errno
        raise failure from error


def prepare(root: Path) -> list[str]:
    """Make the folder of all memories, finish deletions that a crash cut off.

    Returns:
        names of the folders whose journal has entries.

    Raises:
        OSError: it cannot be made or read.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    waiting = []
    for path in sorted(root.iterdir()):
        name, deleted, _ = path.name.partition(DELETED)
        if not FOLDER_NAME.fullmatch(name) or not path.is_dir():
            continue
        if deleted:
            shutil.rmtree(path, ignore_errors=True)
        elif (path / "journal").exists():
            waiting.append(name)
    return waiting
