"""Trained weights that come with the package: `pretrained("hope-small")`, offline.

Each is a folder of `weights/` as `save_pretrained` writes it, bfloat16 safetensors and a tokenizer, with a
model card and the sha256 of every file beside it.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nested_learning._errors import unknown
from nested_learning.models.hope import HopeForCausalLM

_FOLDER = Path(__file__).with_name("weights")
SUMS = "SHA256SUMS"  # as sha256sum writes and checks it


class Pretrained(NamedTuple):
    """A trained model, in evaluation mode, and its tokenizer."""

    model: HopeForCausalLM
    tokenizer: PreTrainedTokenizerBase


def packaged_names() -> list[str]:
    """Names of the trained models in the package, sorted."""
    return sorted(path.parent.name for path in _FOLDER.glob(f"*/{SUMS}"))


def packaged_folder(name: str) -> Path:
    """The folder of a trained model of the package, its files checked against their sums.

    Raises:
        ValueError: no such model, or a file that is damaged or missing.
    """
    if name not in packaged_names():
        raise unknown("trained model", name, packaged_names())
    folder = _FOLDER / name
    _check(folder)
    return folder


def or_packaged(name: str) -> str:
    """`name`, or the folder of the trained model of the package that it names and no folder here does.

    Raises:
        ValueError: a file of the trained model is damaged or missing.
    """
    if name not in packaged_names() or Path(name).exists():
        return name
    return str(packaged_folder(name))


def pretrained(name: str, *, dtype: torch.dtype = torch.float32) -> Pretrained:
    """A trained model of the package and its tokenizer. Nothing is downloaded.

    The weights are stored in bfloat16. README.md in the model's folder is its card: data, command, figures.

    Args:
        name: "hope-small" or "transformer-small".
        dtype: of the weights in memory; memories and their states are float32 in any case.

    Raises:
        ValueError: no such model, or a file whose sum is not the published one.
    """
    folder = packaged_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
    return Pretrained(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def write_packaged(model: HopeForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a trained model as the package keeps it: weights in bfloat16, tokenizer, sums.

    Args:
        model: the model; it stays as it is.
        tokenizer: its tokenizer.
        folder: folder to write, which must not exist; it appears whole or not at all. A model card
            (README.md) that is put there afterwards is not part of the sums.

    Raises:
        ValueError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; give a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        stored: Any = copy.deepcopy(model)
        stored.to(torch.bfloat16)
        stored.save_pretrained(new)
        tokenizer.save_pretrained(new)
        files = sorted(path for path in new.iterdir() if path.is_file())
        for path in files:
            path.chmod(0o644)  # as in a package; safetensors writes for the owner alone
        sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
        (new / SUMS).write_text(sums, encoding="utf-8")
        new.rename(folder)
    return folder


@lru_cache
def _check(folder: Path) -> None:
    """Refuse a file whose sum is not the one beside it; each folder is read once per process."""
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        expected, file = line.split(maxsplit=1)
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: the package is damaged, install it again")
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != expected:
            raise ValueError(
                f"{path} has the sha256 {got}, expected {expected}: the package is damaged, install it again"
            )
