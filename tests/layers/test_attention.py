"""Attention against a token-by-token oracle, and the invariances of its state."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from nested_learning.layers import Attention, SlidingWindowAttention
from nested_learning.layers.attention import AttentionState
from tests.models.small_models import MORE_OPTIONS, OPTIONS, assert_equal_weights, small_model

WIDTH, HEADS = 16, 4
VARIANTS = {
    "plain": lambda: Attention(WIDTH, HEADS),
    "no_qk_norm": lambda: Attention(WIDTH, HEADS, qk_norm=False, rope_theta=100.0),
    "no_positions": lambda: Attention(WIDTH, HEADS, num_kv_heads=2, rope_theta=None),
    "no_positions_window": lambda: SlidingWindowAttention(WIDTH, HEADS, window=3, rope_theta=None),
    "grouped": lambda: Attention(WIDTH, HEADS, num_kv_heads=2),
    "window": lambda: SlidingWindowAttention(WIDTH, HEADS, window=3),
    "window_1": lambda: SlidingWindowAttention(WIDTH, HEADS, window=1, num_kv_heads=1),
    "convolved": lambda: Attention(WIDTH, HEADS, conv_size=4),
    "convolved_window": lambda: SlidingWindowAttention(WIDTH, HEADS, window=3, num_kv_heads=2, conv_size=3),
    "one_tap": lambda: Attention(WIDTH, HEADS, rope_theta=None, conv_size=1),
}


@pytest.fixture(params=VARIANTS)
def layer(request):
    torch.manual_seed(0)
    layer = VARIANTS[request.param]().double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def oracle(layer: Attention, row: torch.Tensor) -> torch.Tensor:
    """One unpadded sequence [T, D], one token and head at a time, rotation by complex multiplication."""
    d = layer.head_dim
    row = row if layer.conv is None else convolved(layer.conv.weight[:, 0], row)
    powers = [0.0 if layer.rope_theta is None else layer.rope_theta ** (-2 * i / d) for i in range(d // 2)]
    frequencies = torch.tensor(powers, dtype=row.dtype)

    def head(linear, norm, token, index, position):
        v = (linear.weight @ token)[index * d : (index + 1) * d]
        v = v if norm is None else norm.weight * v / torch.sqrt((v * v).mean() + 1e-6)
        turned = torch.complex(v[: d // 2], v[d // 2 :]) * torch.exp(1j * position * frequencies)
        return torch.cat([turned.real, turned.imag])

    kv_heads = layer.k_proj.out_features // d
    outputs = []
    for t in range(len(row)):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // kv_heads)
            q = head(layer.q_proj, layer.q_norm, row[t], h, t)
            keys = [head(layer.k_proj, layer.k_norm, row[s], g, s) for s in range(first, t + 1)]
            values = torch.stack(
                [(layer.v_proj.weight @ row[s])[g * d : (g + 1) * d] for s in range(first, t + 1)]
            )
            scores = torch.stack([q @ k for k in keys]) / d**0.5
            heads.append(scores.softmax(0) @ values)
        outputs.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(outputs)


def convolved(taps: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Σ_j taps[:, j] row[t − K + 1 + j] for each token t of a sequence [T, D], taps [D, K]."""
    K = taps.shape[1]
    return torch.stack(
        [
            sum(
                (taps[:, j] * row[s] for j in range(K) if (s := t - K + 1 + j) >= 0), torch.zeros_like(row[0])
            )
            for t in range(len(row))
        ]
    )


MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool
)


def test_matches_oracle_row_by_row_with_gradients(layer):
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, mask=MASK)
    expected = torch.cat([oracle(layer, x[b][MASK[b]]) for b in range(3)])
    torch.testing.assert_close(y[MASK], expected, rtol=0, atol=1e-12)

    probe = torch.randn_like(expected)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((y[MASK] * probe).sum(), inputs)
    want = torch.autograd.grad((expected * probe).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_without_mask_is_the_full_mask(layer):
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    full, full_state = layer(x, mask=torch.ones(2, 7, dtype=torch.bool))
    plain, plain_state = layer(x)
    torch.testing.assert_close(plain, full, rtol=0, atol=1e-13)
    torch.testing.assert_close(plain_state.positions, full_state.positions)


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [2, 1, 6], [8, 1]])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_whole(layer, pieces, padded):
    x = torch.randn(3, 9, WIDTH, dtype=torch.float64)
    mask = MASK if padded else None
    whole, _ = layer(x, mask=mask)
    state, parts = None, []
    for piece, piece_mask in zip(x.split(pieces, 1), MASK.split(pieces, 1), strict=True):
        y, state = layer(piece, state, piece_mask if padded else None)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_padding_then_unmasked_tokens_equal_the_row_alone(layer):
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    alone, _ = layer(x)
    padding = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    prompt = torch.cat([padding, x[:, :3]], 1)
    mask = torch.tensor([[False] * 4 + [True] * 3])
    y, state = layer(prompt, mask=mask)
    rest, _ = layer(x[:, 3:], state)
    torch.testing.assert_close(torch.cat([y[:, 4:], rest], 1), alone, rtol=0, atol=1e-12)


