"""A block of Hope alone: equal to that of a model, in any pieces, its memories a value."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_learning import HopeConfig, HopeForCausalLM, HopeLayer, HopeLayerState
from nested_learning.layers import MIXERS
from nested_learning.memory.running import MemoryState
from nested_learning.parts import parts
from tests.damage import check_refusal, damaged_bytes, damaged_content, read_file, write_checked
from tests.models.small_models import MORE_OPTIONS, OPTIONS, small_model

REGRESSION = {"cms_update": "regression", "cms_levels": [{"chunk_size": 2}, {"chunk_size": 8}]}
ALL = OPTIONS | MORE_OPTIONS


def small_layer(mixer="self_modifying_titans", **options) -> HopeLayer:
    torch.manual_seed(0)
    given = {"mixer_options": {mixer: ALL[mixer]}, **REGRESSION, "cms_expansion": 2.0, **options}
    return HopeLayer(16, 2, mixer, **given).double()


def tokens(rows=3, length=13, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, 16, dtype=torch.double, generator=generator)


def assert_same_state(found, wanted, atol=1e-12):
    found, wanted = found.to_tensors(), wanted.to_tensors()
    assert found.keys() == wanted.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, wanted[name], rtol=0, atol=atol, msg=name)


@pytest.fixture(params=ALL)
def layer(request):
    return small_layer(request.param)


def test_is_the_block_of_a_model():
    model = small_model(["titans", "self_modifying_titans"], **REGRESSION)
    x = tokens()
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            layer = HopeLayer.from_config(model.config, index).double()
            layer.block.load_state_dict(block.state_dict())
            y, state = layer(x)
            wanted, states = block(x)
            assert torch.equal(y, wanted)
            assert_same_state(state, HopeLayerState(*states), atol=0)
            x = y


def test_starts_as_in_a_model():
    """The same draws give the same weights: what a mixer initialises itself, and all the rest by its rule."""
    layer = HopeLayer(64, 4, initializer_scale=0.3, **REGRESSION)
    stds = {
        name: p.std() for name, p in layer.named_parameters() if p.numel() > 2000 and "initial" not in name
    }
    for name, std in stds.items():
        scale = 0.5 if "mixer" in name else 0.3
        fan_in = layer.get_parameter(name).shape[1]
        if "conv" not in name:
            torch.testing.assert_close(std, torch.tensor(scale * fan_in**-0.5), rtol=0.05, atol=0, msg=name)
    assert torch.equal(layer.block.mixer.gates["alpha"].bias, torch.full((4,), 4.0))


@torch.no_grad()
def test_any_pieces_and_single_tokens(layer):
    x = tokens()
    whole, after = layer(x)
    for cuts in ([5, 1, 7], [1] * 13):
        state, ys = None, []
        for piece in x.split(cuts, 1):
            y, state = layer(piece, state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=0, atol=1e-12)
        assert_same_state(state, after)
    state, ys = None, []
    for token in x.unbind(1):  # [B, D]
        y, state = layer(token, state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), whole, rtol=0, atol=1e-12)
    assert_same_state(state, after)


@torch.no_grad()
def test_one_token_per_row_is_a_sequence_of_one(layer):
    x = tokens(length=2)
    mask = torch.tensor([True, False, True])
    learn = torch.tensor([True, True, False])
    y, state = layer(x[:, 0], mask=mask, learn=learn)
    z, other = layer(x[:, :1], mask=mask[:, None], learn=learn[:, None])
    assert y.shape == (3, 16)
    assert torch.equal(y, z[:, 0])
    assert_same_state(state, other, atol=0)
    y, state = layer(x[:, 1], state)
    z, other = layer(x[:, 1:], other)
    assert torch.equal(y, z[:, 0])
    assert_same_state(state, other, atol=0)


@torch.no_grad()
def test_surprise_of_a_sequence_and_of_a_token():
    layer, x = small_layer(), tokens()
    y, state, surprise = layer(x, return_surprise=True)
    assert surprise.shape == (3, 13)
    assert torch.equal(layer(x)[0], y)
    _, state = layer(x[:, :12])
    _, _, last = layer(x[:, 12], state, return_surprise=True)
    torch.testing.assert_close(last, surprise[:, 12], rtol=0, atol=1e-12)
    assert (last > 0).all()


@torch.no_grad()
def test_documents_are_rows_of_their_own(layer):
    x = tokens(1, 13)
    lengths = [5, 2, 6]
    alone = [layer(piece)[0] for piece in x.split(lengths, 1)]
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for said in ({"documents": number}, {"position_ids": positions}):
        y, state = layer(x, **said)
        torch.testing.assert_close(y, torch.cat(alone, 1), rtol=0, atol=1e-12)
        assert_same_state(state, layer(x[:, 7:])[1])


@torch.no_grad()
def test_padding_changes_nothing_and_its_output_is_zero(layer):
    x = tokens(2)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, :4] = False
    y, state = layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
    alone, after = layer(x[1:, 4:])
    assert not y[1, :4].any()
    torch.testing.assert_close(y[1:, 4:], alone, rtol=0, atol=1e-12)
    row = state.select_rows(torch.tensor([1]))
    z, _ = layer(x[1, None, 0], row)
    torch.testing.assert_close(z, layer(x[1, None, 0], after)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_of_a_state(layer):
    x = tokens()
    _, state = layer(x)
    index = torch.tensor([2, 0])
    y, _ = layer(x[index, 0], state.select_rows(index))
    torch.testing.assert_close(y, layer(x[:, 0], state)[0][index], rtol=0, atol=1e-12)
    parts_ = [state.select_rows(torch.tensor([i])) for i in range(3)]
    assert_same_state(HopeLayerState.join_rows(parts_), state, atol=0)


def test_gradients_flow_through_the_state():
    """Those of the last token's output, in pieces as in one call, for every parameter and the whole input."""
    layer = small_layer()
    found = []
    for cuts in ([13], [6, 7], [1] * 13):
        x = tokens().requires_grad_()
        state = None
        for piece in x.split(cuts, 1):
            y, state = layer(piece.squeeze(1) if piece.shape[1] == 1 else piece, state)
        last = y if y.dim() == 2 else y[:, -1]
        found.append(torch.autograd.grad(last.square().sum(), [x, *layer.parameters()]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert any(t.requires_grad for t in state.tensors())
    assert all(not t.requires_grad for t in state.detach().tensors())


def test_the_first_token_reaches_the_last_one_through_the_state_alone():
    layer = small_layer("titans")
    first = tokens(1, 1)[:, 0].requires_grad_()
    _, state = layer(first)
    y, _ = layer(tokens(1, 1, seed=2)[:, 0], state)
    (g,) = torch.autograd.grad(y.sum(), first)
    assert g.abs().max() > 1e-8


def test_a_call_changes_no_parameter_and_no_state():
    layer, x = small_layer(), tokens()
    before = copy.deepcopy(layer.state_dict())
    _, state = layer(x)
    kept = copy.deepcopy(state)
    layer(x, state)
    assert_same_state(state, kept, atol=0)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_static_cms_has_no_state():
    layer = small_layer(cms_update="none")
    y, state = layer(tokens())
    assert state.cms is None
    assert isinstance(state.mixer, MemoryState)
    other, _ = layer(tokens(), cms_weights=[None, {"down.weight": layer.block.cms.blocks[1].down.weight * 0}])
    assert not torch.equal(y, other)


def test_its_parts_are_those_of_a_model():
    layer = small_layer()
    model = HopeForCausalLM(HopeConfig(**{**layer.config.to_diff_dict(), "vocab_size": 7}))
    assert {"embedding"} | set(parts(layer).handles.values()) == set(parts(model).handles.values())


# Its file ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded(layer, tmp_path):
    x = tokens()
    _, state = layer(x)
    state.save(tmp_path / "state", layer)
    again = HopeLayerState.load(tmp_path / "state", layer)
    assert_same_state(again, state, atol=0)
    assert type(again.mixer) is type(state.mixer)
    assert torch.equal(layer(x, again)[0], layer(x, state)[0])
    assert_same_state(HopeLayerState.from_tensors(state.to_tensors()), state, atol=0)
    moved = state.to("meta")
    assert {t.device.type for t in moved.tensors()} == {"meta"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    layer = small_layer()
    with torch.no_grad():
        _, state = layer(tokens(length=11))
    path = tmp_path_factory.mktemp("layer") / "state"
    state.save(path, layer)
    return layer, path, *read_file(path)


@torch.no_grad()
def load_or_refuse(layer, path):
    try:
        state = HopeLayerState.load(path, layer)
    except ValueError as error:
        check_refusal(error, path)
        return
    layer(tokens(len(state.tensors()[0])), state.map(lambda t: t.double() if t.is_floating_point() else t))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes(saved, data):
    layer, path, *_ = saved
    damaged = path.with_name("damaged")
    damaged.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    load_or_refuse(layer, damaged)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_content_with_the_right_checksum(saved, data):
    layer, path, tensors, metadata = saved
    damaged = path.with_name("damaged")
    write_checked(damaged, *data.draw(damaged_content(tensors, metadata)))
    load_or_refuse(layer, damaged)


def renamed(old, new):
    return lambda t: {key.replace(old, new): value for key, value in t.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("mixer.MemoryState", "mixer.NoState"), "no 'mixer' of class 'NoState'"),
        (renamed("mixer.MemoryState", "mixer.PendingChunk"), "no field 'anchor'"),
        (renamed("cms.", "other."), "no 'other'"),
        (lambda t: {k: v for k, v in t.items() if k[:4] != "cms."}, "cms is a NoneType, the layer's is"),
        (lambda t: {k: v for k, v in t.items() if k[:6] == "cms.we"}, "lacks position"),
        (lambda t: t | {"cms.position": t["cms.position"] + 8}, "has the value .*, expected 0 to 7"),
        (lambda t: t | {"cms.position": t["cms.position"][:2]}, r"its tensors have \[2, 3\] rows"),
        (lambda t: t | {"cms.position": t["cms.position"][0]}, r"its tensors have \[-1, 3\] rows"),
    ],
)  # fmt: skip
def test_each_field(saved, change, message):
    layer, path, tensors, metadata = saved
    damaged = path.with_name("changed")
    write_checked(damaged, change(tensors), metadata)
    with pytest.raises(ValueError, match=message) as error:
        HopeLayerState.load(damaged, layer)
    check_refusal(error.value, damaged)


def test_files_of_others(saved, tmp_path):
    layer, path, tensors, metadata = saved
    with pytest.raises(ValueError, match="another configuration"):
        HopeLayerState.load(path, small_layer(cms_levels=[{"chunk_size": 4}]))
    with pytest.raises(FileNotFoundError, match="no layer state file"):
        HopeLayerState.load(tmp_path / "none", layer)
    write_checked(tmp_path / "new", tensors, {**metadata, "version": "2"})
    with pytest.raises(ValueError, match="layer state format version '2', this package reads '1'"):
        HopeLayerState.load(tmp_path / "new", layer)
    model = small_model(["titans"])
    model(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="not a saved HopeLayerState"):
        HopeLayerState.load(tmp_path / "cache", layer)
    with pytest.raises(ValueError, match="is empty"):
        HopeLayerState(None, None).save(tmp_path / "empty", layer)


# Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cms_update": "lm"}, "'lm' learns from the loss of the next token"),
        ({"mixer": ["titans"]}, "one name"),
        ({"mixer": "titan"}, "Did you mean 'titans'"),
        ({"mixer_options": {"chunk_size": 4}}, "keyed by mixer name"),
        ({"num_heads": 3}, "divisible by num_heads"),
        ({"cms_levels": [{"chunk": 4}]}, "chunk_size"),
    ],
)
def test_layers_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        HopeLayer(**{"hidden_size": 16, "num_heads": 2, **options})


