"""Files and folders that are there whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of a write that ends in the middle, in words.
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than its file system, or a limit on this process, allows",
    errno.EIO: "the system took only a part of it",
}
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
# All that torch.save says of a full disk, or of any write that fails: its writer is not where it should be.
TORCH_SIGNS = ("inline_container", "PytorchStreamWriter", "iostream error")
MIB = 2**20


def writable(path: str | os.PathLike[str]) -> Path:
    """The regular file that a path stands for, symbolic links followed: one that is there, or one to come.

    Raises:
        ValueError: it is a folder, a device, a pipe or a socket, over which a file must not be renamed.
        OSError: its folder is missing, or it is write-protected.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    found = _status(path) or _status(target)
    if found is None:
        if not target.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write {path}: there is no folder {target.parent} "
                "(No such file or directory); make it first"
            )
        return target
    kind = next((name for is_kind, name in KINDS if is_kind(found.st_mode)), None)
    if kind is not None:
        raise ValueError(f"cannot write {path}: it is {kind}; give the name of a regular file")
    if not os.access(target, os.W_OK):  # a rename would not ask
        raise PermissionError(f"cannot write {path}: the file is write-protected; choose another name")
    return target


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name to write to, beside the file that `path` stands for, which it becomes at the end.

    A file that is replaced hands on its mode and, where that is allowed, its owner. If anything fails the
    temporary file goes, and a file of that name is left as it was.

    Raises:
        ValueError, OSError: as `writable`; an OSError of writing names `path`, and says so if the disk is
            full.
    """
    target = writable(path)
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        # Made here, so that it has the mode of any new file: safetensors makes its own readable to the owner
        # alone.
        with open(temporary, "xb") as file:
            made = os.fstat(file.fileno())
        yield temporary
        _hand_on(_status(target) or made, temporary)
        _sync(temporary)
        os.replace(temporary, target)
    except Exception as error:
        failure = write_failure(error, target, "A file of that name is left as it was")
        if failure is not None:
            raise failure from error
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _hand_on(old: os.stat_result, new: Path) -> None:
    """Give a file the owner, where that is allowed, and the mode of another."""
    status = os.stat(new)
    if (old.st_uid, old.st_gid) != (status.st_uid, status.st_gid):
        with contextlib.suppress(OSError):
            os.chown(new, old.st_uid, old.st_gid)
    os.chmod(new, stat.S_IMODE(old.st_mode))


def _sync(path: Path) -> None:
    """Have the content on the disk before the name: else a power cut may leave the name alone."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_failure(error: BaseException, path: Path, left: str) -> OSError | None:
    """The error to raise where a write had no room; None for any other error.

    Args:
        error: the error of whoever wrote: the system's, or that of a library which hides it in its text.
        path: path of the file that was to be written.
        left: what is there now, a sentence without its full stop.
    """
    number, text = _no_room(error, path)
    if number is None:
        return None
    failure = OSError(f"cannot write {path}: {NO_ROOM[number]} ({text}). {left}; make room and try again.")
    failure.errno = number
    return failure


def _no_room(error: BaseException | None, path: Path) -> tuple[int | None, str]:
    """(number of the system's error for a lack of room, its text), (None, "") where there is none."""
    while error is not None:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := re.search(r"\(os error (\d+)\)", text)):  # safetensors, in Rust
            number = int(found[1])
        if number in NO_ROOM:
            return number, os.strerror(number)
        if any(sign in text for sign in TORCH_SIGNS):
            free = shutil.disk_usage(existing(path)).free
            return errno.ENOSPC if free < MIB else errno.EIO, f"{free:,} bytes are free"
        error = error.__cause__ or error.__context__
    return None, ""


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def same_file(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths stand for one file that is there."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def make_folder(folder: Path, flag: str = "--output") -> None:
    """Make a folder, unless it is there, and see that it can be written: before the work that it is to hold.

    Args:
        folder: path of the folder.
        flag: the option that names it, for messages.

    Raises:
        OSError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the output folder {folder} cannot be made: {error.strerror or error}. Choose another {flag}."
        ) from error
    check_writable(folder, flag)


def check_writable(folder: Path, flag: str = "--output") -> None:
    """Write and remove a small file in a folder, or in the nearest above it that is there.

    Args:
        folder: path of the folder.
        flag: the option that names it, for messages.

    Raises:
        OSError: that fails.
    """
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 65536)
    except OSError as error:
        raise OSError(
            f"the output folder {folder} cannot be written: {error.strerror or error} ({place}). "
            f"Choose another {flag} or make room."
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file of bytes."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def whole_folder(path: Path, left: str = "A folder of that name is left as it was") -> Iterator[Path]:
    """A temporary folder to fill; it takes the name `path` at the end, or goes if that fails.

    Args:
        path: path of the folder, or of a link to it; one that is there is replaced.
        left: what is said to be there where the disk is full; see `write_failure`.

    Raises:
        ValueError: `path` is there and is no folder.
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_dir():
        raise ValueError(f"cannot write the folder {path}: there is something else of that name")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        put_folder(temporary, target)
    except BaseException as error:
        failure = write_failure(error, target / last_written(temporary), left)
        shutil.rmtree(temporary, ignore_errors=True)
        if failure is not None:
            raise failure from error
        raise


def put_folder(new: Path, path: Path) -> None:
    """Give a folder the name `path`; one that has it goes only when the new one is there."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def last_written(folder: Path) -> Path:
    """The file below a folder, by its path from there, that was written to last; empty without any."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=folder)
    return newest.relative_to(folder)