def test_window_bounds_the_state_and_padding_takes_no_room():
    torch.manual_seed(0)
    layer = SlidingWindowAttention(WIDTH, HEADS, window=4).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    _, state = layer(x)
    sizes = {state.nbytes()}
    for _ in range(3):  # three calls of nothing but padding for row 0
        mask = torch.tensor([[False] * 5, [True] * 5])
        _, state = layer(torch.randn_like(x), state, mask)
        sizes.add(state.nbytes())
    assert len(sizes) == 1
    assert state.positions.tolist() == [[2, 3, 4], [17, 18, 19]]
    tail = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    y, _ = layer(tail, state)
    whole, _ = layer(torch.cat([x, tail], 1))
    torch.testing.assert_close(y[0], whole[0, -1:], rtol=0, atol=1e-12)


def test_fully_padded_row_is_zero_with_finite_gradients(layer):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True] * 5])
    y, _ = layer(x, mask=mask)
    assert not y[0].any()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[0].any()


def test_low_precision_stays_near_float64(layer):
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    expected = layer(x)[0].detach()
    y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == state.key.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(18, 4), "18 / 4"),
        (lambda: Attention(12, 4), "even head width"),
        (lambda: Attention(16, 4, num_kv_heads=3), "num_kv_heads must divide num_heads"),
        (lambda: Attention(16, 0), "num_heads must be a positive integer, got 0"),
        (lambda: Attention(16, -4), "num_heads must be a positive integer, got -4"),
        (lambda: Attention(16, 4, num_kv_heads=2.0), "num_kv_heads must be a positive integer, got 2.0"),
        (lambda: Attention(16, 4, rope_theta=0), "rope_theta must be a positive number, or None"),
        (lambda: Attention(16, 4, rope_theta=math.nan), "rope_theta must be a positive number, or None"),
        (lambda: Attention(16, 4, rope_theta=True), "rope_theta must be a positive number, or None"),
        (lambda: Attention(12, 4), "an even head width"),
        (lambda: Attention(13, 4, rope_theta=None), "a whole head width"),
        (lambda: SlidingWindowAttention(16, 4, window=0), "window"),
        (lambda: SlidingWindowAttention(16, 4, window=2.5), "window"),
        (lambda: Attention(16, 4, conv_size=-1), "conv_size must be 0 or a positive integer, got -1"),
        (lambda: Attention(16, 4, conv_size=4.0), "conv_size must be 0 or a positive integer, got 4.0"),
    ],
)
def test_bad_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_inputs_are_refused(layer):
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    _, state = layer(x)
    grouped = Attention(WIDTH, HEADS // 2).double()(x)[1]
    cut = AttentionState(state.key[:, :, :1], state.value, state.positions)
    for arguments, message in (
        ((x[0],), r"x must be \[B, T >= 1, 16\], got \(3, 16\)"),
        ((x[..., :8],), r"got \(2, 3, 8\)"),
        ((x[:, :0],), r"got \(2, 0, 16\)"),
        ((x, None, torch.ones(2, 3)), r"mask must be bool \(2, 3\).*got torch.float32"),
        ((x, None, torch.ones(2, 4, dtype=torch.bool)), r"got torch.bool \(2, 4\)"),
        ((x[:1], state), r"state has.*need \[1, "),
        ((x, grouped), "state has.*need"),
        ((x, (state.key, state.value)), "must be an AttentionState, got tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments)
    if layer.window != 1 and cut.key.shape != state.key.shape:
        with pytest.raises(ValueError, match="state has key, value and positions"):
            layer(x, cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_of_another_dtype_is_converted(layer, dtype):
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    whole = layer(x)[0].detach()
    _, state = layer.float()(x[:, :4].float())
    y, after = layer.to(dtype)(x[:, 4:].to(dtype), state)
    assert y.dtype == after.key.dtype == after.value.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y.double(), whole[:, 4:], rtol=0, atol=tolerance * float(whole.abs().max()))


@pytest.mark.parametrize("window", [None, 4])
def test_without_positions_the_order_of_earlier_tokens_tells_nothing(window):
    """Of a token alone: what came before it, within the window, is a set. Any whole head width will do."""
    torch.manual_seed(0)
    make = Attention if window is None else lambda *a, **k: SlidingWindowAttention(*a, window=window, **k)
    layer = make(12, 4, rope_theta=None).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    last = 6 if window is None else window
    order = [*range(6 - last), *reversed(range(6 - last, 5)), 5]
    torch.testing.assert_close(layer(x[:, order])[0][:, -1], layer(x)[0][:, -1], rtol=0, atol=1e-13)
    rotated = make(8, 4).double()
    x = x[..., :8]
    assert (rotated(x[:, order])[0][:, -1] - rotated(x)[0][:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("mixer", ["attention", "sliding_window_attention", "mac", "mag", "mal"])
def test_a_model_without_positions_decodes_and_is_saved(mixer, tmp_path):
    options = dict((OPTIONS | MORE_OPTIONS)[mixer], rope_theta=None)
    model = small_model([mixer, mixer], mixer_options={mixer: options})
    ids = torch.randint(0, 31, (2, 11), generator=torch.Generator().manual_seed(1))
    cache, logits = None, []
    for piece in ids.split([4, 1, 1, 5], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.mixer_options[mixer]["rope_theta"] is None
    assert_equal_weights(loaded, model)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-12)
    with_positions = small_model([mixer, mixer])
    assert (with_positions(ids).logits - model(ids).logits).abs().max() > 1e-6
    assert with_positions.config.fingerprint() != model.config.fingerprint()
