"""The folder of a run: its files, and the guards against losing an earlier run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nested_learning._files import check_writable, existing, write_text
from nested_learning.training.checkpoints import numbered, standing
from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.config_file import load_config, read_yaml

YAML_SUFFIXES = (".yaml", ".yml")
HEADER = "# nested-learning training run\n"


class RunFolder:
    """Paths of a run and the rules for opening its folder.

    `config.yaml` (with a first line by which the folder is known as a run's), `checkpoints/`,
    `tensorboard/`, `model/`, `result.json`, `loss.png` and, where losses are scored by position,
    `positions.png`, where memories are looked at, `memories.jsonl` and `memories.png`. Nothing else in the
    folder is ever touched.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.result = self.path / "result.json"
        self.plot = self.path / "loss.png"
        self.positions = self.path / "positions.png"
        self.memories = self.path / "memories.jsonl"
        self.memories_plot = self.path / "memories.png"

    def is_run(self) -> bool:
        """True if the folder holds a run of this package."""
        try:
            if not self.config.is_file():  # a pipe would keep the reader waiting
                return False
            with open(self.config, encoding="utf-8") as file:
                return file.readline() == HEADER
        except (OSError, UnicodeDecodeError):
            return False

    def saved_config(self) -> TrainConfig:
        """The run's configuration. One that was saved before documents were marked had them joined."""
        return load_config(self.config, {"data.documents": "joined"})

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse, before any work is done, a folder that this run must not or cannot write.

        Raises:
            ValueError: it holds another run or other files, or there is nothing to resume.
            OSError: it cannot be written.
        """
        if resume and overwrite:
            raise ValueError(
                "got both --resume and --overwrite; expected one: go on with the run or replace it"
            )
        if resume and not self.is_run():
            raise ValueError(
                f"nothing to resume: {self.path} holds no run. Leave out --resume to start one there."
            )
        if resume and self.result.exists():
            raise ValueError(
                f"the run in {self.path} is complete (see {self.result}); nothing is left to resume. "
                "Start it anew with --overwrite, or choose another --output."
            )
        if not (resume or overwrite) and self.is_run():
            raise ValueError(
                f"{self.path} already holds a run. Add --resume to go on with it, --overwrite to replace it, "
                "or choose another --output."
            )
        if not self.is_run() and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no run of ours, so nothing is written there. "
                "Choose an empty or a new folder as --output."
            )
        check_writable(self.path)

    def check_space(self, nbytes: int) -> None:
        """Raise OSError if the file system has less than `nbytes` bytes free."""
        place = existing(self.path)
        free = shutil.disk_usage(place).free
        if free < nbytes:
            raise OSError(
                f"the run needs about {nbytes / 2**20:,.0f} MiB for checkpoints and the model, but {place} "
                f"has {free / 2**20:,.0f} MiB free. Make room, choose another --output or lower "
                "--keep_checkpoints."
            )

    def start(self, config_yaml: str) -> None:
        """Make the folder ready for a new run: an earlier run's files go, the configuration is written."""
        if self.is_run():
            for folder in (self.checkpoints, self.tensorboard, self.model):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.result, self.plot, self.positions, self.memories, self.memories_plot):
                file.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, HEADER + config_yaml)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the most steps, or None."""
        found = numbered(self.checkpoints)
        return found[-1][1] if found else None

    def standing(self) -> str:
        """The sentence `checkpoints.standing` on this run."""
        return standing(self.checkpoints)


def optimizers_of(name: str) -> tuple[OptimConfig, int]:
    """(optimizers, tokens of a row) of a training YAML or of the run in a folder; of all else the default.

    Raises:
        ValueError: the configuration is damaged.
    """
    path, folder = Path(name), RunFolder(name)
    if not path.is_dir() and path.suffix in YAML_SUFFIXES:
        config = load_config(path)
    elif not folder.is_run():
        config = TrainConfig()
    elif "levels" in (saved := read_yaml(folder.config)):  # of a run of `adapt`
        try:
            values = saved["config"]["optim"]
            optim = OptimConfig(**{**values, "betas": tuple(values["betas"])})
            return optim, int(saved["config"]["data"]["block_size"])
        except (LookupError, TypeError) as error:
            raise ValueError(f"{folder.config} is damaged: {error}") from error
    else:
        config = folder.saved_config()
    return config.optim, config.data.block_size


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all. ValueError for NaN and infinity, which JSON cannot say."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
