"""States from inference mode in a training step, and batches of no rows."""

import pytest
import torch

from nested_learning.layers.drop_in import LowRankSelfModifyingMLP, SelfModifyingLinear
from nested_learning.layers.registry import build_mixer
from tests.ecosystem.tiny_hope import CASES, LEARNING, MIXERS, VOCAB, hope, ids, slow_but

TEXT = ids()


def loss_and_gradients(model, cache):
    model.zero_grad()
    loss = model(TEXT, labels=TEXT, past_key_values=cache).loss
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize("case", slow_but())
def test_a_cache_from_inference_mode_is_trained_on(case):
    """As one from no_grad is."""
    model = hope(case)
    # "lm" takes gradients at its first boundary, which inference mode rules out: it has read one token.
    text = TEXT[:, :1] if case.startswith("lm") else TEXT
    mask = torch.ones_like(text)
    mask[0, : text.shape[1] // 2] = 0
    with torch.inference_mode():
        cache = model(text, attention_mask=mask, use_cache=True).past_key_values
    with torch.no_grad():
        other = model(text, attention_mask=mask, use_cache=True).past_key_values
    for a, b in zip(loss_and_gradients(model, cache), loss_and_gradients(model, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


LAYERS = {
    **{name: lambda name=name: build_mixer(name, 16, 2, MIXERS[name]) for name in ("titans", "mac", "mal")},
    "linear": lambda: SelfModifyingLinear(16, 16, chunk_size=4),
    "mlp": lambda: LowRankSelfModifyingMLP(16, chunk_size=4),
    "cms": lambda: hope("regression").model.layers[0].cms,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_of_a_layer_from_inference_mode_is_trained_on(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(2, 5, 16).double()
    with torch.inference_mode():
        state = layer(x)[1]
    with torch.no_grad():
        other = layer(x)[1]
    for a, b in zip(
        *(
            torch.autograd.grad(layer(x, s)[0].square().sum(), list(layer.parameters()), allow_unused=True)
            for s in (state, other)
        ),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", slow_but())
def test_a_batch_of_no_rows_is_read_and_continued(case):
    """What a process gets that has no row left; its gradients are zero."""
    model = hope(case)
    none = TEXT[:0]
    for mask in (None, torch.ones_like(none)):
        model.zero_grad()
        out = model(none, attention_mask=mask, labels=none, use_cache=True)
        assert out.logits.shape == (0, TEXT.shape[1], VOCAB)
        assert out.loss == 0
        out.loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        after = model(none[:, :1], past_key_values=out.past_key_values.detach())
        assert after.logits.shape == (0, 1, VOCAB)


def test_every_way_of_learning_is_covered():
    assert set(CASES) == {*MIXERS, *LEARNING, "hybrid"}
