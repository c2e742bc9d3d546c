"""What a call of the model computes: invariances of the sequence, the batch and the ways to run it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nested_learning import HopeCache, HopeConfig, HopeModel
from tests.models.small_models import RECURRENT, VOCAB, small_config, small_model

EXACT = {"rtol": 0, "atol": 1e-11}


def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


# Sequence and batch ---------------------------------------------------------------------------------------


def test_pieces_equal_whole(model, ids):
    whole = logits_of(model, ids)
    for pieces in ([1] * 13, [5, 8], [3, 1, 9]):
        cache = HopeCache(model.config)
        parts = [logits_of(model, piece, past_key_values=cache) for piece in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
        assert cache.tokens_seen.tolist() == [13] * 3


def test_batch_row_alone_equals_row_in_batch(model, ids):
    whole = logits_of(model, ids)
    for row in range(len(ids)):
        torch.testing.assert_close(logits_of(model, ids[row : row + 1])[0], whole[row], **EXACT)


def test_left_padding_changes_nothing(model, ids):
    """Rows padded by 6, 0 and 2 columns of arbitrary ids, streamed in pieces, equal the rows alone."""
    padding = [6, 0, 2]
    lengths = [13, 19, 17]
    rows = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    batch = torch.stack([F.pad(row, (pad, 0), value=7) for row, pad in zip(rows, padding, strict=True)])
    mask = torch.stack([F.pad(torch.ones(n), (19 - n, 0)) for n in lengths]).long()
    alone = [logits_of(model, tokens[None])[0] for tokens in rows]
    for pieces in ([19], [6, 13], [1] * 19):
        cache, parts, seen = HopeCache(model.config), [], 0
        for piece in batch.split(pieces, dim=1):
            seen += piece.shape[1]
            parts.append(logits_of(model, piece, attention_mask=mask[:, :seen], past_key_values=cache))
        got = torch.cat(parts, 1)
        assert cache.tokens_seen.tolist() == lengths
        for row, pad in enumerate(padding):
            torch.testing.assert_close(got[row, pad:], alone[row], **EXACT)
        assert got.isfinite().all()


def test_right_padding_and_holes_change_nothing(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    mask[1, [2, 3, 7]] = 0
    got = logits_of(model, ids, attention_mask=mask)
    for row in range(3):
        keep = mask[row].bool()
        torch.testing.assert_close(got[row, keep], logits_of(model, ids[row : row + 1, keep])[0], **EXACT)


def test_no_token_changes_an_earlier_output(model, ids):
    """The Jacobian of the outputs before t with respect to the input at t is zero, later ones are not."""
    x = model.get_input_embeddings()(ids[:1]).detach().requires_grad_()
    y = logits_of(model, None, inputs_embeds=x)
    probe = torch.randn(VOCAB, dtype=torch.float64)
    for t in (0, 4, 11):
        (gradient,) = torch.autograd.grad((y[0, t] @ probe), x, retain_graph=True)
        assert not gradient[0, t + 1 :].any()
        assert gradient[0, t].any()


def test_earlier_tokens_matter(model, ids):
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % VOCAB
    assert not torch.allclose(logits_of(model, ids)[:, -1], logits_of(model, other)[:, -1], atol=1e-9)


def test_segments_equal_whole_with_all_outputs_and_gradients(mixers, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    results = []
    for size in (None, 1, 4, 5):
        model = small_model(mixers, segment_size=size)
        out = model(
            ids,
            mask,
            labels=ids.masked_fill(mask == 0, -100),
            output_hidden_states=True,
            output_surprise=True,
        )
        probe = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ((out.logits * probe)[mask.bool()]).sum().backward()
        surprises = [s for s in out.surprise if s is not None]
        outputs = [t[mask.bool()] for t in (out.logits, *out.hidden_states, *surprises)]
        results.append((outputs, [p.grad for p in model.parameters()]))
    (wanted, wanted_gradients), *others = results
    for outputs, gradients in others:
        for a, b in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        for a, b in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradients(mixers, ids):
    gradients = []
    for checkpointing in (False, True):
        model = small_model(mixers, segment_size=5).train()
        calls = []
        model.model.layers[0].mixer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        assert len(calls) == (6 if checkpointing else 3)  # three segments, recomputed or not
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_reentrant_checkpointing_is_taken_for_the_other_kind(ids, name):
    """The reentrant kind would lose the gradients through states; TRL and older recipes ask for it."""
    gradients = []
    given = {"use_reentrant": True, "preserve_rng_state": False}
    for checkpointing in (False, True):
        model = small_model(["titans", "attention"], segment_size=5).train()
        if checkpointing:
            with pytest.warns(UserWarning, match="use_reentrant=False"):
                getattr(model, name)(given)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert given["use_reentrant"] is True  # the caller's own
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_forward_is_deterministic_and_changes_no_parameter(model, ids):
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, second = logits_of(model, ids), logits_of(model, ids)
    assert torch.equal(first, second)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_same_seed_same_model(mixers):
    a, b = small_model(mixers, seed=3), small_model(mixers, seed=3)
    other = small_model(mixers, seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)


# Losses and outputs -----------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_labels_that_count(model, ids):
    labels = ids.clone()
    labels[0, :6] = -100
    labels[2] = -100
    out = model(ids, labels=labels)
    assert out.loss.dtype == torch.float64
    nll = -out.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, nll[counted].mean(), **EXACT)
    for items in (100, torch.tensor(100)):
        scaled = model(ids, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(scaled, nll[counted].sum() / 100, **EXACT)
    assert torch.equal(model(ids, labels=labels.int()).loss, out.loss)


def test_loss_is_float32_in_lower_precision(ids):
    model = small_model(["attention"]).bfloat16()
    out = model(ids, labels=ids)
    assert out.loss.dtype == torch.float32
    nll = -out.logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])
    torch.testing.assert_close(out.loss, nll.mean())


def test_loss_without_labels_that_count_is_zero_with_zero_gradients(model, ids):
    nothing = torch.full_like(ids, -100)
    for inputs, labels, items in ((ids, nothing, None), (ids[:, :1], ids[:, :1], None), (ids, nothing, 0)):
        loss = model(inputs, labels=labels, num_items_in_batch=items).loss
        assert loss.item() == 0
        model.zero_grad()
        loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:, :-1], r"\[batch, tokens\] = \[3, 13\].*got \[3, 12\]"),
        (lambda ids: ids.flatten(), r"got \[39\]"),
        (lambda ids: ids.double(), "integer token ids, got torch.float64"),
        (lambda ids: ids + VOCAB, r"labels must lie in 0\.\.30"),
        (lambda ids: ids.masked_fill(ids == ids[0, 0], -1), "-100 where nothing is to be predicted, got -1"),
    ],
)
def test_bad_labels_are_refused(ids, change, message):
    with pytest.raises(ValueError, match=message):
        small_model(["attention"])(ids, labels=change(ids))


@pytest.mark.parametrize("keep", [1, 5, torch.tensor([0, 3, 12])])
def test_logits_to_keep(model, ids, keep):
    index = torch.arange(13)[-keep:] if isinstance(keep, int) else keep
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, logits_of(model, ids)[:, index])
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, labels=ids, logits_to_keep=keep)


def test_hidden_states_are_the_blocks_inputs_and_the_normalised_output(model, ids):
    seen = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(model.model.layers) + 1
    assert all(torch.equal(a, b) for a, b in zip(seen, out.hidden_states[:-1], strict=True))
    torch.testing.assert_close(out.hidden_states[-1] @ model.lm_head.weight.T, out.logits)
    assert model(ids).hidden_states is None


def test_surprise_per_block(model, mixers, ids):
    out = model(ids, output_surprise=True)
    plain = model(ids)
    assert plain.surprise is None
    torch.testing.assert_close(out.logits, plain.logits)
    for name, surprise in zip(mixers, out.surprise, strict=True):
        assert (surprise is None) == ("attention" in name)
        if surprise is not None:
            assert surprise.shape == ids.shape
            assert (surprise > 0).all()


def test_tuple_outputs(model, ids):
    labels = ids
    as_tuple = model(ids, labels=labels, return_dict=False)
    as_dict = model(ids, labels=labels)
    assert torch.equal(as_tuple[0], as_dict.loss)
    assert torch.equal(as_tuple[1], as_dict.logits)
    assert isinstance(as_tuple[2], HopeCache)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], as_dict.logits)


def test_embeddings_instead_of_ids(model, ids):
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(logits_of(model, None, inputs_embeds=embeds), logits_of(model, ids))
    for both in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**both)


def test_no_cache_while_training_or_when_not_wanted(model, ids):
    assert isinstance(model(ids).past_key_values, HopeCache)
    assert model(ids, use_cache=False).past_key_values is None
    model.train()
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, HopeCache)


def test_gradients_flow_through_a_given_cache(model, ids):
    """Two calls with the cache in between give the gradients of one call."""
    reference = torch.autograd.grad(logits_of(model, ids)[:, 6:].sum(), list(model.parameters()))
    cache = model(ids[:, :6]).past_key_values
    got = torch.autograd.grad(
        logits_of(model, ids[:, 6:], past_key_values=cache).sum(), list(model.parameters())
    )
    for a, b in zip(got, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_cms_weights_per_row(model, ids):
    """Each row with weights of its own equals that row alone in a model that has them."""
    blocks = model.model.layers[1].cms.blocks
    own = [{name: p.detach() for name, p in block.named_parameters()} for block in blocks]
    rows = [{name: p.expand(3, *p.shape) for name, p in level.items()} for level in own]
    whole = logits_of(model, ids)
    for weights in ({1: own}, {1: rows}, {1: [None, rows[1]]}, {}):
        torch.testing.assert_close(logits_of(model, ids, cms_weights=weights), whole, **EXACT)

    slow = {name: p + 0.1 * torch.randn(3, *p.shape).double() for name, p in own[1].items()}
    got = logits_of(model, ids, cms_weights={1: [None, slow]})
    cache = HopeCache(model.config)
    streamed = [
        logits_of(model, piece, cms_weights={1: [None, slow]}, past_key_values=cache)
        for piece in ids.split([5, 8], dim=1)
    ]
    torch.testing.assert_close(torch.cat(streamed, 1), got, **EXACT)
    for row in range(3):
        changed = copy.deepcopy(model)
        changed.model.layers[1].cms.blocks[1].load_state_dict({name: p[row] for name, p in slow.items()})
        torch.testing.assert_close(got[row], logits_of(changed, ids[row : row + 1])[0], **EXACT)
        assert not torch.allclose(got[row], whole[row])
    with pytest.raises(ValueError, match=r"keyed by layer index 0\.\.1, got 2"):
        model(ids, cms_weights={2: own})


def test_gradients_reach_cms_weights_through_checkpointing(ids):
    model = small_model(["attention"], segment_size=5).train()
    level = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.model.layers[0].cms.blocks[0].named_parameters()
    }
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        loss = model(ids, labels=ids, cms_weights={0: [level, None]}).loss
        gradients.append(torch.autograd.grad(loss, list(level.values())))
    assert all(gradient.any() for gradient in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# Dtypes -----------------------------------------------------------------------------------------------------


def test_bfloat16_stays_near_float64_with_float32_memories(mixers, ids):
    exact = logits_of(small_model(mixers), ids)
    out = small_model(mixers).bfloat16()(ids)
    assert out.logits.dtype == torch.bfloat16
    error = (out.logits.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.1
    for name, state in out.past_key_values.states.items():
        index = int(name.split(".")[1])
        floats = [t for t in state.tensors() if t.is_floating_point()]
        wanted = torch.bfloat16 if "attention" in mixers[index] else torch.float32
        assert {t.dtype for t in floats} == {wanted}


def test_float32_stays_near_float64(mixers, ids):
    exact = logits_of(small_model(mixers), ids)
    torch.testing.assert_close(
        logits_of(small_model(mixers).float(), ids).double(), exact, rtol=1e-3, atol=1e-4
    )


def test_autocast_trains(mixers, ids):
    model = small_model(mixers).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    exact = small_model(mixers)(ids, labels=ids).loss
    assert abs(float(loss.detach() - exact.detach())) < 0.05
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# Bad input --------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(ids):
    model = small_model(["attention"])
    other = model(ids).past_key_values
    for bad in (VOCAB, -100, -1):
        wrong = ids.clone()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.30"):
            model(wrong)
    for shape in ((3, 5), (3, 14), (2, 13), (3, 1, 13, 13)):
        with pytest.raises(ValueError, match=r"attention_mask must be .* \[3, 13\] .*, got"):
            model(ids, attention_mask=torch.ones(shape))
    for length in (1, 5, 14, 17):  # thirteen columns seen and three new ones: 3 or 16
        with pytest.raises(ValueError, match=r"\[3, 3\] or \[3, 16\] .*, got"):
            model(ids[:, :3], attention_mask=torch.ones(3, length), past_key_values=other)
    with pytest.raises(ValueError, match="holds 3 rows, the input 1"):
        model(ids[:1], past_key_values=other)
    with pytest.raises(ValueError, match="must be a HopeCache, got tuple"):
        model(ids, past_key_values=())
    with pytest.raises(ValueError, match="no tokens"):
        model(ids[:, :0])
    with pytest.raises(TypeError, match="atention_mask"):
        model(ids, atention_mask=torch.ones(3, 13))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: {"input_ids": ids[0]}, r"input_ids must be \[batch, tokens\], got \[13\].*\[None\]"),
        (lambda ids: {"input_ids": ids.float()}, "int64 or int32 token ids, got torch.float32"),
        (lambda ids: {"input_ids": ids.bool()}, "int64 or int32 token ids, got torch.bool"),
        (lambda ids: {"input_ids": ids.tolist()}, "must be a tensor .* got list; a tokenizer gives"),
        (lambda ids: {"inputs_embeds": torch.zeros(3, 1, 7)}, r"\[batch, tokens, 16\], got \[3, 1, 7\]"),
        (lambda ids: {"inputs_embeds": torch.zeros(3, 16)}, r"\[batch, tokens, 16\], got \[3, 16\]"),
        (
            lambda ids: {"input_ids": ids, "attention_mask": ids.tolist()},
            "attention_mask must be .* got list",
        ),
        (lambda ids: {"input_ids": ids, "logits_to_keep": -2}, "logits_to_keep must be .* got -2"),
        (lambda ids: {"input_ids": ids, "logits_to_keep": 2.5}, "logits_to_keep must be .* got 2.5"),
        (lambda ids: {"input_ids": ids, "labels": ids.tolist()}, "labels must be .*tensor.* got list"),
    ],
)
def test_inputs_of_another_kind_are_refused(ids, change, message):
    with pytest.raises(ValueError, match=message):
        small_model(["attention"])(**change(ids))


def test_a_cache_of_another_configuration_is_refused(mixers, ids):
    model = small_model(mixers)
    for fields in ({"num_heads": 1}, {"cms_levels": [{"chunk_size": 4}]}):
        other = small_model(
            mixers,
            mixer_options={name: {"window": 4} if "window" in name else {} for name in set(mixers)},
            **fields,
        )
        for cache in (other(ids).past_key_values, HopeCache(other.config)):
            with pytest.raises(ValueError, match="another configuration"):
                model(ids, past_key_values=cache)


def test_an_equal_configuration_is_compared_once(model, mixers, ids, monkeypatch):
    cache = HopeCache(small_config(mixers, segment_size=5))
    pieces = [logits_of(model, ids[:, :4], past_key_values=cache)]
    monkeypatch.setattr(HopeConfig, "fingerprint", lambda _: pytest.fail("hashed for a token"))
    pieces += [logits_of(model, piece, past_key_values=cache) for piece in ids[:, 4:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits_of(model, ids), **EXACT)


def test_a_failed_call_leaves_the_cache_as_it_was(model, ids):
    cache = model(ids[:, :6]).past_key_values
    wrong = ids[:, 6:].clone()
    wrong[0, 0] = VOCAB
    with pytest.raises(ValueError, match="token ids"):
        model(wrong, past_key_values=cache)
    torch.testing.assert_close(
        logits_of(model, ids[:, 6:], past_key_values=cache), logits_of(model, ids)[:, 6:], **EXACT
    )


# The model as a module --------------------------------------------------------------------------------------


def test_start_logits_are_of_order_one(mixers, ids):
    torch.manual_seed(0)
    config = small_config(mixers, hidden_size=64)
    model = type(small_model(mixers))(config)
    assert 0.7 < float(logits_of(model, ids).detach().std()) < 1.4


def test_every_parameter_gets_a_gradient(model, ids):
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_base_model_is_the_model_without_head(model, ids):
    base = model.model
    assert isinstance(base, HopeModel)
    torch.testing.assert_close(base(ids).last_hidden_state @ model.lm_head.weight.T, logits_of(model, ids))


@pytest.mark.parametrize(
    "mixer",
    [
        "attention",
        "self_modifying_titans",
        # In make test their layers alone: tests/memory/test_operator.py.
        pytest.param("sliding_window_attention", marks=pytest.mark.slow),
        pytest.param("titans", marks=pytest.mark.slow),
    ],
)
def test_traced_in_one_graph_with_the_same_gradients(mixer, ids):
    """The backend does not compile kernels: this is about the graph, forward and backward."""
    model = small_model([mixer])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(ids[:, :9], labels=ids[:, :9])
    expected = model(ids[:, :9], labels=ids[:, :9])
    torch.testing.assert_close(out.logits, expected.logits, **EXACT)
    got = torch.autograd.grad(out.loss, list(model.parameters()))
    want = torch.autograd.grad(expected.loss, list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", *RECURRENT[:1]])
def test_compiled_for_the_cpu(mixer, ids):
    model = small_model([mixer])
    with torch.no_grad():
        compiled = torch.compile(model)(ids[:, :5]).logits
    torch.testing.assert_close(compiled, logits_of(model, ids[:, :5]), **EXACT)
