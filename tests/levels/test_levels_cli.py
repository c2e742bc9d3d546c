"""`nested-learning levels` in process."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    BertModel,
    FunnelConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
)

from nested_learning import HopeConfig
from nested_learning.cli.levels import model_on_meta
from nested_learning.cli.main import main
from nested_learning.levels import levels
from nested_learning.optimizers import build
from nested_learning.optimizers.recipe import by_name

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def json_of(capsys, *argv):
    capsys.readouterr()
    assert main(["levels", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_preset_with_the_recipes_optimizer(capsys):
    system = json_of(capsys, "hope-1.3b")
    assert (system["model"], system["optimizer"]) == ("HopeForCausalLM", "AdamW")
    assert [level["frequency"] for level in system["levels"]] == [
        "every token",
        "every 64 tokens",
        "every optimizer step",
        "every optimizer step",
    ]
    tensors = 2 * 4 * system["parameters"]  # two moments in float32, and a counter per parameter
    (moments,) = system["levels"][2]["components"]
    assert moments["state_bytes"] == pytest.approx(tensors, rel=1e-5)


def test_no_optimizer_prints_what_never_changes(capsys):
    assert main(["levels", "transformer-tiny", "--optimizer", "none"]) == 0
    shown = capsys.readouterr().out
    assert "HopeForCausalLM, optimizer none, 1,056,384 parameters" in shown
    assert "∞ (non-parametric)" in shown
    assert "never" in shown
    assert "every optimizer step" not in shown


def test_any_transformers_folder(capsys, tmp_path):
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32))
    llama.save_pretrained(tmp_path / "llama")
    system = json_of(capsys, str(tmp_path / "llama"), "--optimizer", "ADAMW")
    assert (system["model"], system["parameters"]) == ("LlamaForCausalLM", llama.num_parameters())
    names = [component["name"] for component in system["levels"][2]["components"]]
    assert names == ["embedding", "attention projections", "MLPs", "norms", "head"]
    BertModel(BertConfig(**SIZES, vocab_size=32)).save_pretrained(tmp_path / "bert")
    assert json_of(capsys, str(tmp_path / "bert"))["levels"][0]["frequency"] == "∞ (non-parametric)"


LLAMA = LlamaConfig(**SIZES, vocab_size=32)
BART = BartConfig(
    vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24
)


def folder_of(tmp_path, config, architectures):
    """A folder with a configuration alone, which is all that is read."""
    config.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "name", "parts"),
    [
        (BART, "BartForConditionalGeneration", {"encoder", "decoder"}),
        (LLAMA, "LlamaModel", {"layers"}),
        (BertConfig(**SIZES, vocab_size=32), "BertForSequenceClassification", {"bert", "classifier"}),
        (ViTConfig(**SIZES), "ViTForImageClassification", {"vit", "classifier"}),
        (HopeConfig(hidden_size=16, num_heads=2, num_hidden_layers=1), "HopeForTokenClassification", set()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_is_shown_as_the_class_that_it_was_saved_from(capsys, tmp_path, config, name, parts):
    model = model_on_meta(folder_of(tmp_path, config, [name]))
    assert type(model).__name__ == name
    assert parts <= {part for path, _ in model.named_modules() for part in path.split(".")}
    assert all(p.is_meta for p in model.parameters())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "named", [None, [], ["Mine"], ["BertModel"], ["GenerationConfig"], ["PreTrainedModel"]], ids=str
)
def test_a_guess_is_called_one(capsys, tmp_path, named):
    folder = folder_of(tmp_path, LLAMA, named)
    assert main(["levels", folder, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "LlamaForCausalLM"
    assert f"(architectures: {named}); shown as LlamaForCausalLM, a guess" in err


def test_a_guess_between_two_classes(capsys, tmp_path):
    sizes = {"vocab_size": 32, "block_sizes": [1], "d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 24}
    assert main(["levels", folder_of(tmp_path, FunnelConfig(**sizes), None), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "FunnelModel"
    assert "(architectures: None); shown as FunnelModel, a guess" in err


def test_a_class_that_transformers_pairs_with_anothers_configuration(capsys, tmp_path):
    config = AutoConfig.for_model("internlm3", **SIZES, vocab_size=32)
    assert type(model_on_meta(folder_of(tmp_path, config, ["LlamaModel"]))).__name__ == "LlamaModel"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("model_type", ["llama", "mine"])
def test_code_in_a_folder_is_not_run(capsys, tmp_path, monkeypatch, model_type):
    folder = folder_of(tmp_path, LLAMA, ["LlamaModel"])
    ran = tmp_path / "ran"
    (tmp_path / "model" / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    path = tmp_path / "model" / "config.json"
    own = {"auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}, "model_type": model_type}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")  # whoever asks is told to go on
    assert main(["levels", folder]) == (0 if model_type == "llama" else 2)
    assert not ran.exists()
    if model_type == "mine":
        assert "a model with code of its own, and this command runs none" in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True], ids=["one name", "a link"])
def test_two_outputs_in_one_file_are_refused(capsys, tmp_path, linked):
    png = mermaid = tmp_path / "levels"
    if linked:
        png = tmp_path / "link"
        png.symlink_to(mermaid)
    assert main(["levels", "hope-tiny", "--png", str(png), "--mermaid", str(mermaid)]) == 2
    assert f"--mermaid {mermaid} and --png {png} are one file" in capsys.readouterr().err
    assert not mermaid.exists()


def test_files_beside_the_output(capsys, tmp_path):
    mermaid, png = tmp_path / "levels.mmd", tmp_path / "levels.png"
    files = ["--mermaid", str(mermaid), "--png", str(png)]
    assert json_of(capsys, "hope-tiny", *files)["optimizer"] == "AdamW"
    assert mermaid.read_text().startswith("flowchart TB\n")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [mermaid, png]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["hope-tinny"], "unknown preset 'hope-tinny'. Did you mean 'hope-tiny'?"),
        (["hope-tiny", "--optimizer", "adamm"], "unknown optimizer 'adamm'. Did you mean 'adam'?"),
        (["hope-tiny", "--optimizer", "MultiFrequency"], "MultiFrequency needs inner besides parameters"),
        (["hope-tiny", "--optimiser", "sgd"], "Did you mean '--optimizer'?"),
        (["hope-tiny", "--png", "missing/levels.png"], "No such file or directory"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["levels", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_every_optimizer_that_needs_parameters_alone():
    model = model_on_meta("hope-attention-tiny")
    described = []
    for name in by_name():
        if name not in ("multifrequency", "memoryoptimizer"):
            system = levels(model, build(name, model))
            described.append(name)
            assert system.parameters == 1_056_896
            assert {str(c.frequency) for c in system.components if c.kind == "weights"} == {
                "every optimizer step"
            }
    assert {"sgd", "adamw", "muon", "m3", "deepmomentumgd", "deltagd", "lbfgs"} <= set(described)


def test_ends_of_a_model_are_no_matrices_for_newton_schulz():
    model = nn.ModuleDict({"ids": nn.Embedding(5, 4), "map": nn.Linear(4, 4)})
    muon, adamw = build("Muon", model).optimizers
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model["map"].weight)]
    assert {id(p) for p in adamw.param_groups[0]["params"]} == {
        id(model["ids"].weight),
        id(model["map"].bias),
    }
    m3 = build("m3", model)
    assert [group["adamw_only"] for group in m3.param_groups] == [False, True]
    assert isinstance(build("AdamW", model), torch.optim.AdamW)
