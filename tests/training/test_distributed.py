"""Two processes with half the batch each are one process with the whole batch."""

import json
import os
import shutil
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


def test_carried_rows_in_two_processes_are_those_of_one(tiny, tmp_path):
    """Documents begin in rows of one process, and not of the other; one process goes on from two."""
    library = tmp_path / "library"
    library.mkdir()
    for i in range(20):
        (library / f"{i}.txt").write_text(" ".join(f"{i * k % 97}" for k in range(10, 20 + 5 * i)))
    config = yaml.safe_load(dump_config(tiny(preset="hope-tiny", batch_size=8, steps=12, save_every=6)))
    config["model"]["mixer_options"] = {"self_modifying_titans": {"chunk_size": 8}}
    config["model"]["cms_update"] = "regression"
    config["data"] |= {"source": str(library), "carry_state": True, "validation_fraction": 0.2}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    one = run([sys.executable], tmp_path / "one", "--config", str(path))
    two = run(TORCHRUN, tmp_path / "two", "--config", str(path), "--micro_batch_size", "2")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "checkpoint-12")
    (tmp_path / "two" / "result.json").unlink()
    resumed = run([sys.executable], tmp_path / "two", "--resume")
    for other in (two, resumed):
        for curve in ("train", "validation"):
            expected = [loss for _, loss in one["losses"][curve]]
            assert [loss for _, loss in other["losses"][curve]] == pytest.approx(expected, abs=1e-5)
        for mode, nats in one["positions"]["nats_per_token"].items():
            assert other["positions"]["nats_per_token"][mode] == pytest.approx(nats, abs=1e-5)


def test_processes_on_cpus_know_each_other(tmp_path):
    """Also before there is a Trainer: one alone clears the folder and fixes the number of steps."""
    script = tmp_path / "who.py"
    script.write_text(
        "from nested_learning.training.process import process_state\n"
        "p = process_state()\n"
        "said = f'{p.num_processes} {p.is_main_process}'\n"
        f"open(r'{tmp_path}/' + str(p.process_index), 'w').write(said)\n"
        "p.destroy_process_group()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*TORCHRUN, str(script)], env=environment, timeout=300, check=True)
    assert (tmp_path / "0").read_text() == "2 True"
    assert (tmp_path / "1").read_text() == "2 False"
