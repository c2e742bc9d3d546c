"""Base models under an adapter of peft, with int8 weights of torchao, and under `model.compile()`."""

from __future__ import annotations

import copy

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.files import fingerprint
from tests.continual.tiny_models import random_ids, tiny_model

IDS = random_ids(33)
LEVELS = [Level(8, 0.3), Level(16, 0.1, rank=2, rule="adam")]


def adapted(model, **options):
    """The model with a LoRA adapter on its MLPs, whose weights are not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return model


def quantised(seed=0):
    """A model whose linear maps are int8 with scales, and a twin in float32 that has the same values."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(dtype=torch.float32, seed=seed)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    plain = tiny_model(dtype=torch.float32, seed=seed)
    for name, p in plain.named_parameters():
        weight = model.get_parameter(name).detach()
        p.data.copy_(weight.dequantize() if hasattr(weight, "dequantize") and weight.ndim == 2 else weight)
    return model, plain


def goes_on_after_loading(make, path):
    first, second = make(), make()
    first.observe(IDS[:21])
    first.memory.save(path)
    second.memory.load(path)
    return torch.equal(first.observe(IDS[21:]), second.observe(IDS[21:]))


class TestAdapter:
    def test_deltas_lie_on_the_weights_beneath(self, tmp_path):
        """As on the model that the adapter was merged into: W_base + B A + Σ Δ."""
        model = adapted(tiny_model())
        merged = copy.deepcopy(model).merge_and_unload()
        learner, other = stack_levels(model, levels=LEVELS[:1]), stack_levels(merged, levels=LEVELS[:1])
        assert torch.equal(learner.logits(IDS[None]), model(IDS[None]).logits)
        torch.testing.assert_close(learner.observe(IDS), other.observe(IDS), equal_nan=True)
        found, expected = learner.memory.diff(), other.memory.diff()
        assert len(found) == len(expected) == 6
        for name, delta in found.items():
            torch.testing.assert_close(delta, expected[name.replace(".base_layer", "")])
        with learner.active():
            torch.testing.assert_close(model(IDS[None]).logits, other.logits(IDS[None]))
        assert goes_on_after_loading(lambda: stack_levels(model, levels=LEVELS), tmp_path / "a.safetensors")

    def test_prompts_are_refused(self):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model = peft.get_peft_model(tiny_model(dtype=torch.float32), config)
        with pytest.raises(ValueError, match="has prompts of PROMPT_TUNING before every text"):
            stack_levels(model, levels=LEVELS)


class TestInt8:
    def test_deltas_are_added_to_the_outputs(self, tmp_path):
        """y = W₈x + Δx, as the model computes whose weights are those that the integers stand for."""
        model, plain = quantised()
        learner, other = stack_levels(model, levels=LEVELS), stack_levels(plain, levels=LEVELS)
        with torch.no_grad():
            base = model(IDS[None]).logits
        assert torch.equal(learner.logits(IDS[None]), base)
        torch.testing.assert_close(
            learner.observe(IDS), other.observe(IDS), equal_nan=True, rtol=1e-4, atol=1e-4
        )
        for level in (0, 1):
            for name, delta in learner.memory.diff(level).items():
                torch.testing.assert_close(delta, other.memory.diff(level)[name], rtol=1e-3, atol=1e-4)
        learner.memory.reset()
        assert torch.equal(learner.logits(IDS[None]), base)
        assert learner.info().effective_weights == 4 * 6 * 16 * 24
        assert goes_on_after_loading(lambda: stack_levels(model, levels=LEVELS), tmp_path / "a.safetensors")

    def test_several_levels_and_a_copy(self):
        model, plain = quantised()
        levels = [Level(4, 0.3), Level(8, 0.1), Level(16, 0.1, rule="momentum")]
        learner, other = stack_levels(model, levels=levels), stack_levels(plain, levels=levels)
        torch.testing.assert_close(
            learner.observe(IDS), other.observe(IDS), equal_nan=True, rtol=1e-4, atol=1e-4
        )
        twin = copy.deepcopy(learner)
        assert torch.equal(twin.observe(IDS), learner.observe(IDS))

    def test_the_fingerprint_is_that_of_the_integers(self):
        assert fingerprint(quantised()[0]) == fingerprint(quantised()[0]) != fingerprint(quantised(1)[0])


def test_integers_in_a_stack_of_experts_are_refused():
    from tests.continual.architectures import tiny

    model = tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts._parameters["down_proj"] = torch.nn.Parameter(
        torch.zeros(experts.down_proj.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="quantised stack of experts"):
        stack_levels(model, levels=LEVELS)


@pytest.mark.parametrize("way", ["method", "function"])
def test_compiled_calls_are_stepped_round_while_deltas_are_in_force(way):
    """A compiled call would not see the hooks of low-rank deltas, and would compile for every context."""
    model, calls = tiny_model(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    expected = stack_levels(tiny_model(), levels=LEVELS).observe(IDS)
    if way == "method":
        model.compile(backend=backend)
        given = model
    else:
        given = torch.compile(model, backend=backend)
    learner = stack_levels(given, levels=LEVELS)
    assert torch.equal(learner.observe(IDS)[1:], expected[1:])
    assert not calls
    given(IDS[None])
    assert calls
    assert learner.memory.diff()


@pytest.mark.parametrize("place", ["lm_head", "k_proj"])
def test_linear_maps_that_round_their_inputs_are_refused(place):
    """No gradient passes them, so that levels below would learn less, or nothing, in silence."""
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(dtype=torch.float32)
    rounded = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, rounded, lambda m, name: name.endswith(place))
    with pytest.raises(ValueError, match=rf"{place} rounds its inputs \(.*; quantise the weights alone"):
        stack_levels(model, levels=LEVELS)
