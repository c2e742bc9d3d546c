"""The configurations to start from: each is a run that fits, and trains."""

import dataclasses
import math
from pathlib import Path

import pytest

from nested_learning.levels import levels
from nested_learning.models import preset
from nested_learning.training.config_file import load_config
from nested_learning.training.optim import rehearse
from nested_learning.training.run import train

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
FREQUENCIES = {  # of the parts, in optimizer steps; memories in context, in tokens
    "hope-tiny": ({1}, {1, 32}),
    "slow-mid-fast": ({1, 4, 16}, {1}),
    "all-levels-in-context": ({1}, {1, 32, 64, 256}),
    "adaptive-everything": ({1}, {1, 32}),
    "hope-attention": ({1, 8}, set()),
    "transformer-window": ({1}, set()),
}


def test_each_has_its_frequencies():
    assert {path.stem for path in CONFIGS} == FREQUENCIES.keys()
    for path in CONFIGS:
        config = load_config(path)
        model, optimizer = rehearse(
            preset(config.preset, **config.model), config.optim, config.data.block_size
        )
        components = levels(model, optimizer).components
        steps = {c.frequency.every for c in components if c.kind == "weights"}
        tokens = {c.frequency.every for c in components if c.frequency.unit == "token"}
        assert (steps, tokens) == FREQUENCIES[path.stem], path.stem


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_trains(path, text_file, tmp_path):
    config = load_config(path)
    block = min(config.data.block_size, 256)  # a boundary of the slowest chunk in context is in each
    data = dataclasses.replace(config.data, source=str(text_file), block_size=block, max_validation_blocks=4)
    config = dataclasses.replace(config, data=data, output=str(tmp_path), steps=12, batch_size=2)
    result = train(dataclasses.replace(config, sample_tokens=0)).result
    before, after = (result["validation"][when]["nats_per_token"] for when in ("before", "after"))
    assert math.isfinite(after)
    assert after < before - 0.2
