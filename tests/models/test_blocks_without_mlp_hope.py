"""`cms_levels=[]`: blocks of a mixer alone, in all that a model does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nested_learning import ContinuumMemorySystem, HopeConfig
from nested_learning.levels import levels
from nested_learning.optimizers import build
from nested_learning.parts import parts
from tests.models.small_models import CASES, assert_equal_weights, small_config, small_model

EXACT = {"rtol": 0, "atol": 1e-12}


def bare(mixers, **overrides):
    return small_model(mixers, cms_levels=[], **overrides)


@pytest.fixture(params=CASES)
def mixers(request):
    return CASES[request.param]


@pytest.fixture
def ids():
    return torch.randint(0, 31, (3, 13), generator=torch.Generator().manual_seed(1))


def test_a_block_is_its_mixer_and_the_residual_connection(mixers, ids):
    model = bare(mixers)
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x = x + layer.mixer(layer.mixer_norm(x))[0]
    expected = model.lm_head(model.model.norm(x))
    torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    of_mixers = {name for name, _ in model.model.layers[0].named_parameters()}
    assert not any(name.startswith("cms") for name in of_mixers)


def test_pieces_cache_and_generation_are_those_of_the_whole(mixers, ids):
    model = bare(mixers)
    whole, cache, logits = model(ids).logits, None, []
    for piece in ids.split([6, 1, 1, 5], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **EXACT)
    assert set(cache.states) == set(model.config.state_names) == {"layers.0.mixer", "layers.1.mixer"}
    new = model.generate(ids, max_new_tokens=4, do_sample=False)
    for length in range(13, 17):
        assert torch.equal(new[:, length], model(new[:, :length]).logits[:, -1].argmax(-1))


def test_training_is_that_of_plain_and_of_checkpointed_blocks(mixers, ids):
    gradients = []
    for checkpointing in (False, True):
        model = bare(mixers, segment_size=5).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(g is not None and g.any() for g in gradients[-1])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, **EXACT)


def test_saved_and_loaded(mixers, ids, tmp_path):
    model = bare(mixers)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.cms_levels == []
    assert_equal_weights(loaded, model)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **EXACT)
    cache = model(ids, use_cache=True).past_key_values
    cache.save(tmp_path / "state.safetensors")
    again = type(cache).load(tmp_path / "state.safetensors", loaded)
    torch.testing.assert_close(
        loaded(ids, past_key_values=again).logits, model(ids, past_key_values=cache).logits, **EXACT
    )
    assert model.config.fingerprint() != small_config(mixers).fingerprint()


def test_the_view_and_the_parts_have_no_level_of_a_cms(mixers):
    model = bare(mixers)
    names = [component.name for component in levels(model).components]
    assert names
    assert not any("CMS" in name for name in names)
    assert not any("cms" in part for part in parts(model).handles.values())
    build("adamw", model, lr=1e-3)
    with pytest.raises(ValueError, match=r"cms\.0"):
        build("adamw", model, lr=1e-3, levels=[{"part": "cms.0", "period": "chunk"}])


def test_documents_in_a_row_are_rows_of_their_own(ids):
    model = bare(["titans", "attention"])
    row = torch.cat([ids[0], ids[1]]).unsqueeze(0)
    positions = torch.arange(13).repeat(2).unsqueeze(0)
    packed = model(row, position_ids=positions).logits[0]
    torch.testing.assert_close(packed, torch.cat(list(model(ids[:2]).logits)), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cms_update": "regression"}, "CMS update 'regression' .* there are none; give at least one level"),
        ({"cms_update": "lm"}, "CMS update 'lm' .* leave the update at 'none'"),
        ({"cms_variant": "nested"}, "CMS variant 'nested' .* leave the variant at 'sequential'"),
        ({"cms_variant": "independent"}, "CMS variant 'independent'"),
        ({"cms_variant": "nestd"}, "Did you mean 'nested'"),
        ({"cms_nested_gradient": "exact"}, "needs variant 'nested'"),
        ({"cms_meta_gradient": "exact"}, "belongs to cms_update 'lm'"),
    ],
)
def test_options_of_levels_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        HopeConfig(cms_levels=[], **options)
    layer = {key.removeprefix("cms_"): value for key, value in options.items() if "meta" not in key}
    if layer:
        with pytest.raises(ValueError, match=message):
            ContinuumMemorySystem(8, [], **layer)


def test_the_system_alone_gives_back_what_it_reads():
    cms = ContinuumMemorySystem(8, [])
    for tokens in (1, 5):
        x = torch.randn(2, tokens, 8, requires_grad=True)
        y, state = cms(x)
        assert state is None
        assert torch.equal(y, x)
        (gradient,) = torch.autograd.grad((2 * y).sum(), x)
        assert torch.equal(gradient, torch.full_like(x, 2.0))
    assert cms.info() == []
    assert cms.part_chunks() == {}
    assert not list(cms.parameters())
