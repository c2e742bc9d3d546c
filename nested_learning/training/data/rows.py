"""Files of rows, a document each: JSON Lines, JSON, CSV and Parquet, read by the `datasets` library.

They are streamed from where they lie: nothing is fetched, unpickled or run. The library's lock files go into
a temporary folder that is removed; there is no other cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
import fsspec

DEFAULT_COLUMN = "text"
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
# Options of CSV: an empty field is an empty text, and "NA" is a word.
_CSV = {"keep_default_na": False, "na_filter": False}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
_LOOKED_AT = 100  # rows by which the column of the text is chosen


def compression(path: Path) -> str | None:
    """fsspec's name of the way a file is compressed, by the end of its name; None for one that is not."""
    return COMPRESSIONS.get(path.suffix.lower())


def holds_rows(path: Path) -> bool:
    """True if the name says that the file, compressed or not, holds rows."""
    return _suffix(path) in _KINDS


def _suffix(path: Path) -> str:
    return Path(path.stem if compression(path) else path.name).suffix.lower()


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """A file opened for reading, its bytes as they were before it was compressed.

    Raises:
        ValueError: it is compressed in a way that needs a package which is not installed.
    """
    try:
        opened = fsspec.open(str(path), "rb", compression=compression(path))
    except ValueError as error:  # fsspec knows no zstd without its package
        raise _Refused(
            f"cannot read {str(path)!r}: {error}. Install the package that reads it (for .zst: zstandard) or "
            "decompress the file."
        ) from error
    with opened as file:
        yield file


def row_texts(path: Path, column: str = DEFAULT_COLUMN) -> Iterator[tuple[int, str]]:
    """(number of the row from 1 on, its text) of each row of a file whose text is not empty.

    Args:
        path: a file that `holds_rows`.
        column: the column with the text. "text" also stands for the only column of strings, where no column
            has that name.

    Raises:
        ValueError: the file cannot be read, has no such column, or a row's text is no string.
    """
    with _damage_named(path), tempfile.TemporaryDirectory() as cache:
        first = list(islice(_rows(path, cache), _LOOKED_AT))
        column = _chosen(path, column, first)
        for number, row in enumerate(_rows(path, cache, list(first[0])), start=1):
            text = row.get(column)
            if not isinstance(text, str) or "\0" in text:
                raise _Refused(
                    f"row {number} of {str(path)!r} has {_kind(text)} in the column {column!r}, expected "
                    "text: mend or remove that row, or choose another column by "
                    "--data.text_column (of `score`, --text_column)"
                )
            if text:
                yield number, text


class _Refused(ValueError):
    """A file that is understood, and cannot be trained on."""


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"a NUL (character {value.index(chr(0))})"
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _rows(path: Path, cache: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file.

    Args:
        path: the file.
        cache: an empty folder, for the library's lock files and a link to the file.
        columns: of a CSV, whose fields are strings then, also those that look like numbers.
    """
    kind, options = _KINDS[_suffix(path)]
    if kind == "parquet" and compression(path):
        raise _Refused(
            f"cannot read {str(path)!r}: Parquet is compressed inside, not around; decompress it to .parquet"
        )
    with open_bytes(path) as file:
        if not file.read(1):
            raise _Refused(f"{str(path)!r} is empty; leave it out")
    if kind == "csv" and columns is not None:
        options = {**options, "features": datasets.Features(dict.fromkeys(columns, datasets.Value("string")))}
    # By another name: of one with brackets or colons the library makes a pattern or an address.
    name = Path(cache) / f"rows{_suffix(path)}{path.suffix.lower() if compression(path) else ''}"
    if not name.is_symlink():
        name.symlink_to(path.absolute())
    rows = datasets.load_dataset(
        kind, data_files=str(name), split="train", streaming=True, cache_dir=cache, **options
    )
    yield from rows


def _chosen(path: Path, column: str, rows: list[dict[str, Any]]) -> str:
    """The column that holds the text, by the first rows."""
    if not rows:
        raise _Refused(f"{str(path)!r} has no rows; leave it out")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if column in columns:
        return column
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in columns}
    strings = [name for name in columns if values[name] and all(isinstance(v, str) for v in values[name])]
    if column == DEFAULT_COLUMN and len(strings) == 1:
        return strings[0]
    found = f"text is in {', '.join(map(repr, strings))}" if strings else "none of them holds text"
    raise _Refused(
        f"{str(path)!r} has no column {column!r}; its columns are {', '.join(map(repr, columns))}, and "
        f"{found}. Choose one by --data.text_column (of `score`, --text_column)"
    )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn whatever the readers raise into a ValueError with the file and, where it is known, the line."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it prints errors that are raised as well
    try:
        yield
    except _Refused:
        raise
    except Exception as error:  # pandas, pyarrow, zlib and lzma each have their own
        cause = error.__cause__ or error
        where = _damaged_line(path)
        told = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        raise ValueError(
            f"cannot read {str(path)!r}{where} ({told}). Mend the file, or leave it out with a glob such as "
            "'folder/**/*.jsonl'."
        ) from error
    finally:
        datasets.logging.set_verbosity(level)


def _damaged_line(path: Path) -> str:
    """The first line of JSON Lines that is none, for a message; empty where that is not known."""
    if _suffix(path) not in (".jsonl", ".ndjson"):
        return ""
    with suppress(Exception), open_bytes(path) as file:  # the file is damaged in some way or other
        for number, line in enumerate(file, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f", line {number} (no object)"
            except ValueError:
                return f", line {number}"
    return ""
