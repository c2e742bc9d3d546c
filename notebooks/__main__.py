"""Run notebooks: `python -m notebooks [NAME …] [--write]`. Needs the extra [notebooks]."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from notebooks import FOLDER, MAX_BYTES, STAMP, fingerprint, paths, read


def cpu_seconds() -> float:
    """Seconds of CPU of the processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def execute(path: Path) -> tuple[Any, dict[str, Any]]:
    """Run a notebook from its first cell to its last, in an empty folder.

    Returns: the notebook with its outputs, and a stamp: fingerprint of the code, seconds by the clock and of
        CPU.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    start, cpu = time.monotonic(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        # A busy machine takes more than the minute that is the default to start a kernel.
        NotebookClient(notebook, timeout=1800, startup_timeout=600, resources=where).execute()
    stamp = {
        "fingerprint": fingerprint(read(path)),
        "seconds": round(time.monotonic() - start),
        "cpu_seconds": round(cpu_seconds() - cpu),
    }
    return notebook, stamp


def tidy(notebook: Any, stamp: dict[str, Any]) -> Any:
    """The notebook without what no reader needs: progress bars, warnings, times, the version of Python."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("text/plain", None) if "image/png" in output.get(
                    "data", {}
                ) else None
    kept = {name: stamp[name] for name in ("fingerprint", "cpu_seconds")}  # the clock depends on other work
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, STAMP: kept}
    return notebook


def write(path: Path, notebook: Any) -> None:
    """Write a notebook over the file that it was read from.

    Raises:
        ValueError: it is larger than a reader should load.
    """
    import nbformat

    text = nbformat.writes(notebook)
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(
            f"{path.name} has {len(text.encode()):,} bytes with its outputs, expected {MAX_BYTES:,} at most: "
            "make its pictures smaller"
        )
    temporary = path.with_suffix(".new")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def main(words: list[str] | None = None) -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m notebooks", description="Run the notebooks.")
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 3; default: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    options = parser.parse_args(words)
    chosen = [path for path in paths() if not options.names or path.name.startswith(tuple(options.names))]
    if not chosen:
        print(f"no notebook of {FOLDER} begins with {' or '.join(options.names)}", file=sys.stderr)
        return 2
    for path in chosen:
        notebook, stamp = execute(path)
        print(f"{path.name}: {stamp['seconds']} s, {stamp['cpu_seconds']} s of CPU", flush=True)
        if options.write:
            write(path, tidy(notebook, stamp))
    return 0


if __name__ == "__main__":
    sys.exit(main())
