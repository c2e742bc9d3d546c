"""Two processes of `accelerate launch` with copies (DDP) or shards (FSDP2) of a model train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from nested_learning.training.config_file import dump_config
from nested_learning.training.data import DataConfig
from nested_learning.training.optim import OptimConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "cms_levels": [{"chunk_size": 8}, {"chunk_size": 16}],
    "mixer_options": {"self_modifying_titans": {"chunk_size": 8}},
}


@pytest.fixture
def config(tiny, tmp_path):
    """A function that writes the configuration of a run on short documents, several in a sample."""

    def write(**fields):
        model = {**MODEL, "cms_update": fields.pop("cms_update", "none")}
        texts = tmp_path / "texts"
        texts.mkdir(exist_ok=True)
        for i in range(150):
            (texts / f"{i}.txt").write_text(f"{i} " + "the memory learns what to keep "[: 7 + i % 23] * 2)
        carry = fields.pop("carry_state", False)
        data = DataConfig(
            source=str(texts), block_size=16 if carry else 32, carry_state=carry, max_validation_blocks=6
        )
        values = {"preset": "hope-tiny", "model": model, "data": data, "batch_size": 6, "steps": 3, **fields}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(dump_config(tiny(**values)))))
        return path

    return write


def start(kind, processes, *arguments):
    """Run `nested-learning train` by accelerate, or without it where `kind` is None."""
    command = [sys.executable, "-m"]
    if kind is not None:
        file = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
        command += ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
        command += ["--num_processes", str(processes), "-m"]
    variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, "nested_learning", "train", *map(str, arguments), "--quiet", "--json"],
        env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run(kind, processes, *arguments):
    done = start(kind, processes, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses(result):
    return [loss for curve in ("train", "validation") for _, loss in result["losses"][curve]]


@pytest.mark.parametrize("update", ["none", "regression", "lm"])
def test_two_processes_give_the_losses_of_one(config, tmp_path, update):
    path = config(cms_update=update)
    one = run(None, 1, "--config", path, "--output", tmp_path / "one")
    for kind in ("ddp", "fsdp2"):
        two = run(kind, 2, "--config", path, "--output", tmp_path / kind)
        assert two["hardware"]["processes"] == 2
        assert losses(two) == pytest.approx(losses(one), abs=1e-5)
        assert (tmp_path / kind / "checkpoints/checkpoint-3/pytorch_model_fsdp_0").exists() == (
            kind == "fsdp2"
        )
        ids = torch.arange(32)[None]
        logits = [
            AutoModelForCausalLM.from_pretrained(tmp_path / n / "model")(ids).logits for n in ("one", kind)
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_compiled_copies_give_the_losses_of_one_process_plain(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    one = run(None, 1, "--config", config(), "--output", tmp_path / "one")
    two = run("ddp", 2, "--config", config(compile=True), "--output", tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


LEVELS = [
    {"part": "cms.1", "period": 2, "reduction": "mean"},
    {"part": ["cms.0", "projections"], "name": "muon", "period": 2},
]


@pytest.mark.parametrize(
    "fields",
    [{"carry_state": True}, {"optim": OptimConfig(lr=1e-2, levels=LEVELS)}],
    ids=["carried", "levels"],
)
def test_shards_of_a_run_that(config, tmp_path, fields):
    """Documents whose state goes from block to block; levels that wait for the gradients of two steps."""
    path = config(**fields)
    one, two = (
        run(kind, n, "--config", path, "--output", tmp_path / str(n)) for kind, n in ((None, 1), ("fsdp2", 2))
    )
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def test_shards_of_a_run_that_ends_by_the_clock(config, tmp_path):
    """Both processes stop at one step, and what was trained is the model that is written."""
    path = config(steps=None, max_minutes=0.3)
    result = run("fsdp2", 2, "--config", path, "--output", tmp_path / "run")
    steps = result["losses"]["train"][-1][0]
    assert steps >= 1
    assert (tmp_path / "run/checkpoints" / f"checkpoint-{steps}" / "pytorch_model_fsdp_0").is_dir()
    before, after = (result["losses"]["validation"][i][1] for i in (0, -1))
    assert after < before


def test_shards_in_bfloat16_keep_what_one_process_keeps_in_float32(config, tmp_path):
    path = config(precision="bf16", gradient_checkpointing=True)
    one, two = (
        run(kind, n, "--config", path, "--output", tmp_path / str(n)) for kind, n in ((None, 1), ("fsdp2", 2))
    )
    assert losses(two) == pytest.approx(losses(one), abs=2e-3)


def test_shards_are_resumed(config, tmp_path):
    """By as many processes or by others; by a process that has the model in one piece it is refused."""
    path = config(steps=4, save_every=2, keep_checkpoints=4)
    whole = run("fsdp2", 2, "--config", path, "--output", tmp_path / "run")
    for name in ("checkpoint-4", "checkpoint-3"):
        subprocess.run(["rm", "-rf", str(tmp_path / "run/checkpoints" / name)], check=True)
    for name in ("model", "result.json"):
        subprocess.run(["rm", "-rf", str(tmp_path / "run" / name)], check=True)
    subprocess.run(["cp", "-r", str(tmp_path / "run"), str(tmp_path / "other")], check=True)
    refused = start(None, 1, "--output", tmp_path / "run", "--resume")
    assert refused.returncode == 2
    assert "accelerate launch" in refused.stderr
    same = run("fsdp2", 2, "--output", tmp_path / "run", "--resume")
    assert losses(same) == losses(whole)
    three = run("fsdp2", 3, "--output", tmp_path / "other", "--resume")
    assert losses(three) == pytest.approx(losses(whole), abs=1e-5)
