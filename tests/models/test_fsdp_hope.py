"""Sharded models train as the model in one piece does, in every mode; what cannot be is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ecosystem.tiny_hope import LEARNING

ROOT = Path(__file__).parents[2]
LEARNED_RATES = "lm learned rates"


def train(processes, *cases):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    torchrun = [] if processes == 1 else torchrun
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *torchrun, "-m", "tests.models.fsdp_worker", *cases],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found):
    for name, result in found.items():
        if name == "lm exact, blocks":
            assert "use 'first_order'" in result
        elif name.startswith("lm") and name.endswith("fsdp1 blocks"):
            assert "fully_shard (FSDP2)" in result
        else:
            assert isinstance(result, float), (name, result)
            assert result < 1e-12, name


def test_two_processes_often():
    """With a copy each, in shards of blocks and of mixers, and what FSDP1 cannot do."""
    check(train(2, "regression", "lm", "ddp", "blocks", "parts", "fsdp1 blocks"))


@pytest.mark.slow
def test_one_process():
    check(train(1, "regression", "lm"))


@pytest.mark.slow
def test_two_processes():
    learning = [case for case in LEARNING if case != LEARNED_RATES]
    check(train(2, *learning, "hybrid", "mag", "mac"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "model", "blocks"])
def test_two_processes_with_compiled_blocks(way):
    check(train(2, "self_modifying_titans", "gated_deltanet", "regression", way, "compiled"))


@pytest.mark.slow
def test_scalars_are_refused_by_torch_where_it_shards():
    found = train(1, LEARNED_RATES)
    assert found.pop(f"{LEARNED_RATES}, ddp") < 1e-12  # a copy in each process
    assert len(found) > 2
    for result in found.values():
        assert "log_lr" in result
