"""What was learned, written for others: a checkpoint and an adapter have the logits of the learner."""

from __future__ import annotations

import json
import os
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nested_learning.continual import Level, stack_levels
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import CONFIGS, random_ids, tiny_model

LEVELS = (Level(4, 0.3), Level(8, 0.2, layers=[1], rank=2), Level(16, 0.1, consolidate=0.5))
AT_RANK = (Level(4, 0.3, rank=2), Level(8, 0.2, rank=1))
# The 35 tokens are read in float64, so that only rounding to the base's precision is left.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15}
IDS = random_ids(2, 11, seed=5)


@cache
def learned(family="llama", levels=LEVELS, dtype=torch.float64):
    """A learner that tests share: an export changes nothing of it."""
    return learner_of(tiny_model(family, dtype=dtype), levels)


def learner_of(model, levels=LEVELS, **options):
    learner = stack_levels(model, levels=levels, **options)
    learner.observe(random_ids(2, 35))
    return learner


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


class TestACheckpoint:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_has_the_learners_logits(self, tmp_path, dtype):
        learner = learned(dtype=dtype)
        before = {name: p.clone() for name, p in learner.model.named_parameters()}
        report = learner.export(tmp_path / "out", row=1)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert loaded.dtype == dtype
        expected = learner.logits(IDS, row=1)
        assert (expected - learner.logits(IDS, row=0)).abs().max() > 0.1
        found = logits(loaded)
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
        assert report.kind == "checkpoint"
        assert set(report.weights) == set(learner.memory.diff(row=1))
        probe = learner.memory.rows[1].tokens[None]
        difference = (logits(loaded, probe) - learner.logits(probe, row=1)).float().abs().max()
        assert report.difference == pytest.approx(float(difference), abs=1e-15)
        assert report.difference <= TOLERANCE[dtype] * report.largest_logit
        for name, p in learner.model.named_parameters():
            assert torch.equal(p, before[name])

    @pytest.mark.parametrize("family", CONFIGS)
    def test_of_each_family(self, tmp_path, family):
        """Full deltas alone: bit for bit the weights that the learner runs with."""
        learner = learner_of(tiny_model(family, dtype=torch.float32), [Level(4, 0.3), Level(8, 0.2)])
        report = learner.export(tmp_path / "out")
        assert report.difference == 0.0
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert torch.equal(logits(loaded), learner.logits(IDS))

    def test_is_rounded_once(self, tmp_path):
        learner = learner_of(tiny_model(dtype=torch.bfloat16), [Level(4, 0.3), Level(8, 0.2)])
        report = learner.export(tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        with learner.active() as model:
            for name in report.weights:
                module = model.get_submodule(name.removesuffix(".weight"))
                assert torch.equal(loaded.get_parameter(name), module.weight)

    def test_of_some_levels(self, tmp_path):
        learner = learned()
        learner.export(tmp_path / "out", levels=[1])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        expected = learner.logits(IDS, levels=[1])
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-10, atol=1e-10)
        assert (expected - learner.logits(IDS)).abs().max() > 1e-3

    def test_tied_weights_stay_tied(self, tmp_path):
        torch.manual_seed(0)
        config = CONFIGS["llama"](2)
        config.tie_word_embeddings = True
        learner = learner_of(AutoModelForCausalLM.from_config(config).eval())
        learner.export(tmp_path / "out")
        assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        torch.testing.assert_close(logits(loaded), learner.logits(IDS), rtol=1e-5, atol=1e-5)

    def test_brings_tokenizer_and_generation_config(self, tmp_path):
        tokenizer = byte_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.max_new_tokens = 7
        learner = stack_levels(model, tokenizer, levels=[Level(8, 0.3)])
        text = "The lighthouse of Varnholm was built by Ilse Brandt."
        learner.observe(text)
        report = learner.export(tmp_path / "out", probe="Ilse Brandt")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.generation_config.max_new_tokens == 7
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, return_tensors="pt").input_ids
        torch.testing.assert_close(logits(loaded, ids), learner.logits(ids), rtol=1e-5, atol=1e-5)
        assert 0 <= report.difference < 1e-4

    def test_of_nothing_learned_is_the_base_model(self, tmp_path):
        model = tiny_model(dtype=torch.float32)
        report = stack_levels(model, levels=LEVELS).export(tmp_path / "out")
        assert (report.weights, report.difference) == ((), 0.0)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


