"""Titans as gate, as layer and as context: against plain loops, and what users of any mixer rely on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nested_learning import HopeCache, HopeConfig, HopeForCausalLM
from nested_learning.layers import MIXERS
from nested_learning.layers.attention import rotate
from nested_learning.ops.norm import unit

D, H, B, T = 16, 2, 2, 11
CASES = [
    pytest.param("mag", {"window": 5, "memory_options": {"chunk_size": 4}}, id="mag"),
    pytest.param("mag", {"window": 3, "memory": "gated_deltanet", "persistent_tokens": 0}, id="mag-deltanet"),
    pytest.param("mal", {"window": 5, "memory_options": {"chunk_size": 4}}, id="mal"),
    pytest.param("mac", {"segment": 4}, id="mac"),
    pytest.param("mac", {"segment": 4, "rope_theta": None}, id="mac-no-positions"),
    pytest.param("mac", {"segment": 4, "memory": "self_modifying_titans"}, id="mac-self-modifying"),
]


def make(name, options):
    torch.manual_seed(0)
    layer = MIXERS[name](hidden_size=D, num_heads=H, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)  # matrix memories start empty
    return layer, torch.randn(B, T, D, dtype=torch.float64)


def assert_same_state(a, b):
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("sizes", [[1] * T, [3, 5, 1, 2], [4, 4, 3]], ids=str)
def test_pieces_equal_the_whole(name, options, sizes):
    layer, x = make(name, options)
    y, final, surprise = layer(x, return_surprise=True)
    outputs, surprises, state = [], [], None
    for piece in x.split(sizes, dim=1):
        out, state, error = layer(piece, state, return_surprise=True)
        outputs.append(out)
        surprises.append(error)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(surprises, 1), surprise, rtol=0, atol=1e-12)
    if name == "mac":
        assert_same_state(state, final)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_changes_nothing_and_rows_are_independent(name, options):
    layer, x = make(name, options)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3], mask[1, 0], mask[1, 6] = False, False, False
    y, state = layer(x, mask=mask)
    after, _ = layer(x[:, :3], state)
    for row in range(B):
        alone, alone_state = layer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(y[row, mask[row]], alone[0], rtol=0, atol=1e-12)
        assert not y[row, ~mask[row]].any()
        torch.testing.assert_close(
            layer(x[row : row + 1, :3], alone_state)[0][0], after[row], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_token_never_changes_earlier_outputs(name, options):
    layer, x = make(name, options)
    changed = x.clone()
    changed[:, 6] += 1
    difference = (layer(changed)[0] - layer(x)[0]).abs().amax(dim=(0, 2))
    assert not difference[:6].any()
    assert difference[6:].gt(1e-6).all()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_parameter_gets_a_gradient(name, options):
    layer, x = make(name, options)
    layer(x)[0].square().sum().backward()
    for key, parameter in layer.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key


def explicit_attention(attention, x, persistent):
    """One query at a time over [p; the last `window` tokens], plain softmax; x [T, D]."""
    positions = torch.arange(len(x)).unsqueeze(0)
    q, k, v = (t[0] for t in attention._project(x.unsqueeze(0), positions))  # [H, T, d]
    heads = lambda projection: projection(persistent).unflatten(-1, (H, -1)).transpose(0, 1)  # noqa: E731
    p_key, p_value = attention.k_norm(heads(attention.k_proj)), heads(attention.v_proj)
    rows = []
    for t in range(len(x)):
        first = max(0, t + 1 - attention.window)
        keys = torch.cat([p_key, k[:, first : t + 1]], dim=1)
        values = torch.cat([p_value, v[:, first : t + 1]], dim=1)
        weights = torch.softmax((keys @ q[:, t, :, None]).squeeze(-1) * k.shape[-1] ** -0.5, dim=-1)
        rows.append((weights.unsqueeze(-1) * values).sum(1).flatten())
    return attention.out_proj(torch.stack(rows))


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("theta", [10_000.0, None])
@pytest.mark.parametrize("name", ["mag", "mal"])
def test_gate_and_layer_equal_their_equations(name, theta):
    layer, x = make(name, {"window": 4, "memory_options": {"chunk_size": 4}, "rope_theta": theta})
    y, _ = layer(x)
    p = layer.attention.persistent
    for row in range(B):
        both = torch.cat([p, x[row]]).unsqueeze(0)
        remembered = rms(layer.memory(both)[0][0, len(p) :], layer.memory_norm.weight)
        if name == "mag":
            attended = rms(explicit_attention(layer.attention, x[row], p), layer.attention_norm.weight)
            expected = (attended * F.silu(remembered)) @ layer.out_proj.weight.T
        else:
            expected = explicit_attention(layer.attention, remembered, p)
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("theta", [10_000.0, None])
def test_context_equals_its_equations(theta):
    layer, x = make("mac", {"segment": 4, "rope_theta": theta})
    y, _ = layer(x)
    d = D // H
    for row in range(B):
        state, outputs = None, []
        for segment in x[row].split(4):
            q = unit(F.silu(segment @ layer.recall_proj.weight.T).unflatten(-1, (H, d)).transpose(0, 1))
            recalled = layer.memory.recall(q.unsqueeze(0), state)[0]
            recalled = (
                recalled / (recalled.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
            )
            h = recalled.transpose(0, 1).flatten(1) @ layer.recall_out.weight.T
            attended = context_attention(layer, segment, h, d)
            memory, state = layer.memory(attended.unsqueeze(0), state)
            gate = F.silu(rms(memory[0], layer.memory_norm.weight))
            outputs.append((rms(attended, layer.attention_norm.weight) * gate) @ layer.out_proj.weight.T)
        torch.testing.assert_close(y[row], torch.cat(outputs), rtol=0, atol=1e-11)


def context_attention(layer, segment, h, d):
    """Token t over [p; h_0 … h_t; x_0 … x_t], one query at a time."""

    def heads(tokens, part):
        weight = layer.qkv_proj.weight[part * D : (part + 1) * D]
        return (tokens @ weight.T).unflatten(-1, (H, d)).transpose(0, 1)  # [H, tokens, d]

    at = torch.arange(len(segment)).unsqueeze(0)
    theta = layer.rope_theta
    turn = lambda t: t if theta is None else rotate(t.unsqueeze(0), at, theta)[0]  # noqa: E731
    query = turn(rms(heads(segment, 0), layer.q_norm.weight))
    keys = [rms(heads(t, 1), layer.k_norm.weight) for t in (layer.persistent, h, segment)]
    keys = [keys[0], turn(keys[1]), turn(keys[2])]
    values = [heads(t, 2) for t in (layer.persistent, h, segment)]
    rows = []
    for t in range(len(segment)):
        seen_keys = torch.cat([keys[0], keys[1][:, : t + 1], keys[2][:, : t + 1]], dim=1)
        seen = torch.cat([values[0], values[1][:, : t + 1], values[2][:, : t + 1]], dim=1)
        weights = torch.softmax((seen_keys @ query[:, t, :, None]).squeeze(-1) * d**-0.5, dim=-1)
        rows.append((weights.unsqueeze(-1) * seen).sum(1).flatten())
    return torch.stack(rows) @ layer.attention_out.weight.T


def hybrid():
    torch.manual_seed(0)
    names = ["mag", "mac", "gated_deltanet", "self_modifying_titans", "sliding_window_attention"]
    options = {
        "mag": {"window": 6, "memory_options": {"chunk_size": 4}},
        "mac": {"segment": 4},
        "self_modifying_titans": {"chunk_size": 4},
        "sliding_window_attention": {"window": 6},
    }
    config = HopeConfig(
        vocab_size=50,
        hidden_size=D,
        num_hidden_layers=len(names),
        num_heads=H,
        mixer=names,
        mixer_options=options,
        cms_levels=[{"chunk_size": 4}],
    )
    return HopeForCausalLM(config).double().eval()


def test_a_hybrid_of_all_kinds_decodes_from_one_cache(tmp_path):
    model = hybrid()
    ids = torch.randint(0, 50, (B, 14))
    whole = model(ids).logits
    cache, logits = None, []
    for piece in ids.split([6, 1, 1, 5, 1], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        cache.save(tmp_path / "state.safetensors")
        cache = HopeCache.load(tmp_path / "state.safetensors", model)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-11)
    out = model(ids, output_surprise=True)
    assert [surprise is not None for surprise in out.surprise] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mac", {"memory_options": {"chunk_size": 8}}, "the memory's chunk is the segment"),
        ("mac", {"memory": "deltanet"}, "anchors every 64 tokens"),
        ("mag", {"memory": "attention"}, "is not a memory layer"),
        ("mag", {"memory": "titan"}, "Did you mean 'titans'"),
        ("mal", {"persistent_tokens": -1}, "persistent_tokens must be 0 or a positive integer"),
        ("mal", {"window": 0}, "window must be a positive number"),
    ],
)
def test_bad_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[name](hidden_size=D, num_heads=H, **options)


def test_a_state_of_another_layer_is_refused():
    mag, x = make("mag", {})
    mac, _ = make("mac", {"segment": 4})
    with pytest.raises(ValueError, match="it is another layer's"):
        mag(x, mac(x)[1])
    with pytest.raises(ValueError, match="it is another layer's"):
        mac(x, mag(x)[1])
