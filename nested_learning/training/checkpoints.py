"""Checkpoints of a run: the manifest by which a whole one is known, the choice of one, which ones go."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from nested_learning._files import write_text
from nested_learning._tensor_files import parse_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "nested_learning.checkpoint", 1
NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
# What training cannot go on without; of each row one file or folder.
NEEDED = {
    "weights": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model_fsdp*",
        "adapter_model.*",
    ),
    "an optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*"),
    "a schedule": ("scheduler.pt",),
    "the state of the random numbers": ("rng_state*.pth",),
    "the state of the run": (STATE,),
}
COUNTS = ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen")
INTERVALS = ("logging_steps", "eval_steps", "save_steps")


def numbered(checkpoints: Path) -> list[tuple[int, Path]]:
    """(number of steps, folder) of each checkpoint, ascending."""
    found = checkpoints.glob("checkpoint-*") if checkpoints.is_dir() else []
    return sorted((int(m[1]), path) for path in found if (m := NAME.fullmatch(path.name)) and path.is_dir())


# Manifest ---------------------------------------------------------------------------------------------------


def write_manifest(checkpoint: Path) -> None:
    """Write the sizes and sums of all files of a checkpoint into it: the last thing to be written there."""
    files = {
        str(path.relative_to(checkpoint)): _measured(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    write_text(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _measured(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def flaw(checkpoint: Path) -> str | None:
    """The first fault of a checkpoint, or None: it has all that training needs, as it was written."""
    try:
        for what, patterns in NEEDED.items():
            if not any(path for pattern in patterns for path in checkpoint.glob(pattern)):
                raise ValueError(f"it has no {patterns[0].replace('*', '')}, {what}")
        _check_files(checkpoint)
        _check_state(checkpoint / STATE, int(checkpoint.name.rpartition("-")[2]))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def has_manifest(checkpoint: Path) -> bool:
    """Whether the checkpoint has a manifest; those of earlier versions have none."""
    return (checkpoint / MANIFEST).exists()


def _check_files(checkpoint: Path) -> None:
    """ValueError unless the files are those of the manifest; without one, unless each can be opened."""
    if not has_manifest(checkpoint):
        for path in sorted(checkpoint.iterdir()):
            _check_opens(path)
        return
    for name, expected in _manifest(checkpoint / MANIFEST).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"its {name} is missing")
        if path.stat().st_size != expected.get("bytes"):
            raise ValueError(
                f"its {name} has {path.stat().st_size:,} bytes, expected {expected.get('bytes')}"
            )
        if _measured(path) != expected:
            raise ValueError(f"the content of its {name} is not what was written")


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sum of each file by its name."""
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its {MANIFEST} cannot be read: {error}") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"its {MANIFEST} lists no files")
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):  # type: ignore[attr-defined]
        raise ValueError(f"its {MANIFEST} is of another format or version")
    unlisted = {
        p.name for patterns in NEEDED.values() for pattern in patterns for p in path.parent.glob(pattern)
    }
    unlisted = {name for name in unlisted if not any(n == name or n.startswith(f"{name}/") for n in files)}
    if unlisted:
        raise ValueError(f"its {MANIFEST} does not know {', '.join(sorted(unlisted))}")
    return files


def _check_opens(path: Path) -> None:
    """ValueError for a file that is damaged as far as its own format can tell."""
    try:
        if path.suffix in (".pt", ".pth"):  # zip archives with sums of their own; nothing is unpickled
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"its part {damaged} does not have the sum saved with it")
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix == ".json":
            parse_json(path.read_text(encoding="utf-8"))
    except (
        ValueError,
        SafetensorError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ) as error:
        raise ValueError(f"its {path.name} cannot be read: {error}") from error


def _check_state(path: Path, number: int) -> None:
    """ValueError unless the Trainer's own record is that of a run after so many steps."""
    try:
        state = TrainerState.load_from_json(str(path))
        state.log_history = json.loads(path.read_text(encoding="utf-8")).get("log_history")  # None became []
    except Exception as error:  # it does what it is told by whatever stands there
        raise ValueError(f"its {STATE} cannot be read: {type(error).__name__}: {error}") from error
    if type(state.global_step) is not int or state.global_step != number:
        raise ValueError(f"its {STATE} is of step {state.global_step!r}, expected {number}")
    for wrong in _wrong_fields(state):
        raise ValueError(f"its {STATE} has {wrong} {str(getattr(state, wrong))[:60]}")


def _wrong_fields(state: TrainerState) -> Iterator[str]:
    for name in COUNTS:
        if type(getattr(state, name)) is not int:
            yield name
    for name in INTERVALS:
        value = getattr(state, name)
        if type(value) not in (int, float) or not value > 0:
            yield name
    log = state.log_history
    if (
        not isinstance(log, list)
        or not log
        or not all(
            isinstance(entry, dict)
            and type(entry.get("step")) is int
            and all(type(entry[key]) in (int, float) for key in ("loss", "eval_loss") if key in entry)
            for entry in log
        )
    ):
        yield "log_history"
    if not isinstance(state.stateful_callbacks, dict) or "TrainerControl" not in state.stateful_callbacks:
        yield "stateful_callbacks"


# Choosing ---------------------------------------------------------------------------------------------------


def checkpoint_to_resume(checkpoints: Path, process: PartialState) -> Path | None:
    """The newest whole checkpoint, or None where there is none at all. All processes get the same.

    Raises:
        ValueError: there are checkpoints, and none of them is whole.

    Warns:
        RuntimeWarning: a newer one is damaged, or the one to be taken has no manifest.
    """
    answer: list[Any] = [None]
    if process.is_main_process:  # once: every file is read
        answer = [_newest_whole(checkpoints)]
    broadcast_object_list(answer)
    chosen, damaged = answer[0]
    if damaged and chosen is None:
        raise ValueError(
            f"none of the checkpoints in {checkpoints} is whole, so there is nothing to go on from: "
            f"{'; '.join(damaged)}. Remove that folder (all of them, if there are several) to start the run "
            "from its beginning, or start it anew with --overwrite."
        )
    if process.is_main_process:
        for what in damaged:
            warnings.warn(f"{what}; going on from {chosen.name}, before it", RuntimeWarning, stacklevel=2)
        if chosen is not None and not has_manifest(chosen):
            warnings.warn(
                f"{chosen} is of a version without manifests: whether its files are those that were written "
                "cannot be told",
                RuntimeWarning,
                stacklevel=2,
            )
    return chosen


def _newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """(the newest whole checkpoint or None, what is wrong with each newer one)."""
    damaged: list[str] = []
    for _, checkpoint in reversed(numbered(checkpoints)):
        what = flaw(checkpoint)
        if what is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name} is damaged ({what})")
    return None, damaged


def standing(checkpoints: Path) -> str:
    """A sentence, without its full stop, on what is left where nothing more can be written."""
    found = numbered(checkpoints)
    return f"The last checkpoint stands: {found[-1][1]}" if found else "There is no checkpoint yet"


def rotate(checkpoints: Path, limit: int | None, current: Path, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but neither the current one nor the best.

    Those of later steps than the current one were found damaged, or the run would have gone on from them:
    they go first.
    """
    if not limit or limit < 0:
        return
    found = numbered(checkpoints)
    step = int(current.name.rpartition("-")[2])
    ordered = [path for n, path in found if n > step] + [path for n, path in found if n <= step]
    kept = {current, *([] if best is None else [Path(best)])}
    excess = len(ordered) - max(limit, len(kept))
    for path in [path for path in ordered if path not in kept][: max(excess, 0)]:
        shutil.rmtree(path, ignore_errors=True)
