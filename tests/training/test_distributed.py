"""Two processes with half the batch each are one process with the whole batch."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from nested_learning.training.config_file import dump_config

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command, output, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "-m", "nested_learning", "train", *flags, "--output", str(output), "--quiet", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("preset", ["hope-tiny", "transformer-tiny"])
def test_two_processes_give_the_losses_of_one(tiny, tmp_path, preset):
    config = yaml.safe_load(dump_config(tiny(preset=preset, batch_size=8, steps=12)))
    if preset == "hope-tiny":
        config["model"]["mixer_options"] = {"self_modifying_titans": {"chunk_size": 8}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    one = run([sys.executable], tmp_path / "one", "--config", str(path))
    two = run(TORCHRUN, tmp_path / "two", "--config", str(path))
    accumulated = run(TORCHRUN, tmp_path / "acc", "--config", str(path), "--micro_batch_size", "2")
    for other in (two, accumulated):
        assert other["hardware"]["processes"] == 2
        assert other["tokens"] == one["tokens"]
        for curve in ("train", "validation"):
            expected = [loss for _, loss in one["losses"][curve]]
            assert [loss for _, loss in other["losses"][curve]] == pytest.approx(expected, abs=1e-5)
