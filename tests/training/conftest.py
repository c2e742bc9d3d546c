"""A text and a run small enough that a training takes a second."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.data import DataConfig

TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "cms_levels": [{"chunk_size": 16}],
}


@pytest.fixture
def drawn():
    """For tests of the plots themselves."""


@pytest.fixture(autouse=True)
def blank_plots(request, monkeypatch):
    """Plots, which take as long to draw as a tiny run takes, are drawn for tests with `drawn` alone."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: Path(path).write_bytes(b"blank"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 20 kB of words that repeat in another order each time."""
    sentence = "the memory learns what the gradient of its own surprise tells it to keep or to forget"
    words = sentence.split()
    lines = (
        " ".join(words[(i * k) % len(words)] for k in range(1, 9)) + f" {i * i % 97}." for i in range(400)
    )
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def tiny(text_file, tmp_path):
    """A function that gives the configuration of a tiny Transformer run, with fields overridden."""

    def config(**fields: Any) -> TrainConfig:
        base: dict[str, Any] = {
            "preset": "transformer-tiny",
            "model": dict(TINY_MODEL),
            "data": DataConfig(source=str(text_file), block_size=16, max_validation_blocks=8),
            "optim": OptimConfig(lr=1e-2),
            "output": str(tmp_path / "run"),
            "steps": 8,
            "batch_size": 4,
            "sample_tokens": 4,
        }
        return TrainConfig(**{**base, **fields})

    return config