class TestAnAdapter:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_is_exact_where_ranks_add_up_to_its_own(self, tmp_path, family):
        learner = learned(family, AT_RANK)
        report = learner.export(tmp_path / "out", lora_rank=5)
        assert set(report.truncation.values()) == {0.0} == {report.truncated}
        assert report.difference <= 1e-12 * report.largest_logit
        assert set(report.weights) == set(learner.memory.diff())
        for name, delta in learner.memory.diff().items():
            a, b = factors(tmp_path / "out", name)
            assert a.shape[0] == b.shape[1] == 5
            torch.testing.assert_close(b @ a, delta.T if family == "gpt2" else delta)

    @pytest.mark.parametrize("levels", [LEVELS, AT_RANK])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_keeps_the_largest_singular_values_else(self, tmp_path, family, levels):
        """The nearest matrix of its rank: what is lost is the tail of the spectrum, by numpy's word."""
        learner = learned(family, levels)
        report = learner.export(tmp_path / "out", lora_rank=2)
        tails = norms = 0.0
        for name, delta in learner.memory.diff().items():
            a, b = factors(tmp_path / "out", name)
            delta = delta.T if family == "gpt2" else delta
            values = torch.linalg.svdvals(delta)
            tail, norm = float(values[2:].norm()), float(values.norm())
            assert float((delta - b @ a).norm()) == pytest.approx(tail, rel=1e-6)
            assert report.truncation[name] == pytest.approx(tail / norm, rel=1e-6)
            tails, norms = tails + tail**2, norms + norm**2
        assert report.truncated == pytest.approx((tails / norms) ** 0.5)
        assert report.truncated > 0.01
        assert report.difference > 0

    def test_ranks_beyond_the_width(self, tmp_path):
        """Two ranks of 12 in maps of 16 to 24 make a core that is not square, brought to a rank of 20."""
        learner = learned("llama", (Level(4, 0.3, rank=12), Level(8, 0.2, rank=12)))
        report = learner.export(tmp_path / "out", lora_rank=20)
        assert report.truncated == pytest.approx(0.0, abs=1e-12)  # no matrix has more than 16
        for name, delta in learner.memory.diff().items():
            a, b = factors(tmp_path / "out", name)
            assert a.shape[0] == b.shape[1] == 20
            torch.testing.assert_close(b @ a, delta)

    @pytest.mark.parametrize(("rank", "exact"), [(16, True), (1, False)])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("modules", [None, ["0.mlp.up_proj", "1.mlp.down_proj"]])
    def test_is_loaded_by_peft(self, tmp_path, family, rank, exact, modules):
        peft = pytest.importorskip("peft")
        if family == "gpt2" and modules:
            modules = ["0.mlp.c_fc", "1.mlp.c_proj"]
        model = tiny_model(family)
        learner = learner_of(model, modules=modules)
        report = learner.export(tmp_path / "out", lora_rank=rank)
        expected, probe = learner.logits(IDS), learner.memory.rows[0].tokens[None]
        on_probe = learner.logits(probe)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out")
        if exact:
            torch.testing.assert_close(logits(loaded), expected, rtol=1e-9, atol=1e-9)
        found = float((logits(loaded, probe) - on_probe).abs().max())
        assert report.difference == pytest.approx(found, rel=1e-6, abs=1e-9)
        assert (found > 1e-3) != exact
        torch.testing.assert_close(
            logits(loaded.merge_and_unload(), probe), on_probe, rtol=0, atol=found + 1e-9
        )

    def test_names_the_modules_as_others_do(self, tmp_path):
        learner = learner_of(tiny_model(), AT_RANK)
        learner.model.name_or_path = "org/tiny"
        learner.export(tmp_path / "out", lora_rank=4)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
        assert config["base_model_name_or_path"] == "org/tiny"
        assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 4, False)

    def test_of_nothing_learned_changes_nothing(self, tmp_path):
        report = stack_levels(tiny_model(), levels=LEVELS).export(tmp_path / "out", lora_rank=2)
        assert (report.weights, report.difference, report.truncated) == ((), 0.0, 0.0)
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all((tensor == 0).all() for name, tensor in tensors.items() if "lora_B" in name)


def factors(folder, name):
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    return tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]


class TestRefused:
    def test_a_folder_that_holds_something(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")
        learner = stack_levels(tiny_model(), levels=AT_RANK)
        for options in ({}, {"lora_rank": 2}):
            with pytest.raises(ValueError, match="not empty"):
                learner.export(tmp_path / "out", **options)
        assert os.listdir(tmp_path / "out") == ["mine"]
        (tmp_path / "out" / "mine").unlink()
        learner.export(tmp_path / "out", lora_rank=2)  # an empty one may be there

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lora_rank": 0}, "lora_rank must be a finite whole number >= 1, got 0"),
            ({"lora_rank": 2.0}, "lora_rank must be"),
            ({"row": 2}, "row must be from 0 to 1"),
            ({"levels": [7]}, "levels must be"),
            ({"probe": [[1, 2], [3]]}, "probe must be one text, got 2"),
            ({"probe": "text"}, "no tokenizer"),
        ],
    )
    def test_what_makes_no_sense(self, tmp_path, options, message):
        learner = learned(levels=AT_RANK)
        with pytest.raises(ValueError, match=message):
            learner.export(tmp_path / "out", **options)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch, options):
        learner = learned(levels=AT_RANK)

        def fail(*arguments, **keywords):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("nested_learning.continual.exporting.adapter_folder.write_text", fail)
        monkeypatch.setattr(type(learner.model), "from_pretrained", fail)
        with pytest.raises(OSError, match="disk is full"):
            learner.export(tmp_path / "out", **options)
        assert not os.listdir(tmp_path)

    def test_merging_into_a_quantised_model(self, tmp_path):
        """A module whose weight is int8 stands for all: an adapter fits beside it."""
        model = tiny_model(dtype=torch.float32)
        for layer in model.model.layers:
            linear = layer.mlp.up_proj
            step = linear.weight.detach().abs().max() / 127
            packed = torch.nn.Parameter((linear.weight / step).round().to(torch.int8), requires_grad=False)
            linear.weight = packed
            linear.forward = lambda x, packed=packed, step=step: x @ (packed.to(x.dtype) * step).T
        learner = learner_of(model, [Level(4, 0.3, rank=2)])
        with pytest.raises(ValueError, match=r"up_proj.weight is quantised.*lora_rank"):
            learner.export(tmp_path / "out")
        report = learner.export(tmp_path / "out", lora_rank=2)
        assert report.difference <= 1e-5 * report.largest_logit
        assert torch.equal(
            factors(tmp_path / "out", "model.layers.0.mlp.up_proj.weight")[0],
            learner.memory.rows[0].levels[0].deltas["model.layers.0.mlp.up_proj.weight:down"],
        )