def test_blocks_that_a_model_does_not_have():
    config = small_model(["titans"]).config
    for index in (1, -1, "0"):
        with pytest.raises(ValueError, match=r"0\.\.0, got"):
            HopeLayer.from_config(config, index)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer, x: layer(x[..., :8]), r"x must be \[B, T >= 1, 16\], or \[B, 16\]"),
        (lambda layer, x: layer(x[0, 0]), r"x must be \[B, T >= 1, 16\]"),
        (lambda layer, x: layer(x.float()), "x must be torch.float64"),
        (lambda layer, x: layer(x, layer(x)[1].mixer), "state must be a HopeLayerState, got MemoryState"),
        (lambda layer, x: layer(x, layer(x[:2])[1]), "rows"),
        (lambda layer, x: layer(x, HopeLayerState(layer(x)[1].mixer, None)), "state has none of a CMS"),
        (lambda layer, x: layer(x[:, 0], documents=torch.zeros(3, 1)), "no second document begins"),
        (lambda layer, x: layer(x[:, 0], position_ids=torch.zeros(3, 1)), "no second document begins"),
        (lambda layer, x: layer(x, learn=torch.ones(3, 13)), r"learn must be bool \(3, 13\)"),
        (lambda layer, x: layer(x, mask=torch.ones(3, 12, dtype=torch.bool)), "mask must be bool"),
    ],
)
def test_calls_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_layer(), tokens())


def test_what_this_layer_does_not_have():
    static, x = small_layer("attention", cms_update="none"), tokens()
    with pytest.raises(ValueError, match="'attention' has no surprise"):
        static(x, return_surprise=True)
    with pytest.raises(ValueError, match="learn is for a CMS that learns"):
        static(x, learn=torch.ones(3, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="state has one of a CMS"):
        static(x, small_layer("attention")(x)[1])


def test_every_mixer_of_the_package_runs():
    x = torch.randn(2, 5, 16)
    for name in MIXERS:
        options = {
            "memory": {"parts": {"objective": "huber"}},
            "mac": {"segment": 4},
            "sliding_window_attention": {"window": 4},
        }
        if not MIXERS[name].__module__.startswith("nested_learning."):
            continue
        layer = HopeLayer(16, 2, name, {name: options[name]} if name in options else None)
        y, state = layer(x)
        z, _ = layer(x[:, 0], state)
        assert y.isfinite().all()
        assert z.isfinite().all()
