"""`nested-learning lens`: a page of a Hope run and of a pretrained model, and what is refused."""

from __future__ import annotations

import io

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nested_learning import HopeForCausalLM, preset
from nested_learning.cli.main import main
from nested_learning.continual import Level, stack_levels
from nested_learning.training.data import byte_tokenizer

LEVELS = ["--chunk_sizes", "4", "8", "--level_lr", "0.5"]
TEXT = "a rose is a rose <is> a rose"


@pytest.fixture(scope="module")
def hope_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    HopeForCausalLM(preset("hope-tiny", num_hidden_layers=1, hidden_size=16)).save_pretrained(
        folder / "model"
    )
    byte_tokenizer().save_pretrained(folder / "model")
    return str(folder)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("llama"))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=258, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def refused(capsys, *argv):
    """The message of a command that is refused as bad input."""
    capsys.readouterr()
    assert main(["lens", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_run_is_shown(hope_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    page, pictures = tmp_path / "page.html", tmp_path / "new"
    assert main(["lens", hope_folder, "--text", "-", "--output", str(page), "--png", str(pictures)]) == 0
    written = page.read_text(encoding="utf-8")
    assert f"{len(TEXT)} tokens, mean loss" in written
    assert "surprise, layers.0.mixer" in written
    assert {path.name for path in pictures.iterdir()} == {
        "levels.png", "text.png", "tokens.png", "layers.0.mixer.png"
    }  # fmt: skip
    assert f"written: {page}" in capsys.readouterr().err


def test_a_pretrained_model_learns_from_the_text_and_its_memory_file_stays(llama_folder, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    learner = stack_levels(model, byte_tokenizer(), levels=[Level(4, 0.5), Level(8, 0.5)])
    learner.observe("a daisy is a daisy")
    memory, page = tmp_path / "anna.safetensors", tmp_path / "page.html"
    learner.memory.save(memory)
    before = memory.read_bytes()
    options = ["--memory", str(memory), "--output", str(page), "--max_tokens", "12"]
    assert main(["lens", llama_folder, "--text", text, *LEVELS, *options]) == 0
    assert memory.read_bytes() == before
    written = page.read_text(encoding="utf-8")
    assert "12 tokens, mean loss" in written
    assert '"marks":[[2,' in written  # the boundary after 18 tokens of the memory and two of the text
    assert "model.layers.1.mlp.down_proj.weight" in written


def test_without_flags_the_levels_are_those_of_the_file(llama_folder, text, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    learner = stack_levels(model, byte_tokenizer(), levels=[Level(8, 0.1, rule="adam", rank=2)])
    learner.observe("a daisy is a daisy")
    learner.memory.save(tmp_path / "anna")
    page = tmp_path / "page.html"
    options = ["--text", text, "--memory", str(tmp_path / "anna"), "--output", str(page)]
    assert main(["lens", llama_folder, *options]) == 0
    assert "every 8 tokens, lr 0.1, adam" in page.read_text(encoding="utf-8")
    assert "other levels" in refused(capsys, llama_folder, *options, *LEVELS)


def test_bad_input_is_told_in_a_sentence(hope_folder, llama_folder, text, tmp_path, capsys):
    assert "no text is given: --text FILE" in refused(capsys, hope_folder)
    assert "is a preset, whose weights are random" in refused(capsys, "hope-tiny", "--text", text)
    assert "holds no saved model" in refused(capsys, str(tmp_path), "--text", text)
    assert "nothing.txt" in refused(capsys, hope_folder, "--text", "nothing.txt")
    assert "--chunk_sizes, --level_lr describe levels" in refused(
        capsys, hope_folder, "--text", text, *LEVELS
    )
    assert "--chunk_sizes describe" in refused(
        capsys, hope_folder, "--text", text, "--chunk_sizes", "32", "128", "512"
    )
    assert "--sparse describe" in refused(capsys, hope_folder, "--text", text, "--sparse", "0.1")
    assert "--memory describe" in refused(capsys, hope_folder, "--text", text, "--memory", "x")
    assert "no memory file" in refused(capsys, llama_folder, "--text", text, "--memory", "x.safetensors")
    assert "there is no folder" in refused(capsys, hope_folder, "--text", text, "--output", "no/where.html")
    assert "--png takes a folder" in refused(capsys, hope_folder, "--text", text, "--png", text)
    assert "max_tokens must be at least 2" in refused(
        capsys, hope_folder, "--text", text, "--max_tokens", "1"
    )
    latin = tmp_path / "latin.txt"
    latin.write_bytes("ä".encode("latin-1"))
    assert "is not in UTF-8" in refused(capsys, hope_folder, "--text", str(latin))
    empty = tmp_path / "empty.txt"
    empty.write_text("\ufeff", encoding="utf-8")  # a byte order mark is no text
    assert "the text has 0 token(s)" in refused(capsys, hope_folder, "--text", str(empty))
    below = f"{text}/pictures"
    assert f"--png takes a folder, but {text} is" in refused(
        capsys, hope_folder, "--text", text, "--png", below
    )
    assert "is the file of --text" in refused(capsys, hope_folder, "--text", text, "--output", text)
    memory = ["--memory", str(empty), "--output", str(empty)]
    assert "is the file of --memory" in refused(capsys, llama_folder, "--text", text, *memory)
    assert not (tmp_path / "lens.html").exists()
