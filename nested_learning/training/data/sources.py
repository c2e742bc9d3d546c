"""Sources of text: documents by the name of a source, split into training and validation.

`stdlib` (every Python has it), `tinyshakespeare` (downloaded once), a file of text or of rows (see `rows`), a
folder or a glob. A source of the `datasets` library, `hf:NAME`, is streamed: see `streaming`.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import NamedTuple

from nested_learning._errors import unknown
from nested_learning._progress import Progress, progress
from nested_learning.training.data.download import shakespeare_file
from nested_learning.training.data.rows import DEFAULT_COLUMN, holds_rows, open_bytes, row_texts
from nested_learning.training.data.stdlib import stdlib_documents

SOURCES = ("stdlib", "tinyshakespeare", "hf:NAME", "hf:NAME:CONFIG")
MIN_FILES_TO_SPLIT = 10


class Document(NamedTuple):
    """A text and its name: a relative file name, or one with the part of the file."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in memory: no document, or part of one, is in both lists."""

    train: list[Document]
    validation: list[Document]

    def fingerprint(self) -> str:
        """sha256 over the names and texts, in order: equal for equal data."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for document in split:
                for part in document:
                    content = part.encode()
                    digest.update(len(content).to_bytes(8, "little") + content)
            digest.update(b"|")
        return digest.hexdigest()


def load_corpus(
    source: str,
    *,
    validation_fraction: float = 0.1,
    max_bytes: int | None = None,
    text_column: str = DEFAULT_COLUMN,
) -> Corpus:
    """The documents of a source, split into training and validation.

    Args:
        source, max_bytes, text_column: see `load_documents`.
        validation_fraction: share of the validation part, in (0, 0.5]. Ten documents or more are split
            whole, by a hash of their names; of fewer, each gives its tail.

    Raises:
        ValueError: as `load_documents`.
    """
    documents = load_documents(source, max_bytes=max_bytes, text_column=text_column)
    return split_documents(documents, validation_fraction)


def load_documents(
    source: str, *, max_bytes: int | None = None, text_column: str = DEFAULT_COLUMN
) -> list[Document]:
    """The documents of a source that is read into memory.

    Args:
        source: "stdlib", "tinyshakespeare", or the path of a UTF-8 text file, a file of rows (.jsonl, .json,
            .csv, .tsv, .parquet), a folder (all files under it, hidden ones left out) or a glob (`**` crosses
            folders). Files may be compressed (.gz, .bz2, .xz; .zst where zstandard is installed). A text file
            is a document, and each row of a file of rows is one.
        max_bytes: stop reading after so many bytes of UTF-8 text; the last document is cut.
        text_column: the column of a file of rows with the text; see `rows.row_texts`.

    Raises:
        ValueError: no such source; an empty, binary or non-UTF-8 file; a damaged file of rows, or one without
            the column; a download that failed or has another checksum.
    """
    documents: Iterable[Document]
    if source == "stdlib":
        documents = by_hash(Document(*pair) for pair in stdlib_documents())
    elif source == "tinyshakespeare":
        documents = [Document("tinyshakespeare.txt", _read(shakespeare_file()))]
    else:
        documents = _read_files(source, max_bytes, text_column)
    with progress("reading", unit="text") as bar:
        kept = _limit(documents, max_bytes, bar)
    if not kept:
        raise ValueError(f"the text of {source!r} is empty; give a file, folder or glob with text in it")
    return kept


def split_documents(documents: Sequence[Document], fraction: float) -> Corpus:
    """Split whole documents by the hash of their names, or the tails of few documents, for validation."""
    if len(documents) >= MIN_FILES_TO_SPLIT:
        count = max(1, round(fraction * len(documents)))
        held_out = {document.name for document in by_hash(documents)[:count]}
        return Corpus(
            train=[d for d in documents if d.name not in held_out],
            validation=[d for d in documents if d.name in held_out],
        )
    heads, tails = [], []
    for name, text in documents:
        cut = int((1 - fraction) * len(text))
        heads.append(Document(name, text[:cut]))
        tails.append(Document(f"{name} (tail)", text[cut:]))
    return Corpus([d for d in heads if d.text], [d for d in tails if d.text])


def by_hash(documents: Iterable[Document]) -> list[Document]:
    """The documents in an order that depends on their names' hashes alone: any run of them is a mixture."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def _limit(documents: Iterable[Document], max_bytes: int | None, bar: Progress) -> list[Document]:
    """The documents with text in them, up to `max_bytes`; the last one is cut."""
    kept, left = [], math.inf if max_bytes is None else max_bytes
    for name, text in documents:
        content = text.encode()
        if len(content) > left:
            text = _decode_start(content[: int(left)])
        if text:
            kept.append(Document(name, text))
        left -= len(content)
        bar.advance()
        if left <= 0:
            break
    return kept


def _read_files(source: str, max_bytes: int | None, text_column: str) -> Iterator[Document]:
    paths, root = _find_files(source)
    if text_column != DEFAULT_COLUMN and not any(map(holds_rows, paths)):
        raise ValueError(
            f"text_column is {text_column!r}, but {source!r} has no file of rows, such as .jsonl or .csv; "
            "leave it out"
        )
    for path in paths:
        name = path.relative_to(root).as_posix()
        if holds_rows(path):
            yield from (Document(f"{name}#{row}", text) for row, text in row_texts(path, text_column))
        else:
            yield Document(name, _read(path, max_bytes))


def _find_files(source: str) -> tuple[list[Path], Path]:
    """The files that a path or glob names, sorted, and the folder their names are relative to."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # no such user
        raise ValueError(f"the home directory of the data source {source!r} is not known: {error}") from error
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
        if not files:
            raise ValueError(
                f"the folder {source!r} holds no files; give a file, folder or glob with text in it"
            )
        return sorted(files), path
    if glob.has_magic(source):
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if not files:
            raise ValueError(f"no file matches {source!r} (seen from {os.getcwd()})")
        return sorted(files), Path(os.path.commonpath([p.parent for p in files]))
    raise ValueError(
        f"{unknown('data source', source, SOURCES)} Or give the path of a file, a folder or a glob; "
        f"there is no file or folder {source!r} (seen from {os.getcwd()})."
    )


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read(path: Path, max_bytes: int | None = None) -> str:
    """Text of a UTF-8 file, its first `max_bytes` if given; a byte order mark is dropped."""
    try:
        with open_bytes(path) as file:
            content = file.read() if max_bytes is None else file.read(max_bytes)
            text = content.decode() if not file.read(1) else _decode_start(content)
    except (OSError, EOFError, LZMAError, zlib.error) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    except UnicodeDecodeError as error:
        raise _not_text(path, f"byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise _not_text(path, f"character {text.index(chr(0))} is NUL")
    return text.removeprefix("\ufeff")


def _decode_start(content: bytes) -> str:
    """Decode bytes that may end inside a character; that character is dropped."""
    return getincrementaldecoder("utf-8")().decode(content)


def _not_text(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} is not a text file: {reason}. Convert it to UTF-8, or leave it out with a glob "
        "such as 'folder/**/*.txt'."
    )
