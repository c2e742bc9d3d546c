"""A whole run: its losses, its files, going on after an interruption, and stopping at a NaN."""

import json
import os
import shutil
import signal
from collections import namedtuple
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nested_learning.training.callbacks import StepTimer
from nested_learning.training.config import DEFAULT_EVALS, OptimConfig
from nested_learning.training.data import DataConfig, bits_per_byte, build_data
from nested_learning.training.models import model_config, new_model
from nested_learning.training.optim import build_optimizer, build_schedule
from nested_learning.training.run import TrainingDiverged, train
from nested_learning.training.run_folder import RunFolder
from nested_learning.training.trainer import HopeTrainer, split_batch

HOPE = {"mixer": "self_modifying_titans", "mixer_options": {"self_modifying_titans": {"chunk_size": 8}}}


def losses(result):
    return [loss for _, loss in result["losses"]["train"]]


def loss_by_hand(model, blocks):
    """Mean over blocks [T] of -log p of each next token, from the logits, in nats."""
    with torch.no_grad():
        logits = model(torch.stack(blocks)).logits.log_softmax(-1)
    targets = torch.stack(blocks)[:, 1:]
    return -logits[:, :-1].gather(-1, targets[..., None]).mean().item()


def test_losses_equal_those_of_a_loop_by_hand(tiny):
    config = tiny(optim=OptimConfig(lr=1e-2, max_grad_norm=0.5))
    got = losses(train(config).result)

    bundle = build_data(config.data, config.steps * config.batch_size)
    model = new_model(model_config(config.preset, config.model, bundle.tokenizer), config.seed)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.steps)
    expected = []
    for step in range(config.steps):
        blocks = torch.stack([bundle.train[step * 4 + row]["input_ids"] for row in range(4)])
        logits = model(blocks, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert got == pytest.approx(expected, abs=1e-6)


def test_result_says_what_was_done(tiny, drawn):
    config = tiny(model={**tiny().model, **HOPE}, preset="hope-tiny", steps=6)
    outcome = train(config)
    folder = outcome.folder
    result = json.loads(folder.result.read_text())
    assert outcome.result is not None
    assert result == json.loads(json.dumps(outcome.result))

    model = AutoModelForCausalLM.from_pretrained(folder.model)
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    assert type(model).__name__ == "HopeForCausalLM"
    assert model.config.use_cache
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["tokens"] == 6 * 4 * 16
    assert result["steps"] == len(losses(result)) == result["step_seconds"]["measured"] == 6
    assert result["tokens_per_second"] > 0
    assert result["peak_memory"]["bytes"] > 50 << 20
    assert result["config"]["optim"]["lr"] == 1e-2
    assert {"torch", "transformers", "nested_learning", "git"} <= set(result["versions"])

    bundle = build_data(config.data, 24)
    blocks = [bundle.validation[i]["input_ids"] for i in range(len(bundle.validation))]
    assert result["validation"]["blocks"] == len(blocks) == 8
    after = result["validation"]["after"]
    assert after["step"] == 6
    assert after["nats_per_token"] == pytest.approx(loss_by_hand(model, blocks), abs=1e-5)
    assert after["bits_per_byte"] == pytest.approx(
        bits_per_byte(after["nats_per_token"], bundle.bytes_per_token)
    )
    untrained = new_model(model_config(config.preset, config.model, bundle.tokenizer), 0).eval()
    before = result["validation"]["before"]
    assert before["nats_per_token"] == pytest.approx(loss_by_hand(untrained, blocks), abs=1e-5)
    assert result["sample"]["prompt"] == tokenizer.decode(blocks[0][:32])
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert any(folder.tensorboard.glob("events.*"))
    assert not list(folder.path.rglob(".*"))


def test_validation_is_the_mean_over_whole_batches(tiny):
    """11 blocks in batches of 4: 8 of them, evenly spaced, and no batch that counts more than another."""
    config = tiny(data=DataConfig(**{**vars(tiny().data), "max_validation_blocks": 11}), steps=1)
    result = train(config).result
    model = AutoModelForCausalLM.from_pretrained(RunFolder(config.output).model)
    validation = build_data(config.data, 4).validation
    kept = [validation[i * 11 // 8]["input_ids"] for i in range(8)]
    assert result["validation"]["blocks"] == 8
    assert result["validation"]["after"]["nats_per_token"] == pytest.approx(
        loss_by_hand(model, kept), abs=1e-5
    )


def test_accumulated_micro_batches_give_the_losses_of_whole_ones(tiny, tmp_path):
    whole = train(tiny())
    parts = train(tiny(micro_batch_size=1, output=str(tmp_path / "parts")))
    assert losses(parts.result) == pytest.approx(losses(whole.result), abs=1e-5)
    assert parts.result["tokens"] == whole.result["tokens"]


def test_bf16_and_gradient_checkpointing_train_the_same_model_nearly(tiny, tmp_path):
    config = tiny(model={**tiny().model, **HOPE}, preset="hope-tiny", steps=4)
    plain = losses(train(config).result)
    options = {"model": config.model, "preset": "hope-tiny", "steps": 4}
    saved = train(tiny(**options, gradient_checkpointing=True, output=str(tmp_path / "c"))).result
    assert losses(saved) == pytest.approx(plain, abs=1e-6)
    half = losses(train(tiny(**options, precision="bf16", output=str(tmp_path / "h"))).result)
    assert half != plain
    assert half == pytest.approx(plain, abs=0.05)


def test_seed_changes_weights_and_order(tiny, tmp_path):
    first = losses(train(tiny(steps=2)).result)
    again = losses(train(tiny(steps=2, output=str(tmp_path / "again"))).result)
    other = losses(train(tiny(steps=2, seed=1, output=str(tmp_path / "other"))).result)
    assert first == again
    assert first[0] != other[0]


@pytest.fixture
def signal_after(monkeypatch):
    """A function that lets the process get a signal during the given step."""

    def arrange(step, number):
        original = StepTimer.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), number)
            return original(self, args, state, control, **kwargs)

        monkeypatch.setattr(StepTimer, "on_step_end", on_step_end)
        return lambda: monkeypatch.setattr(StepTimer, "on_step_end", original)

    return arrange


@pytest.mark.parametrize(
    ("number", "fields"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {"preset": "hope-tiny", "model": HOPE, "micro_batch_size": 2}),
    ],
)
def test_interrupted_and_resumed_is_bit_equal_to_uninterrupted(tiny, tmp_path, signal_after, number, fields):
    fields = {**fields, "model": {**tiny().model, **fields.get("model", {})}}
    whole = train(tiny(**fields, output=str(tmp_path / "whole")))
    handler = signal.getsignal(number)
    undo = signal_after(5, number)
    outcome = train(tiny(**fields))
    undo()
    assert signal.getsignal(number) is handler
    assert (outcome.signal, outcome.result, outcome.checkpoint.name) == (number, None, "checkpoint-6")
    assert not outcome.folder.result.exists()

    resumed = train(tiny(**fields), resume=True)
    assert losses(resumed.result) == losses(whole.result)
    assert resumed.result["tokens"] == whole.result["tokens"]
    assert resumed.result["validation"]["after"] == whole.result["validation"]["after"]
    assert resumed.result["validation"]["before"] == whole.result["validation"]["before"]
    one, two = (load_file(o.folder.model / "model.safetensors") for o in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_interrupted_before_the_first_checkpoint_starts_again(tiny, tmp_path, signal_after):
    whole = train(tiny(output=str(tmp_path / "whole")))
    undo = signal_after(3, signal.SIGTERM)
    outcome = train(tiny())
    undo()
    shutil.rmtree(outcome.checkpoint)
    shutil.rmtree(RunFolder(tiny().output).checkpoints)
    assert losses(train(tiny(), resume=True).result) == losses(whole.result)


def test_nan_stops_before_the_step_and_keeps_the_state(tiny):
    config = tiny(optim=OptimConfig(lr=1e30, max_grad_norm=0.0, warmup_steps=0))
    with pytest.raises(TrainingDiverged, match=r"of step \d is (nan|inf).*kept in .*checkpoint-\d") as caught:
        train(config)
    step = int(str(caught.value).split("of step ")[1][0])
    folder = RunFolder(config.output)
    assert folder.last_checkpoint().name == f"checkpoint-{step - 1}"
    weights = load_file(folder.last_checkpoint() / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not folder.result.exists()
    assert not folder.model.exists()


def test_a_gradient_that_is_not_finite_is_not_applied(tiny, monkeypatch):
    poisoned = []

    def backward(trainer, model, inputs, num_items_in_batch=None):
        loss = original(trainer, model, inputs, num_items_in_batch)
        if trainer.state.global_step == 3:
            next(model.parameters()).grad[0, 0] = float("inf")
            poisoned.append(True)
        return loss

    original = HopeTrainer.training_step
    monkeypatch.setattr(HopeTrainer, "training_step", backward)
    with pytest.raises(TrainingDiverged, match=r"gradient norm of step 4 is (inf|nan)"):
        train(tiny())
    assert poisoned
    assert RunFolder(tiny().output).last_checkpoint().name == "checkpoint-3"


def test_another_run_is_not_overwritten_by_accident(tiny):
    folder = train(tiny(steps=1)).folder
    before = folder.result.read_text()
    with pytest.raises(ValueError, match=r"already holds a run. Add --resume .* --overwrite"):
        train(tiny(steps=1))
    with pytest.raises(ValueError, match="is complete"):
        train(tiny(steps=1), resume=True)
    with pytest.raises(ValueError, match="expected one"):
        train(tiny(steps=1), resume=True, overwrite=True)
    assert folder.result.read_text() == before

    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="unknown preset"):
        train(tiny(preset="hope-tinny"), overwrite=True)
    assert folder.result.read_text() == before  # a run that cannot start leaves the old one alone
    train(tiny(steps=2), overwrite=True)
    assert json.loads(folder.result.read_text())["steps"] == 2
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_no_run_is_never_touched(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("# somebody's\nsteps: 3\n")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no run of ours"):
            train(tiny(), overwrite=overwrite)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(tiny(), resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_resumed_run_keeps_its_settings(tiny, signal_after):
    undo = signal_after(3, signal.SIGTERM)
    train(tiny())
    undo()
    with pytest.raises(ValueError, match=r"optim.lr \(now 0.5, the run has 0.01\)"):
        train(tiny(optim=OptimConfig(lr=0.5)), resume=True)
    with pytest.raises(ValueError, match="steps"):
        train(tiny(steps=9), resume=True)


def test_too_little_space_is_seen_before_training(tiny, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(OSError, match="Make room"):
        train(tiny())
    assert not RunFolder(tiny().output).path.exists()


@pytest.mark.parametrize("output", ["/proc/nothing/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tiny, output):
    with pytest.raises(OSError, match="cannot be written"):
        train(tiny(output=output))


def test_time_limit_ends_the_run(tiny):
    result = train(tiny(steps=None, max_minutes=0.02)).result
    assert result["steps"] == len(losses(result)) >= 1
    assert 0 < result["minutes"] < 1


def test_split_batch():
    class Config:
        batch_size, micro_batch_size, compile = 12, None, False

    assert split_batch(Config, 1) == (12, 1)
    assert split_batch(Config, 3) == (4, 1)
    Config.micro_batch_size = 2
    assert split_batch(Config, 3) == (2, 2)
    with pytest.raises(ValueError, match="not divisible by the 5 processes"):
        split_batch(Config, 5)
    Config.micro_batch_size = 5
    with pytest.raises(ValueError, match="Choose a divisor"):
        split_batch(Config, 1)


def test_training_learns(tiny):
    result = train(tiny(steps=60, optim=OptimConfig(lr=1e-2))).result
    assert fmean(losses(result)[-5:]) < losses(result)[0] - 1.5
    assert result["validation"]["after"]["nats_per_token"] < result["validation"]["before"]["nats_per_token"]
    assert len(result["losses"]["validation"]) == DEFAULT_EVALS + 1
