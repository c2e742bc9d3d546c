"""Hope models whose continuum memory systems learn in context: streaming, rows, files, generation."""

import pytest
import torch

from nested_learning import HopeCache, HopeConfig
from tests.models.small_models import CASES, small_config, small_model

EXACT = {"rtol": 0, "atol": 1e-10}
LEVELS = [{"chunk_size": 2, "lr": 0.5}, {"chunk_size": 4, "lr": 0.3, "rule": "momentum"}, {"chunk_size": 8}]
VARIANTS = ["sequential", "nested", "independent"]
PAD = 30


def model_of(update, variant="sequential", mixers=("titans", "titans"), **overrides):
    overrides = {"cms_levels": LEVELS, "cms_update": update, "cms_variant": variant, **overrides}
    model = small_model(list(mixers), **overrides)
    with torch.no_grad():  # larger weights: an untrained model would repeat one token whatever it has read
        for name, parameter in model.named_parameters():
            if "log_lr" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=["regression", "lm"])
def update(request):
    return request.param


@pytest.fixture(params=CASES)
def mixers(request):
    """A block of each kind."""
    return list(dict.fromkeys(CASES[request.param]))


@pytest.fixture
def ids():
    return torch.randint(0, PAD, (3, 19), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def streamed(model, ids, pieces, mask=None, **options):
    cache, logits, start = HopeCache(model.config), [], 0
    for length in pieces:
        columns = slice(start, start + length)
        given = {} if mask is None else {"attention_mask": mask[:, columns]}
        logits.append(model(ids[:, columns], past_key_values=cache, **given, **options).logits)
        start += length
    assert start == ids.shape[1]
    return torch.cat(logits, 1), cache


def same_states(a: HopeCache, b: HopeCache) -> None:
    assert set(a.states) == set(b.states)
    for name, state in a.states.items():
        if name.endswith(".cms"):
            for x, y in zip(state.tensors(), b.states[name].tensors(), strict=True):
                torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_equal_whole(update, variant, ids):
    model = model_of(update, variant)
    whole, cache = streamed(model, ids, [19])
    for pieces in ([1] * 19, [3, 1, 8, 7]):
        got, pieced = streamed(model, ids, pieces)
        torch.testing.assert_close(got, whole, **EXACT)
        same_states(pieced, cache)
    static = model_of("none", variant, cms_levels=[{"chunk_size": level["chunk_size"]} for level in LEVELS])
    static.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(static(ids).logits[:, 2:], whole[:, 2:], atol=1e-3)
    torch.testing.assert_close(static(ids).logits[:, :2], whole[:, :2], **EXACT)  # the first chunk


def test_exact_initial_states_in_pieces_and_files(ids, tmp_path):
    """The tokens of an unfinished slow chunk go with the cache; a cache of the other gradient is refused."""
    first_order = model_of("regression", "nested")
    model = model_of("regression", "nested", cms_nested_gradient="exact")
    whole, cache = streamed(model, ids, [19])
    got, pieced = streamed(model, ids, [3, 1, 8, 7])
    torch.testing.assert_close(got, whole, **EXACT)
    same_states(pieced, cache)
    other = streamed(first_order, ids, [19])[0]
    torch.testing.assert_close(other[:, :4], whole[:, :4], **EXACT)  # the second level's first chunk
    assert (other[:, 4:] - whole[:, 4:]).abs().max() > 1e-6
    _, half = streamed(model, ids[:, :11], [11])
    half.save(tmp_path / "state.safetensors")
    loaded = HopeCache.load(tmp_path / "state.safetensors", model)
    with torch.no_grad():
        rest = model(ids[:, 11:], past_key_values=loaded).logits
    torch.testing.assert_close(rest, whole[:, 11:], **EXACT)
    with pytest.raises(ValueError, match="another configuration"):
        HopeCache.load(tmp_path / "state.safetensors", first_order)


def test_padding_and_other_rows_change_nothing(update, mixers, ids):
    model = model_of(update, mixers=mixers)
    padded = torch.cat([torch.full((3, 3), PAD), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    mask[1, :8] = 0
    mask[2, [0, 5, 6, 11, 20]] = 0
    read = [streamed(model, padded, pieces, mask)[0] for pieces in ([22], [6, 15, 1])]
    for row in range(3):
        keep = mask[row].bool()
        alone, _ = streamed(model, padded[row : row + 1, keep], [int(keep.sum())])
        for got in read:
            torch.testing.assert_close(got[row, keep], alone[0], **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_learning_rate_zero_is_the_static_model_bit_for_bit(update, variant, ids):
    levels = [{"chunk_size": size, "lr": 0.0} for size in (2, 8)]
    model = model_of(update, variant, cms_levels=levels)
    static = model_of("none", variant, cms_levels=[{"chunk_size": 2}, {"chunk_size": 8}])
    static.load_state_dict(model.state_dict())
    assert model.config.state_names == static.config.state_names
    assert torch.equal(model(ids).logits, static(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5), static.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_goes_on_identically(update, variant, ids, tmp_path):
    model = model_of(update, variant)
    for seen in (5, 8):
        _, cache = streamed(model, ids[:, :seen], [seen])
        cache.save(tmp_path / "state.safetensors")
        loaded = HopeCache.load(tmp_path / "state.safetensors", model)
        assert set(loaded.states) == set(model.config.state_names)
        with torch.no_grad():
            expected = model(ids[:, seen:], past_key_values=cache).logits
            assert torch.equal(model(ids[:, seen:], past_key_values=loaded).logits, expected)
    other = model_of(update, variant, cms_levels=[{**level, "rule": "adam"} for level in LEVELS])
    with pytest.raises(ValueError, match="another configuration"):
        HopeCache.load(tmp_path / "state.safetensors", other)


def test_rows_of_a_cache(update, mixers, ids):
    model = model_of(update, mixers=mixers)
    whole, _ = streamed(model, ids, [19])
    _, cache = streamed(model, ids[:, :7], [7])
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        got = model(ids[order, 7:], past_key_values=cache.select_rows(order)).logits
    torch.testing.assert_close(got, whole[order, 7:], **EXACT)


EXACT_INITIAL_STATES = {"variant": "nested", "cms_nested_gradient": "exact"}


@pytest.mark.parametrize("options", [{}, EXACT_INITIAL_STATES], ids=["", "exact initial states"])
def test_training_gradients_are_those_of_pieces_and_checkpointing(update, ids, options):
    if options and update == "lm":
        pytest.skip("refused")
    ids = ids[:, :13]
    model = model_of(update, **options).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    reference = torch.autograd.grad(model(ids, labels=ids).loss, learned, allow_unused=True)
    cache = HopeCache(model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split([5, 8], dim=1)]
    loss = model.loss_function(torch.cat(logits, 1), ids, 31)
    pieces = torch.autograd.grad(loss, learned, allow_unused=True)
    model.activation_checkpointing_enable()
    checkpointed = torch.autograd.grad(model(ids, labels=ids).loss, learned, allow_unused=True)
    model.activation_checkpointing_disable()
    model.config.segment_size = 7
    segments = torch.autograd.grad(model(ids, labels=ids).loss, learned, allow_unused=True)
    for got in (pieces, checkpointed, segments):
        for a, b in zip(got, reference, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def weights_of(cache):
    return cache.states["layers.0.cms"].weights["0.up.weight"]


# Generation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, ids, steps, learn_from_generated):
    """The whole sequence again for each token."""
    prompt = ids.shape[1]
    for _ in range(steps):
        learn = torch.ones_like(ids)
        if not learn_from_generated:
            learn[:, prompt:] = 0
        ids = torch.cat([ids, model(ids, use_cache=False, learn_mask=learn).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("learn", [False, True])
def test_generated_tokens_are_learned_from_only_when_asked(update, ids, learn):
    model = model_of(update, mixers=["titans"], cms_levels=[{"chunk_size": 4, "lr": 1.0}])
    prompt = ids[:2, :7]
    expected = greedy(model, prompt, 7, learn)
    cache = HopeCache(model.config)
    for options in ({"past_key_values": cache}, {}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        got = model.generate(prompt, max_new_tokens=7, do_sample=False, learn_from_generated=learn, **options)
        assert torch.equal(got, expected)
    mask = torch.ones_like(expected[:, :-1])
    mask[:, 7:] = learn
    _, read = streamed(model, expected[:, :-1], [13], learn_mask=mask)
    same_states(cache, read)
    _, other = streamed(model, expected[:, :-1], [13], learn_mask=1 - mask)
    assert not torch.equal(weights_of(other), weights_of(read))


def test_generation_goes_on_from_a_cache_and_with_beams(update, ids):
    model = model_of(update)
    prompt = ids[:2, :9]
    expected = greedy(model, prompt, 6, False)
    for inputs in (prompt[:, 4:], prompt):
        _, cache = streamed(model, prompt[:, :4], [4])
        got = model.generate(inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(got[:, -6:], expected[:, -6:])
    beams = [
        model.generate(prompt, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_padded_batches_generate_as_rows_alone(update, ids):
    model = model_of(update, pad_token_id=PAD)
    batch = ids[:, :9].clone()
    batch[1, :4] = PAD
    got = model.generate(batch, max_new_tokens=6, do_sample=False)
    alone = model.generate(batch[1:2, 4:], max_new_tokens=6, do_sample=False)
    assert torch.equal(got[1, 9:], alone[0, 5:])


# Refusals -----------------------------------------------------------------------------------------------


def test_what_does_not_belong_is_refused(update, ids):
    model, static = model_of(update), small_model(["titans"])
    with pytest.raises(ValueError, match="cms_weights are for static blocks"):
        model(ids, cms_weights={0: [None, None, None]})
    with pytest.raises(ValueError, match="learn_mask must be"):
        model(ids, learn_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="learn_mask is for a CMS that learns"):
        static(ids, learn_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="learn_from_generated is for a CMS that learns"):
        static.generate(ids, max_new_tokens=2, learn_from_generated=True)


def test_the_default_written_out_is_the_same_fingerprint(update):
    spelled = [{"chunk_size": 2, "lr": 0.1, "clip": 1, "rule": "gd", "retention": 1.0, "learn_lr": False}]
    plain = small_config(["titans"], cms_update=update, cms_levels=[{"chunk_size": 2}])
    assert (
        small_config(["titans"], cms_update=update, cms_levels=spelled).fingerprint() == plain.fingerprint()
    )
    other = small_config(["titans"], cms_update=update, cms_levels=[{"chunk_size": 2, "clip": 2.0}])
    assert other.fingerprint() != plain.fingerprint()


def test_a_model_round_trips_with_its_learned_rates_and_head_weights(update, tmp_path, ids):
    levels = [{"chunk_size": 2, "learn_lr": True, "heads": 2}, {"chunk_size": 4, "lr": 0.2}]
    model = model_of(update, "independent", cms_levels=levels).float()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.config, HopeConfig)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    fresh = small_model(["titans"], cms_update=update, cms_variant="independent", cms_levels=levels)
    cms = fresh.model.layers[0].cms
    assert abs(float(cms.writers[0].lr.detach()) - 0.1) < 1e-6
    assert cms.head_weights[0].tolist() == [1.0, 1.0]
