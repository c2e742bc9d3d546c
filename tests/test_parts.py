"""Handles of parts: they partition the parameters of every model, and mean what they say."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers.registry import MIXERS
from nested_learning.models import PRESETS, preset
from nested_learning.parts import parts

SIZES = {"vocab_size": 16, "hidden_size": 16, "num_heads": 2, "pad_token_id": None}
LEVELS = [{"chunk_size": 4, "learn_lr": True}, {"chunk_size": 8}]


def hope(**fields):
    with torch.device("meta"):
        return HopeForCausalLM(HopeConfig(**{**SIZES, "num_hidden_layers": 2, **fields}))


def of_mixer(name):
    return hope(mixer=name, mixer_options={name: {"window": 4}} if name.startswith("sliding") else {})


def of_preset(name):
    with torch.device("meta"):
        return HopeForCausalLM(preset(name, num_hidden_layers=1))


MODELS = {
    **{f"preset {name}": lambda name=name: of_preset(name) for name in PRESETS},
    **{f"mixer {name}": lambda name=name: of_mixer(name) for name in MIXERS if name != "composed"},
    "hybrid": lambda: hope(mixer=["titans", "attention"], tie_word_embeddings=False),
    "regression": lambda: hope(cms_levels=LEVELS, cms_update="regression"),
    "independent": lambda: hope(cms_levels=[{"chunk_size": 4, "heads": 2}], cms_variant="independent"),
}


@pytest.mark.parametrize("name", MODELS)
def test_handles_of_one_depth_partition_the_parameters(name):
    model = MODELS[name]()
    found, names = parts(model), [name for name, _ in model.named_parameters()]
    for depth in (1, 2, None):
        members = [member for group in found.at_depth(depth).values() for member in group]
        assert sorted(members) == sorted(names)
        for handle, group in found.at_depth(depth).items():
            assert found.find(handle) == group  # the handle names just these
    assert {"embedding", "norms"} <= set(found.at_depth(1))
    assert found.find("norms") == [n for n in names if n.endswith(("mixer_norm.weight", "model.norm.weight"))]


def test_parts_of_hope_tiny():
    found = parts(of_preset("hope-tiny"))
    layer = "model.layers.0"
    assert found.find("cms.1") == [f"{layer}.cms.blocks.1.{w}.weight" for w in ("norm", "up", "down")]
    assert found.find("initial") == [f"{layer}.mixer.initial.W1", f"{layer}.mixer.initial.W2"]
    assert found.find("gates") == [
        f"{layer}.mixer.gates.{gate}.{kind}" for gate in ("eta", "alpha") for kind in ("weight", "bias")
    ]
    projections = ("in_proj", "conv", "out_norm", "gate_proj", "out_proj")
    assert found.find("projections") == [f"{layer}.mixer.{name}.weight" for name in projections]
    assert found.find("cms") == found.find("cms.0") + found.find("cms.1")
    assert (found.chunk("cms.0"), found.chunk("cms.1"), found.chunk("cms")) == (512, 2048, None)
    assert found.chunk("gates") is None
    with pytest.raises(ValueError, match=r"tied to its embedding.*'embedding'"):
        found.find("head")


def test_a_level_has_all_that_belongs_to_it():
    found = parts(hope(cms_levels=LEVELS, cms_update="regression", num_hidden_layers=1))
    cms = "model.layers.0.cms"
    assert f"{cms}.projections.0.key.weight" in found.find("cms.0")
    assert f"{cms}.writers.0.log_lr" in found.find("cms.0")
    assert f"{cms}.projections.1.value.weight" in found.find("cms.1")


def test_mixers_of_several_kinds_have_their_names_first():
    found = parts(hope(mixer=["titans", "mag"], tie_word_embeddings=False))
    assert found.find("head") == ["lm_head.weight"]
    assert "projections" not in found.at_depth(1)
    assert set(found.at_depth()) >= {"titans.gates", "titans.initial", "mag.attention", "mag.persistent"}
    titans = [name for name, _ in MODELS["hybrid"]().named_parameters() if ".layers.0.mixer." in name]
    assert found.find("titans") == titans
    assert found.find("*.gates") == found.find("titans.gates") + found.find("mag.gates")
    with pytest.raises(ValueError, match=r"Did you mean 'titans.gates'"):
        found.find("titan.gates")


def test_module_paths_and_globs():
    found = parts(hope())
    assert found.find("model.layers.1") == found.find("layers.1")
    assert found.find("layers.1") == [n for n in found.handles if ".layers.1." in n]
    assert found.find("model.layers.*.cms") == found.find("cms")
    assert found.find("layers.0.mixer.in_proj.weight") == ["model.layers.0.mixer.in_proj.weight"]
    assert found.find("layers.1") != found.find("layers")
    with pytest.raises(ValueError, match=r"unknown part of the model 'layers.2'"):
        found.find("layers.2")


def test_other_models_have_parts_by_their_structure():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    found = parts(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)))
    assert set(found.at_depth(1)) == {"embedding", "self_attn", "mlp", "norms", "head"}
    assert found.find("mlp.up_proj") == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    gpt2 = parts(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, bos_token_id=0)))
    assert gpt2.tied_head
    assert gpt2.find("embedding") == ["transformer.wte.weight", "transformer.wpe.weight"]
    plain = parts(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)))
    assert plain.at_depth() == {"0": ["0.weight", "0.bias"], "norms": ["1.weight", "1.bias"],
                                "2": ["2.weight", "2.bias"]}  # fmt: skip


class FastWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(2, 2))
        self.key_value = nn.Linear(2, 4)

    def part_names(self):
        return {"start": "initial", "key_value": "projections"}

    def part_chunks(self):
        return {"initial": 32}


class Slower(FastWeights):
    def part_chunks(self):
        return {"initial": 64}


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(2))

    def part_names(self):
        return {"inner.key_value.bias": "biases"}


def test_layers_say_their_own_and_the_outer_one_counts():
    found = parts(Outer(FastWeights()))
    assert found.at_depth() == {
        "scale": ["scale"],
        "initial": ["inner.start"],
        "projections": ["inner.key_value.weight"],
        "biases": ["inner.key_value.bias"],
    }
    assert found.chunk("initial") == 32
    with pytest.raises(ValueError, match=r"'initial' has chunks of 32 tokens.*of 64"):
        parts(nn.ModuleList([FastWeights(), Slower()]))


def test_cover_is_short():
    found = parts(of_preset("hope-tiny"))
    assert found.cover(found.find("cms")) == ["cms"]
    assert found.cover(found.find("cms.1")) == ["cms.1"]
    assert found.cover(found.find("cms.1")[:1]) == ["cms.1"]
    assert found.cover([]) == []
