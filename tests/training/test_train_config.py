"""TrainConfig: what it refuses, and that YAML gives back what was written."""

import dataclasses

import pytest

from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.config_file import dump_config, load_config, nearest, refuse_changes, to_dict
from nested_learning.training.data import DataConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"steps": -1}, "steps is -1"),
        ({"max_minutes": 0.0}, "max_minutes is 0.0; expected a positive number"),
        ({"steps": 5, "max_minutes": 1.0}, "Leave one out"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected 'fp32' or 'bf16'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_run_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0; expected a positive number"),
        ({"lr": float("nan")}, "optim.lr is nan"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"weight_decay": -1.0}, "optim.weight_decay"),
        ({"schedule": "step"}, "optim.schedule is 'step'"),
        ({"final_lr_fraction": 2.0}, "optim.final_lr_fraction"),
        ({"max_grad_norm": -1.0}, "optim.max_grad_norm"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
    ],
)
def test_optimizer_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**fields)


def test_warmup_fits_into_the_run():
    assert OptimConfig().warmup(200) == 50
    assert OptimConfig().warmup(40) == 10
    assert OptimConfig(warmup_steps=7).warmup(8) == 7
    with pytest.raises(ValueError, match="fewer than the 7 steps"):
        OptimConfig(warmup_steps=7).warmup(7)


def test_fixing_the_steps_fixes_what_follows_from_them():
    config = TrainConfig(max_minutes=1.0).with_steps(103)
    assert (config.steps, config.max_minutes, config.eval_every, config.save_every) == (103, None, 21, 26)
    assert TrainConfig(eval_every=7).with_steps(103).eval_every == 7


def test_yaml_gives_back_the_configuration(tmp_path):
    config = TrainConfig(
        preset="transformer-tiny",
        model={"num_heads": 2, "cms_levels": [{"chunk_size": 8}], "mixer_options": {}},
        data=DataConfig(source="a b: c.txt", block_size=32),
        optim=OptimConfig(lr=1e-5, betas=(0.8, 0.9), warmup_steps=3),
        steps=9,
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr' in .*Did you mean 'optim.lr'"),
        ("optimizer: {lr: 1}", "unknown key 'optimizer.lr'.*Did you mean 'optim.lr'"),
        ("batchsize: 3", "unknown key 'batchsize'.*Did you mean 'batch_size'"),
        ("steps: many", "steps"),
        ("- 3", "expected a mapping"),
        ("a: [", "is not YAML"),
        ("steps: 3\nseed: 1\nsteps: 4", r"'steps' stands in lines 1 and 3"),
        ("model:\n  num_heads: 2\n  num_heads: 4", "'num_heads' stands in lines 2 and 3"),
        ("optim: {levels: [{part: cms, part: gates}]}", "'part' stands in lines 1 and 1"),
        (f"optim: {{lr: 1{400 * '0'}}}", "number is too large"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_merged_groups_of_yaml_may_be_overridden(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("model:\n  <<: [&a {num_heads: 4}, &b {<<: *a, num_heads: 2}]\n  num_heads: 8\n")
    assert load_config(path).model == {"num_heads": 8}


def test_only_real_changes_of_a_run_are_refused():
    saved = TrainConfig(steps=8, output="here", model={"num_heads": 2})
    refuse_changes(
        saved, {"steps": 8, "output": "there", "max_minutes": 3.0, "optim": {"betas": (0.9, 0.95)}}
    )
    with pytest.raises(ValueError, match=r"optim.lr \(now 0.5, the run has 0.003\)"):
        refuse_changes(saved, {"optim": {"lr": 0.5}})
    with pytest.raises(ValueError, match=r"model\.num_heads"):
        refuse_changes(saved, to_dict(dataclasses.replace(saved, model={"num_heads": 4})))


def test_nearest_looks_at_the_whole_name_and_at_its_last_part():
    assert nearest("--optim.lrate", ["--optim.lr", "--seed"]) == " Did you mean '--optim.lr'?"
    assert nearest("--weight_decay", ["--optim.weight_decay", "--seed"]) == (
        " Did you mean '--optim.weight_decay'?"
    )
    assert nearest("--zzz", ["--optim.lr", "--seed"]) == ""
