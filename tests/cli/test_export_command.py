"""`nested-learning export`: a memory file, without its settings being told again, as a folder for others."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from nested_learning.cli.main import main
from nested_learning.continual import Level, reopen, stack_levels
from nested_learning.optimizers.memory_forms import MomentumMemory
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import byte_llama
from tests.damage import read_file

IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    model, tokenizer = byte_llama(layers=3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def saved(folder, path, levels, **options):
    """A learner that has read, and saved its memory."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    learner = stack_levels(model, byte_tokenizer(), levels=levels, **options)
    learner.observe("The lighthouse of Varnholm was built by Ilse Brandt in 1871.")
    learner.memory.save(path)
    return learner


def test_a_checkpoint_and_an_adapter(folder, tmp_path, capsys):
    memory = tmp_path / "memory.safetensors"
    learner = saved(folder, memory, [Level(8, 0.5, rule="momentum"), Level(16, 0.3, layers="last third")])
    call = ["export", "--model", folder, "--memory", str(memory)]
    capsys.readouterr()
    assert main([*call, "--output", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "checkpoint"
    assert report["difference"] <= 1e-4 * report["largest_logit"]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(found, learner.logits(IDS), rtol=1e-5, atol=1e-5)
    assert main([*call, "--output", str(tmp_path / "lora"), "--lora_rank", "2", "--levels", "1"]) == 0
    shown = capsys.readouterr().out
    assert "adapter in" in shown
    assert "cut by the rank" in shown
    assert main([*call, "--output", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*call, "--output", ""]) == 2
    assert "output is ''; expected the path of a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules": ["mlp.up_proj", "self_attn.q_proj"]},
        {"segment": 4, "window": 20, "overlap": 7},
    ],
)
def test_a_file_tells_its_learner(folder, tmp_path, options):
    levels = [Level(8, 0.5, rank=2, gate_quantile=0.1), Level(16, 0.3, layers=[-1], decay=0.1)]
    path = tmp_path / "memory"
    learner = saved(folder, path, levels, **options)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = reopen(path, model, byte_tokenizer())
    assert [level.describe() for level in again.levels] == [level.describe() for level in learner.levels]
    more = "Ilse Brandt built it."
    assert torch.equal(again.observe(more), learner.observe(more))


def test_a_file_that_does_not_tell_it(folder, tmp_path):
    path = tmp_path / "memory"
    learner = saved(folder, path, [Level(8, 0.5, rule=MomentumMemory(0.5))])
    with pytest.raises(ValueError, match="does not tell the levels of its learner"):
        reopen(path, learner.model)
    learner = saved(folder, path, [Level(8, 0.5, layers="last third")], modules=["1.mlp.up_proj"])
    assert reopen(path, learner.model).levels == learner.levels
    with pytest.raises(FileNotFoundError, match="no memory file"):
        reopen(tmp_path / "none", learner.model)
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=300)).eval()
    with pytest.raises(ValueError, match="is of a learner on other weights than GPT2LMHeadModel has"):
        reopen(path, other)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("levels", [{"chunk_size": 8, "lr": "fast"}]),
        ("levels", [{"pace": 8}]),
        ("levels", [8]),
        ("levels", {}),
        ("reading", {"segment": 8, "window": "wide", "overlap": 1}),
        ("reading", {"segment": 8}),
        ("weights", [[1]]),
        ("weights", 7),
        ("levels", None),
    ],
)
def test_a_file_that_tells_nonsense(folder, tmp_path, key, value):
    path = tmp_path / "memory"
    learner = saved(folder, path, [Level(8, 0.5, rank=1)])
    tensors, metadata = read_file(path)
    save_file(tensors, path, {**metadata, key: "{" if value is None else json.dumps(value)})
    with pytest.raises(ValueError, match="does not tell the levels of its learner"):
        reopen(path, learner.model)
