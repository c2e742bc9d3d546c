"""Request to a part: seeds, sizes, methods, and the places of model, data and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.common import Cache
from benchmarks.pretrained.model import load


@dataclass(frozen=True)
class Request:
    """One run of a part.

    Args:
        cache: results by their settings.
        seeds: reported ones.
        quick: tiny sizes.
        model: folder of the model; None for the packaged one.
        data: folder of the data.
        methods: names of those to run; None for all.
        reads: how often each fact is told.
        full: the whole protocol of CLINC150, not the subset.
    """

    cache: Cache
    seeds: Sequence[int] = ()
    quick: bool = False
    model: Path | None = None
    data: Path = Path("../shared/data")
    methods: Sequence[str] | None = None
    reads: Sequence[int] = ()
    full: bool = False

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model (bfloat16) and tokenizer, loaded when first needed: a cache may have every result."""
        return load(self.model)

    @property
    def model_name(self) -> str:
        """Name of the model in the settings of a result."""
        return "SmolLM2-135M-Instruct" if self.model is None else str(self.model.resolve())

    def text(self, name: str) -> str:
        """A file of the data. ValueError if it is not there."""
        path = self.data / name
        if not path.is_file():
            raise ValueError(f"{path} is not there; name the folder of the data by --data")
        return path.read_text(encoding="utf-8")
