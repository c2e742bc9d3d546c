"""Quantised linear layers: the numbers of a model that has the rounded weights written in, in every mode."""

import copy

import pytest
import torch
from torch import nn

from tests.ecosystem.tiny_hope import hope, ids, slow_but

TEXT = ids()


def linears(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


def written_out(model, weights):
    """The model in float32 with these weights."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in weights.items():
            dense.get_parameter(f"{name}.weight").copy_(weight)
    return dense


def logits(model):
    with torch.no_grad():
        return model(TEXT).logits


@pytest.mark.parametrize("case", slow_but())
def test_int8_weights_of_torchao(case):
    quantization = pytest.importorskip("torchao.quantization")
    model = hope(case).float()
    wanted = linears(model)
    quantised = copy.deepcopy(model)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(quantised, config, lambda m, name: isinstance(m, nn.Linear) and name in wanted)
    weights = {name: quantised.get_submodule(name).weight.dequantize() for name in wanted}
    dense = written_out(model, weights)
    assert (logits(model) - logits(dense)).abs().max() > 1e-5
    torch.testing.assert_close(logits(quantised), logits(dense), rtol=1e-4, atol=1e-4)
    made = quantised.generate(TEXT[:, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(made, dense.generate(TEXT[:, :5], max_new_tokens=4, do_sample=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", slow_but())
def test_dynamic_quantisation_of_torch(case):
    """Its layers round their inputs too, so the numbers are near those of the rounded weights, not equal."""
    model = hope(case).float()
    wanted = linears(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, set(wanted), dtype=torch.qint8)
    dense = written_out(model, {n: quantised.get_submodule(n).weight().dequantize() for n in wanted})
    far, near = ((logits(quantised) - logits(m)).norm() for m in (hope(case, seed=5).float(), dense))
    assert near < 0.1 * far
    made = quantised.generate(TEXT[:, :5], max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 9)


def test_a_model_is_quantised_on_loading(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    transformers = pytest.importorskip("transformers")
    model = hope("lm").float()
    model.save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    names = [n for n in linears(model) if type(loaded.get_submodule(n).weight.data) is not torch.Tensor]
    assert len(names) == len(linears(model))
    dense = written_out(model, {n: loaded.get_submodule(n).weight.dequantize() for n in names})
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)


def test_learning_from_the_loss_needs_a_head_that_gradients_pass():
    quantization = pytest.importorskip("torchao.quantization")
    model = hope("lm").float()
    rounded = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(model, rounded, lambda m, name: isinstance(m, nn.Linear) and "mixer" in name)
    assert logits(model).isfinite().all()
    model = hope("lm").float()
    quantization.quantize_(model, rounded, lambda m, name: name == "lm_head")
    with pytest.raises(
        ValueError, match=r"cms_update='lm' learns from the gradient .* quantise weights alone"
    ):
        logits(model)
    model = hope("regression").float()
    quantization.quantize_(model, rounded, lambda m, name: name == "lm_head")
    assert logits(model).isfinite().all()
