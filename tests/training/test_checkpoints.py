"""Checkpoints: which are whole, which one a run goes on from, what a damaged one says, which ones go."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nested_learning.training.callbacks import StepTimer
from nested_learning.training.checkpoints import (
    MANIFEST,
    checkpoint_to_resume,
    flaw,
    numbered,
    rotate,
    standing,
    write_manifest,
)
from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.config_file import dump_config
from nested_learning.training.data import DataConfig, build_data
from nested_learning.training.models import model_config, new_model
from nested_learning.training.process import process_state
from nested_learning.training.run import train
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.trainer import HopeTrainer, trainer_arguments
from tests.damage import damaged_bytes, damaged_json
from tests.training.conftest import TINY_MODEL

STATE = "trainer_state.json"
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def config(text_file, tmp_path_factory):
    """A function that gives the configuration of a run of 6 steps with a checkpoint after every second."""
    base = tmp_path_factory.mktemp("runs")

    def make(name):
        return TrainConfig(
            preset="transformer-tiny",
            model=dict(TINY_MODEL),
            data=DataConfig(source=str(text_file), block_size=16, max_validation_blocks=8),
            optim=OptimConfig(lr=1e-2),
            output=str(base / name),
            steps=6,
            batch_size=4,
            save_every=2,
            sample_tokens=0,
        )

    return make


@pytest.fixture(scope="module")
def whole(config):
    """Losses of a run without interruption."""
    return train(config("whole")).result["losses"]


@pytest.fixture(scope="module")
def stopped(config):
    """The folder of a run that was interrupted after its second checkpoint."""
    original = StepTimer.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:  # seen after the next one
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimer, "on_step_end", on_step_end)
        outcome = train(config("stopped"))
    assert [n for n, _ in numbered(outcome.folder.checkpoints)] == [2, 4]
    return outcome.folder.path


@pytest.fixture
def run(stopped, config):
    """A copy of it: (configuration to resume with, folder of its checkpoints)."""
    resumed = config("resumed")
    shutil.rmtree(resumed.output, ignore_errors=True)
    shutil.copytree(stopped, resumed.output)
    return resumed, RunFolder(resumed.output).checkpoints


def without_manifest(checkpoint):
    (checkpoint / MANIFEST).unlink()
    return checkpoint


def flip(path, at=None, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1 << bit
    path.write_bytes(content)


def set_state(**fields):
    def change(checkpoint):
        state = json.loads((checkpoint / STATE).read_text())
        (checkpoint / STATE).write_text(json.dumps({**state, **fields}))

    return change


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Which are whole --------------------------------------------------------------------------------------------


def test_a_checkpoint_has_a_manifest_of_all_its_files(stopped):
    for _, checkpoint in numbered(stopped / "checkpoints"):
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        names = {p.name for p in checkpoint.iterdir()} - {MANIFEST}
        assert set(manifest["files"]) == names >= {*FILES, "tokenizer.json"}
        assert flaw(checkpoint) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["flipped", "short", "long", "missing"])
def test_each_file(run, name, kind):
    checkpoint = run[1] / "checkpoint-4"
    path = checkpoint / name
    if kind == "flipped":
        flip(path)
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if kind == "short" else path.read_bytes() + b"\0")
    said = {"flipped": "the content of its .* is not what was written", "missing": "(is missing|it has no)"}
    assert re.search(said.get(kind, "bytes, expected"), flaw(checkpoint))
    assert name.split(".")[0] in flaw(checkpoint)


@pytest.mark.parametrize("number", ["x", None, 100, 3, 4.0, True, [4]])
@pytest.mark.parametrize("known", [True, False])
def test_the_step_of_the_record(run, number, known):
    checkpoint = run[1] / "checkpoint-4"
    set_state(global_step=number)(checkpoint)
    write_manifest(checkpoint) if known else without_manifest(checkpoint)
    assert "trainer_state.json is of step" in flaw(checkpoint)


@pytest.mark.parametrize(
    "fields",
    [
        {"log_history": None},
        {"log_history": []},
        {"log_history": [{"loss": 1.0}]},
        {"log_history": [{"loss": "x", "step": 1}]},
        {"num_input_tokens_seen": "many"},
        {"eval_steps": "x"},
        {"save_steps": 0},
        {"stateful_callbacks": None},
        {"stateful_callbacks": {}},
        {"of_another_version": 1},
    ],
)
def test_the_rest_of_the_record(run, fields):
    checkpoint = without_manifest(run[1] / "checkpoint-4")
    set_state(**fields)(checkpoint)
    assert "trainer_state.json" in flaw(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "[", "7", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"format": "x", "files": {}}']
)
def test_a_damaged_manifest(run, text):
    checkpoint = run[1] / "checkpoint-4"
    (checkpoint / MANIFEST).write_text(text)
    assert "manifest.json" in flaw(checkpoint)


def test_a_file_that_the_manifest_does_not_know(run):
    """An optimizer put there later would be loaded; a note would not."""
    checkpoint = run[1] / "checkpoint-4"
    (checkpoint / "notes.txt").write_text("mine")
    assert flaw(checkpoint) is None
    (checkpoint / "rng_state_1.pth").write_bytes(b"x")
    assert "does not know rng_state_1.pth" in flaw(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_archives_have_sums_of_their_own(run, name):
    """So that most flipped bits are seen without a manifest too. Nothing is unpickled for that."""
    checkpoint = without_manifest(run[1] / "checkpoint-4")
    content = (checkpoint / name).read_bytes()
    flip(checkpoint / name, content.find(b"last_epoch") if name == "scheduler.pt" else len(content) // 2)
    assert f"its {name} cannot be read" in flaw(checkpoint)


def fuzz(stopped, data):
    folder = stopped.parent / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = Path(shutil.copytree(stopped / "checkpoints" / "checkpoint-4", folder / "checkpoint-4"))
    name = data.draw(st.sampled_from([*FILES, MANIFEST]))
    if data.draw(st.booleans()) and name in (STATE, MANIFEST):
        value = json.loads((checkpoint / name).read_text())
        content = json.dumps(data.draw(damaged_json(value))).encode()
        same = json.loads(content) == value
    else:
        content = data.draw(damaged_bytes((checkpoint / name).read_bytes()))
        same = False
        if name == MANIFEST:  # spaces, and the like
            with contextlib.suppress(ValueError):
                same = json.loads(content) == json.loads((checkpoint / name).read_bytes())
    same = same or content == (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content)
    said = flaw(checkpoint)
    if not same:
        # a manifest may lose what nobody needs, such as the tokenizer's files
        assert said is not None or name == MANIFEST
    if said is not None:
        assert len(said) > 10
        with pytest.raises(ValueError, match=r"none of the checkpoints in .* is whole"):
            checkpoint_to_resume(folder, process_state())
    if name != MANIFEST:
        flaw(without_manifest(checkpoint))  # an answer, whatever it is


@settings(max_examples=40, **FUZZ)
@given(data=st.data())
def test_damage(stopped, data):
    fuzz(stopped, data)


@pytest.mark.slow
@settings(max_examples=1000, **FUZZ)
@given(data=st.data())
def test_much_damage(stopped, data):
    fuzz(stopped, data)


# Going on ---------------------------------------------------------------------------------------------------


def test_from_the_newest_whole_one(run, whole):
    resumed, checkpoints = run
    flip(checkpoints / "checkpoint-4" / "model.safetensors", -3)
    with pytest.warns(
        RuntimeWarning, match=r"checkpoint-4 is damaged .*model.safetensors.*going on from checkpoint-2"
    ):
        result = train(resumed, resume=True).result
    assert result["losses"] == whole
    assert [n for n, _ in numbered(checkpoints)] == [4, 6]
    assert flaw(checkpoints / "checkpoint-4") is None  # written anew


def test_not_at_all_where_none_is_whole(run):
    resumed, checkpoints = run
    (checkpoints / "checkpoint-2" / "scheduler.pt").unlink()
    flip(checkpoints / "checkpoint-4" / "optimizer.pt")
    before = tree(Path(resumed.output))
    with pytest.raises(
        ValueError,
        match=r"none .* is whole.*checkpoint-4 is damaged .*optimizer.*checkpoint-2 is .*scheduler",
    ):
        train(resumed, resume=True)
    assert tree(Path(resumed.output)) == before


def test_without_a_manifest_with_a_warning(run, whole):
    resumed, checkpoints = run
    without_manifest(checkpoints / "checkpoint-4")
    with pytest.warns(RuntimeWarning, match="checkpoint-4 is of a version without manifests"):
        assert train(resumed, resume=True).result["losses"] == whole


def other_shape(checkpoint):
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state = saved["state"][0]
    state["exp_avg"] = state["exp_avg"][:1].clone()
    torch.save(saved, checkpoint / "optimizer.pt")


def no_state(checkpoint):
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    torch.save({**saved, "state": {}}, checkpoint / "optimizer.pt")


def other_step(checkpoint):
    saved = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    torch.save({**saved, "last_epoch": 1}, checkpoint / "scheduler.pt")


def other_content(name):
    return lambda checkpoint: torch.save({"x": 1}, checkpoint / name)


def other_weights(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, "exp_avg has shape"),
        (no_state, "no state of"),
        (other_step, "its schedule is at step 1, the checkpoint at 4"),
        (other_content("optimizer.pt"), "KeyError"),
        (other_content("rng_state.pth"), "KeyError"),
        (other_weights, "missing"),
    ],
)
def test_what_only_loading_shows(run, change, message):
    """Files that can be opened, without a manifest: never a traceback, never silently another loss."""
    resumed, checkpoints = run
    change(without_manifest(checkpoints / "checkpoint-4"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ValueError, match=rf"(?s)checkpoint-4 is damaged .*{message}.*Remove that folder"):
            train(resumed, resume=True)


# Writing ----------------------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_not_taken_over(run, whole):
    resumed, checkpoints = run
    left = checkpoints / ".partial" / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "optimizer.bin").write_bytes(b"half")
    assert train(resumed, resume=True).result["losses"] == whole
    assert not (checkpoints / "checkpoint-6" / "optimizer.bin").exists()
    assert not (checkpoints / ".partial").exists()


def test_a_full_disk_is_said_and_the_last_checkpoint_stands(run, monkeypatch):
    resumed, checkpoints = run
    before = tree(checkpoints)

    def fail(self, folder):
        (Path(folder) / "optimizer.pt").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HopeTrainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(OSError, match="the disk is full") as caught:
        train(resumed, resume=True)
    assert str(caught.value) == (
        f"cannot write {checkpoints / 'checkpoint-6' / 'optimizer.pt'}: the disk is full (No space left on "
        f"device). The last checkpoint stands: {checkpoints / 'checkpoint-4'}; make room and try again."
    )
    assert tree(checkpoints) == before


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_for_real(run):
    """The command ends with code 2 and the message, the checkpoint before is whole."""
    resumed, checkpoints = run
    code = (
        "import resource, sys\n"
        "from nested_learning.cli.main import main\n"
        # optimizer.pt has 200 kB
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, resource.RLIM_INFINITY))\n"
        f"sys.exit(main(['train', '--resume', '--quiet', '--output', {resumed.output!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert f"cannot write {checkpoints / 'checkpoint-6'}/" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"The last checkpoint stands: {checkpoints / 'checkpoint-4'}" in done.stderr
    assert flaw(checkpoints / "checkpoint-4") is None
    assert [n for n, _ in numbered(checkpoints)] == [2, 4]


@pytest.mark.parametrize(
    ("limit", "current", "best", "left"),
    [
        (None, 6, None, [2, 4, 6, 8]),
        (2, 6, None, [4, 6]),
        (1, 6, None, [6]),
        (1, 6, 2, [2, 6]),
        (3, 8, 2, [2, 6, 8]),
        (1, 8, 8, [8]),
    ],
)
def test_which_ones_go(tmp_path, limit, current, best, left):
    """Never the one just written, nor the best; those beyond it were found damaged, and go first."""
    for number in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{number}").mkdir()
    best = None if best is None else str(tmp_path / f"checkpoint-{best}")
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{current}", best)
    assert [n for n, _ in numbered(tmp_path)] == left


def test_the_best_model_is_kept_and_loaded(config, tmp_path):
    """transformers' load_best_model_at_end, where the scores are said to be best after two steps."""
    given = config("best")
    bundle = build_data(given.data, 24)
    folder = RunFolder(tmp_path / "run")
    args = trainer_arguments(given, folder, 4)
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "loss", False
    args.eval_steps, args.save_total_limit, args.eval_on_start = 2, 2, False
    model = new_model(model_config(given.preset, given.model, bundle.tokenizer), 0)
    trainer = HopeTrainer(model, given, bundle.tokenizer, args, bundle.train, bundle.validation)
    scores = iter([1.0, 3.0, 2.0])
    evaluate = trainer.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = next(scores)
        return output

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    best = folder.checkpoints / "checkpoint-2"
    assert [n for n, _ in numbered(folder.checkpoints)] == [2, 6]
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((folder.checkpoints / "checkpoint-6" / STATE).read_text())[
        "best_model_checkpoint"
    ] == str(best)
    assert all(flaw(path) is None for _, path in numbered(folder.checkpoints))
    for name, saved in load_file(best / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], saved)


def test_what_stands(tmp_path):
    assert standing(tmp_path) == "There is no checkpoint yet"
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    assert standing(tmp_path) == f"The last checkpoint stands: {tmp_path / 'checkpoint-10'}"


@pytest.mark.slow
def test_two_processes_take_the_same_whole_one(config, tmp_path):
    """The manifest lists the random states of both; both go on from the checkpoint before a damaged one."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(dump_config(config("two"))), "keep_checkpoints": 3}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "nested_learning", "train", "--quiet", "--json"]

    def run(*flags):
        done = subprocess.run(
            [*command, *flags, "--output", str(tmp_path / "run")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    first, _ = run("--config", str(path))
    folder = RunFolder(tmp_path / "run")
    assert [flaw(checkpoint) for _, checkpoint in numbered(folder.checkpoints)] == [None] * 3
    files = json.loads((folder.checkpoints / "checkpoint-6" / MANIFEST).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)
    folder.result.unlink()
    for number in (4, 6):
        flip(folder.checkpoints / f"checkpoint-{number}" / "optimizer.pt")
    second, said = run("--resume")
    assert second["losses"] == first["losses"]
    assert "going on from checkpoint-2" in said
