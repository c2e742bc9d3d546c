"""Runs with an optimizer per level: equal to a loop by hand, resumed bit by bit, shown as trained."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nested_learning.cli.main import main
from nested_learning.models import preset
from nested_learning.training.callbacks import StepTimer
from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.config_file import dump_config, load_config
from nested_learning.training.data import build_data
from nested_learning.training.models import model_config, new_model
from nested_learning.training.optim import build_optimizer, lr_factor, rehearse
from nested_learning.training.run import train

HOPE = {"cms_levels": [{"chunk_size": 16}, {"chunk_size": 64}], "mixer": "titans"}
LEVELS = [
    {"part": "cms.1", "period": "chunk", "name": "m3", "lr": 2e-2, "reduction": "mean"},
    {"part": ["initial", "gates"], "name": "sgd", "momentum": 0.9, "period": 3},
    {"part": "projections", "name": "deltagd", "period": 5, "lr": 1e-3, "weight_decay": 0.0},
]


@pytest.fixture
def nested(tiny):
    """A function that gives the configuration of a tiny Hope run with levels."""

    def config(**fields):
        optim = OptimConfig(lr=1e-2, levels=LEVELS, max_grad_norm=0.1)
        model = {**tiny().model, **HOPE}
        return tiny(**{"preset": "hope-tiny", "model": model, "optim": optim, **fields})

    return config


def losses(result):
    return [loss for _, loss in result["losses"]["train"]]


def stopped_at(step, monkeypatch):
    """Let the process get SIGTERM after a step; returns a function that ends that."""
    original = StepTimer.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StepTimer, "on_step_end", on_step_end)
    return lambda: monkeypatch.setattr(StepTimer, "on_step_end", original)


def test_a_run_is_the_loop_with_the_built_optimizer(nested):
    """The Trainer clips nothing itself, and steps optimizer and schedule once per batch."""
    config = nested(steps=6)
    result = train(config).result
    bundle = build_data(config.data, config.steps * config.batch_size)
    model = new_model(model_config(config.preset, config.model, bundle.tokenizer), config.seed)
    optimizer = build_optimizer(model, config.optim, 16)
    peaks, factor = [group["lr"] for group in optimizer.param_groups], lr_factor(config.optim, 6)
    expected = []
    for step in range(6):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step)
        blocks = torch.stack([bundle.train[step * 4 + row]["input_ids"] for row in range(4)])
        logits = model(blocks, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(result) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 2, "precision": "bf16"}], ids=["plain", "bf16"])
def test_resumed_in_an_accumulation_is_bit_equal(nested, tmp_path, monkeypatch, fields):
    whole = train(nested(**fields, steps=9, output=str(tmp_path / "whole")))
    undo = stopped_at(4, monkeypatch)
    outcome = train(nested(**fields, steps=9))
    undo()
    assert outcome.signal == signal.SIGTERM
    assert outcome.result is None
    resumed = train(nested(**fields, steps=9), resume=True)
    assert losses(resumed.result) == losses(whole.result)
    one, two = (load_file(o.folder.model / "model.safetensors") for o in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_was_trained_is_shown(nested, capsys):
    outcome = train(nested(steps=6))
    saved = json.loads(outcome.folder.result.read_text())["system"]
    assert saved["optimizer"] == "M3 and SGD and DeltaGD and AdamW"
    capsys.readouterr()
    assert main(["levels", str(outcome.folder.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for system in (saved, shown):
        trained = {
            component["name"]: (component["frequency"]["text"], component["part"])
            for level in system["levels"]
            for component in level["components"]
        }
        assert trained["CMS level 2 (chunk 64)"] == ("every 4 optimizer steps", ["cms.1"])
        assert trained["M3: mean of 4 gradients"] == ("every optimizer step", ["cms.1"])
        assert trained["titans: initial memories"] == ("every 3 optimizer steps", ["initial"])
        assert trained["CMS level 1 (chunk 16)"] == ("every optimizer step", ["cms.0"])


def test_a_state_of_other_levels_is_refused_at_resume(nested, monkeypatch, capsys):
    undo = stopped_at(3, monkeypatch)
    folder = train(nested()).folder
    undo()
    changed = load_config(folder.config)
    changed.optim.levels[1]["part"] = "gates"
    header = folder.config.read_text().partition("\n")[0]
    folder.config.write_text(f"{header}\n{dump_config(changed)}")
    assert main(["train", "--output", str(folder.path), "--resume", "--quiet"]) == 2
    assert "Remove that folder" in capsys.readouterr().err


def test_levels_stand_in_yaml_and_on_the_command_line(nested, tmp_path, text_file):
    config = nested()
    path = tmp_path / "nested.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    path.write_text("optim:\n  name: m3\n  options: {alpha: 0.3, frequency: 4}\n  levels:\n  - part: cms.1\n")
    optim = load_config(path).optim
    assert (optim.name, optim.options, optim.levels) == (
        "m3",
        {"alpha": 0.3, "frequency": 4},
        [{"part": "cms.1"}],
    )
    with pytest.raises(ValueError, match="levels"):
        TrainConfig(optim=OptimConfig(levels="cms.1"))


def test_a_level_that_never_moves_is_told(nested):
    config = nested(steps=3)
    described = preset(config.preset, **config.model)
    with pytest.warns(
        RuntimeWarning, match=r"as the run has 3 steps: cms.1 \(period \d+\), proj.* \(period 5"
    ):
        rehearse(described, config.optim, 1, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.levels", '[{"part": "cms.7"}]'], "unknown part of the model 'cms.7'"),
        (["--optim.levels", '[{"part": "gates", "period": -1}]'], "whole number >= 1"),
        (["--optim.name", "addamw"], "Did you mean 'adamw'"),
        (["--optim.name", "lbfgs"], "choose another --optim.name"),
        (["--optim.name", "sgd", "--optim.eps", "1e-3"], "give options of its own as optim.options"),
        (["--optim.name", "rprop"], "set weight_decay to 0"),
        (["--optim.options", '{"lr": 1}'], "optim.options has 'lr'"),
        (["--optim.options", '{"betas": 3}'], "has a value that it cannot take"),
        (["--optim.name", "muon", "--optim.options", '{"ns_steps": 0}'], "a whole number of at least 1"),
        (["--optim.name", "muon", "--optim.options", '{"nesterov": "maybe"}'], "expected true or false"),
        (["--optim.levels", '[{"part": 5}]'], "expected a name, or several in a list"),
        (["--optim.levels", "[5]"], "levels"),
        (["--optim.options", '{"capturable": true}'], "on a CPU: leave it out"),
        (["--optim.options", '{"differentiable": true}'], "in place: leave it out"),
        (["--optim.levels", '[{"part": "gates", "weight_decay": -1}]'], "weight_decay must be"),
        (["--optim.lr", "1" + 400 * "0"], "number is too large"),
        (["--optim.options", '{"alfa": 1}'], "unknown option of AdamW: 'alfa'"),
    ],
)
def test_bad_input(argv, message, text_file, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "--data", str(text_file), "--output", str(output), "--steps", "1", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
