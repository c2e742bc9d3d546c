"""`nested-learning adapt`: continued pre-training with levels that learn as they read."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nested_learning.cli.main import main
from nested_learning.continual import Level, stack_levels
from nested_learning.training.adapt import AdaptTrainer
from tests.cli.test_chat import folder  # noqa: F401 - a fixture

RARELY = ["--eval_every", "100", "--save_every", "100"]
LEVELS = ["--chunk_sizes", "8", "16", "--level_lr", "0.3", "0.1", "--rank", "0", "2"]


@pytest.fixture(scope="module")
def flags(folder, tmp_path_factory):  # noqa: F811
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("a rose is a rose is a rose, and a daisy is a daisy.\n" * 40)
    data = ["--data", str(text), "--block-size", "24", "--data.max_validation_blocks", "4"]
    return ["--model", folder, *data, *LEVELS, "--batch_size", "2", "--lr", "1e-2", "--quiet", *RARELY]


def test_a_run(flags, tmp_path, capsys):
    output = str(tmp_path / "run")
    assert main(["adapt", *flags, "--steps", "10", "--output", output, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    validation = result["validation"]
    assert validation["with_levels_after"] < 0.8 * validation["with_levels_before"]
    assert [level["chunk_size"] for level in result["levels"]] == [8, 16]
    assert result["steps"] == 10
    # what is written is the original class with changed weights, to be stacked again
    model = AutoModelForCausalLM.from_pretrained(result["files"]["model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(result["files"]["model"])
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.use_cache
    learner = stack_levels(model, tokenizer, levels=[Level(8, 0.3), Level(16, 0.1, rank=2)])
    assert learner.observe("a rose is a rose").nanmean() < validation["with_levels_before"]


def test_interrupted_and_resumed_is_uninterrupted(flags, tmp_path, capsys, monkeypatch):
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    assert main(["adapt", *flags, "--steps", "4", "--output", whole]) == 0
    step = AdaptTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdaptTrainer, "training_step", interrupted)
    assert main(["adapt", *flags, "--steps", "4", "--output", parted]) == 130
    monkeypatch.setattr(AdaptTrainer, "training_step", step)
    assert "adapt --output" in capsys.readouterr().err
    assert main(["adapt", "--output", parted, "--resume"]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(f"{path}/model") for path in (whole, parted))
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data.tokenizer", "bpe"], "reads with its own"),
        (["--data.documents", "marked"], "data.documents is 'marked', but what levels learn"),
        (["--data.bpe_vocab_size", "300"], "data.bpe_vocab_size is 300, but a pretrained model reads"),
        (["--steps", "0"], "steps"),
        (["--model", "/nowhere"], "is not a folder"),
        (["--chunk_sizes", "8", "8"], "must increase"),
        (
            ["--chunk_sizes", "24", "48"],
            "block_size is 24, so no text is longer than the fastest chunk of 24",
        ),
    ],
)
def test_bad_input(flags, tmp_path, capsys, extra, message):
    assert main(["adapt", *flags, "--output", str(tmp_path / "run"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume(tmp_path, capsys):
    assert main(["adapt", "--output", str(tmp_path / "none"), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["adapt", "--output", str(tmp_path / "none"), "--resume", "--lr", "1"]) == 2
    assert "unknown option '--lr'" in capsys.readouterr().err
