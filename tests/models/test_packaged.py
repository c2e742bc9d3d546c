"""Trained models that come with the package: found by name, checked, whole."""

import hashlib

import pytest
import torch

from nested_learning import HopeForCausalLM, preset
from nested_learning.cli.main import main
from nested_learning.models import packaged
from nested_learning.models.packaged import (
    SUMS,
    or_packaged,
    packaged_folder,
    packaged_names,
    pretrained,
    write_packaged,
)
from nested_learning.training.data import byte_tokenizer


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(model, folder) of a tiny model that stands in the package under the name "tiny-one"."""
    torch.manual_seed(0)
    model = HopeForCausalLM(preset("hope-tiny", num_hidden_layers=1, hidden_size=32, num_heads=2)).eval()
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "weights")
    folder = write_packaged(model, byte_tokenizer(), tmp_path / "weights" / "tiny-one")
    packaged._check.cache_clear()
    return model, folder


def test_the_model_comes_back_in_bfloat16s_values(written):
    model, _ = written
    loaded, tokenizer = pretrained("tiny-one")
    assert packaged_names() == ["tiny-one"]
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32, "the model that was written stays as it is"
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value.to(torch.bfloat16).float()), name
    assert tokenizer("ab")["input_ids"] == [97, 98]
    assert not loaded.training
    assert pretrained("tiny-one", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_the_commands_take_it_by_name(written, tmp_path, capsys):
    arguments = ["tiny-one", "--prompt", "ab", "--max_new_tokens", "3", "--temperature", "0"]
    assert main(["generate", *arguments, "--json"]) == 0
    by_name = capsys.readouterr().out
    assert main(["generate", str(written[1]), *arguments[1:], "--json"]) == 0
    key = '"text"'
    assert key in by_name
    by_folder = capsys.readouterr().out
    line = [text for text in by_name.splitlines() if key in text]
    assert line == [text for text in by_folder.splitlines() if key in text]


def test_a_folder_here_goes_before_the_package(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert or_packaged("tiny-one") == str(written[1])
    (tmp_path / "tiny-one").mkdir()
    assert or_packaged("tiny-one") == "tiny-one"
    assert or_packaged("someone/else") == "someone/else"


def test_a_damaged_file_is_refused(written):
    _, folder = written
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors has the sha256 .* damaged, install it again"):
        pretrained("tiny-one")
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        packaged_folder("tiny-one")


def test_sums_are_those_of_every_file(written):
    _, folder = written
    sums = dict(line.split()[::-1] for line in (folder / SUMS).read_text().splitlines())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del files[SUMS]
    assert sums == files


def test_unknown_names_and_existing_folders_are_refused(written):
    model, folder = written
    with pytest.raises(ValueError, match=r"unknown trained model 'tiny-on'\. Did you mean 'tiny-one'\?"):
        pretrained("tiny-on")
    with pytest.raises(ValueError, match="exists; give a folder that does not"):
        write_packaged(model, byte_tokenizer(), folder)
