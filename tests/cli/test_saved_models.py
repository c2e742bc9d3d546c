"""Pretrained models that commands load: folders, runs, and what is not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from nested_learning.cli.conversation import load_model
from nested_learning.cli.dialogue import load_pretrained
from nested_learning.cli.main import main
from tests.cli.test_chat import folder  # noqa: F401 - a fixture
from tests.cli.test_hope_dialogue import model_and_tokenizer

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copied(folder, tmp_path):  # noqa: F811
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def test_the_folder_of_a_run_is_taken(copied, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(copied, run / "model")
    model, tokenizer = load_pretrained(str(run))
    assert model.num_parameters() == load_pretrained(str(copied))[0].num_parameters()
    assert tokenizer("a")["input_ids"]


@pytest.mark.parametrize("command", ["chat", "adapt", "lens", "export"])
def test_a_model_without_all_of_its_weights_is_refused(copied, tmp_path, capsys, command):
    weights = load_file(copied / "model.safetensors")
    del weights[WEIGHT]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    text, output = tmp_path / "text.txt", tmp_path / "output"
    text.write_text("a rose is a rose is a rose. " * 200)
    flags = {
        "chat": ["--model", str(copied)],
        "adapt": ["--model", str(copied), "--data", str(text), "--block_size", "80", "--steps", "1",
                  "--output", str(output)],
        "lens": [str(copied), "--text", str(text), "--output", str(output)],
        "export": ["--model", str(copied), "--memory", str(text), "--output", str(output)],
    }  # fmt: skip
    assert main([command, *flags[command]]) == 2
    assert f"lack {WEIGHT}; give a whole model" in capsys.readouterr().err
    assert not output.exists()


def test_sizes_that_do_not_fit_are_told(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ValueError, match=r"sizes other than .*\.mlp\.\w+\.weight \(\[.*\], expected \[.*48"):
        load_pretrained(str(copied))


def test_files_of_a_hope_model_that_cannot_be_read_are_called_damaged(tmp_path):
    for part in model_and_tokenizer():
        part.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"the model in .* is damaged \(JSONDecodeError"):
        load_model(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_named(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .*copied .*tokenizer\.json"):
        load_pretrained(str(copied))


def test_a_model_that_reads_both_ways_is_refused(copied):
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=300, **tiny)).save_pretrained(copied)
    with pytest.raises(ValueError, match="holds a BertForMaskedLM, which is no causal language model"):
        load_pretrained(str(copied))
