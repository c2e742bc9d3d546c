"""Recordings of Hope against recomputation: gates token by token, recall, distances, writes, the loss."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nested_learning import HopeCache
from nested_learning.lens import lens, record
from nested_learning.lens.words import words
from nested_learning.training.data import byte_tokenizer
from tests.oracles import memory_layer as oracle

CHUNK = 4


def tokens_of_oracle(layer, x, make_token, adaptive=None):
    """(tokens by head [T][H], the state at each token) of the token loop on x [T, D]."""
    params = {name: p.detach() for name, p in layer.named_parameters()}
    names = ["memory"] if adaptive is None else oracle.memory_names(adaptive)
    system = layer.system
    settings = oracle.Options(
        dict.fromkeys(names, CHUNK), layer.num_heads, "dgd" if adaptive else "gd", system.momentum, True,
        "token", system.eta_max, layer.conv_size,
    )  # fmt: skip
    found, rows = [], []

    def spy(*arguments):
        found.append(make_token(*arguments))
        return found[-1]

    row = oracle.load_row(params, None, 0, settings)
    for token in x:
        rows.append(row)
        _, _, row = oracle.step(params, row, token, spy, settings)
    heads = layer.num_heads
    return [found[i : i + heads] for i in range(0, len(found), heads)], [*rows, row]


@pytest.mark.parametrize(
    ("mixer", "momentum"),
    [("self_modifying_titans", False), ("self_modifying_titans", True), ("titans", True)],
)
def test_gates_and_recall_are_those_of_the_token_loop(hope, ids, mixer, momentum):
    model = hope(mixer, mixer_options={mixer: {"chunk_size": CHUNK, "momentum": momentum}})
    recording = record(model, ids)
    trace = recording.memories[0]
    block = model.model.layers[0]
    with torch.no_grad():
        x = block.mixer_norm(model.model.embed_tokens(ids))
        make = oracle.self_modifying_token if "self" in mixer else oracle.static_token
        tokens, rows = tokens_of_oracle(block.mixer, x, make, "kv" if "self" in mixer else None)

    def expected(number):
        return np.array([[float(number(token)) for token in heads] for heads in tokens])

    np.testing.assert_allclose(trace.eta, expected(lambda t: t.eta), rtol=1e-9)
    np.testing.assert_allclose(trace.alpha, expected(lambda t: t.log_alpha.exp()), rtol=1e-9)
    assert (trace.mu is not None) == momentum
    if momentum:
        np.testing.assert_allclose(trace.mu, expected(lambda t: t.log_mu.exp()), rtol=1e-9)

    assert recording.moments.tolist() == [0, *range(CHUNK, 27, CHUNK), 27]
    assert np.isnan(trace.recall[0]).all()
    for place, moment in enumerate(recording.moments[1:], 1):
        memories = [head["memory"] for head in rows[moment].heads]
        for probe in trace.probes[trace.probes < moment]:
            pairs = list(zip(memories, tokens[probe], strict=True))
            error = sum((m.now(t.k) - t.targets["memory"]).square().sum() for m, t in pairs)
            size = sum(t.targets["memory"].square().sum() for _, t in pairs)
            assert trace.recall[place, probe] == pytest.approx(float(1 - error / size), rel=1e-8)
        start = [head["memory"] for head in rows[0].heads]
        moved = [
            float(torch.sqrt((m.W1 - s.W1).square().sum() + (m.W2 - s.W2).square().sum()))
            for m, s in zip(memories, start, strict=True)
        ]
        np.testing.assert_allclose(trace.distance[place, -1], moved, rtol=1e-9)
        spectrum = np.stack([torch.linalg.svdvals(m.W1).numpy() for m in memories])
        np.testing.assert_allclose(trace.singular_values["W1"][place], spectrum, rtol=1e-7, atol=1e-12)


def delta_net(hope, keys):
    """A DeltaNet that is given a value of its own at each token t, its key the unit vector keys[t], η = 1."""
    model = hope(
        "deltanet", num_heads=1, tie_word_embeddings=False, vocab_size=len(keys),
        mixer_options={"deltanet": {"chunk_size": 2, "conv_size": 0, "eta_max": 2.0}},
    )  # fmt: skip
    mixer, embed = model.model.layers[0].mixer, model.model.embed_tokens.weight
    with torch.no_grad():
        mixer.gates["eta"].weight.zero_()
        mixer.gates["eta"].bias.zero_()  # η = 2 · ½
        mixer.in_proj.weight.zero_()
        mixer.in_proj.weight[:4, :4] = 50 * torch.eye(4)  # the key is in the embedding's first half
        mixer.in_proj.weight[8:16, 4:].normal_()  # the value in the second
        embed[:, :4] = torch.eye(4, dtype=torch.float64)[keys]
    return model


def test_a_delta_rule_recalls_exactly_until_a_key_is_overwritten(hope):
    keys = [0, 1, 2, 3, 0, 1]
    model = delta_net(hope, keys)
    trace = record(model, torch.arange(len(keys))).memories[0]
    np.testing.assert_allclose(trace.eta, 1.0)
    np.testing.assert_allclose(trace.alpha, 1.0)
    for place, moment in enumerate([2, 4, 6], 1):
        kept = [probe for probe in range(moment) if keys[probe] not in keys[probe + 1 : moment]]
        np.testing.assert_allclose(trace.recall[place, kept], 1.0, atol=1e-8)
        np.testing.assert_allclose(trace.cosine[place, kept], 1.0, atol=1e-8)
        assert np.isnan(trace.recall[place, moment:]).all()
    mixer, block = model.model.layers[0].mixer, model.model.layers[0]
    with torch.no_grad():
        values = F.silu(block.mixer_norm(model.model.embed_tokens.weight) @ mixer.in_proj.weight[8:16].T)
    for old, new in ((0, 4), (1, 5)):  # the memory answers the new value
        error = (values[new] - values[old]).square().sum() / values[old].square().sum()
        assert trace.recall[3, old] == pytest.approx(float(1 - error), abs=1e-7)
        assert trace.recall[3, old] < 0.9


def test_nothing_moves_at_rate_zero(hope, ids):
    cms = {"cms_levels": [{"chunk_size": 8, "lr": 0.0}, {"chunk_size": 16}], "cms_update": "regression"}
    model = hope("titans", mixer_options={"titans": {"chunk_size": CHUNK}}, **cms)
    with torch.no_grad():
        model.model.layers[0].mixer.gates["eta"].weight.zero_()
        model.model.layers[0].mixer.gates["eta"].bias.fill_(-torch.inf)
        model.model.layers[0].mixer.gates["alpha"].weight.zero_()
        model.model.layers[0].mixer.gates["alpha"].bias.fill_(torch.inf)
    recording = record(model, ids)
    assert not recording.memories[0].distance.any()
    still, moving = recording.levels
    assert not still.learns
    assert still.positions.tolist() == [8, 16, 24]
    assert moving.positions.tolist() == [16]
    assert (moving.sizes > 0).all()


@pytest.mark.parametrize("update", ["regression", "lm"])
def test_writes_of_levels_are_the_changes_of_their_weights(hope, ids, update):
    model = hope("attention", cms_update=update, cms_levels=[{"chunk_size": 4}, {"chunk_size": 8}])
    recording = record(model, ids)
    cache, before, found = HopeCache(model.config), {}, {}
    with torch.no_grad():
        for t, token in enumerate(ids):
            model(token.view(1, 1), past_key_values=cache, use_cache=True)
            state = cache.states["layers.0.cms"]
            for level, block in enumerate(model.model.layers[0].cms.blocks):
                now = state.level(level).weights
                old = before.get(level) or {n: W.unsqueeze(0) for n, W in block.matrices(token).items()}
                size = sum((now[n] - old[n]).square().sum() for n in now).sqrt()
                if size > 1e-12:
                    found.setdefault(level, {})[t + 1 if update == "regression" else t] = float(size)
                before[level] = now
    for trace in recording.levels:
        assert trace.learns
        for position, size in zip(trace.positions, trace.sizes, strict=True):
            assert size == pytest.approx(found[trace.level][position], rel=1e-7)


LEARNING = {"cms_levels": [{"chunk_size": 4}, {"chunk_size": 8}], "cms_variant": "nested"}


@pytest.mark.parametrize(
    ("mixer", "more", "fields"),
    [
        ("titans", {"chunk_size": CHUNK}, {**LEARNING, "cms_update": "lm"}),
        ("mag", {"window": 6}, {**LEARNING, "cms_update": "regression"}),
        ("titans", {"chunk_size": CHUNK}, {"segment_size": 6}),
        ("titans", {"chunk_size": 1}, {}),
        ("self_modifying_titans", {"chunk_size": CHUNK, "projection_chunk_size": 8}, {}),
        ("gated_deltanet", {"chunk_size": CHUNK}, {}),
        ("oja", {"chunk_size": CHUNK}, {}),
        ("memora", {"chunk_size": CHUNK}, {}),
        ("attention", {}, {}),
        ("mac", {"segment": CHUNK, "persistent_tokens": 2}, {}),
        ("mag", {"window": 6, "persistent_tokens": 3, "memory_options": {"chunk_size": CHUNK}}, {}),
        ("mal", {"window": 6, "persistent_tokens": 3, "memory_options": {"chunk_size": CHUNK}}, {}),
    ],
)
def test_the_recorded_run_is_the_model_alone(hope, ids, mixer, more, fields):
    model = hope(mixer, mixer_options={mixer: more}, **fields).train()
    recording = record(model, ids)
    assert model.training
    model.eval()
    cuts = recording.moments.tolist() if recording.memories else [0, 27]
    cache, logits, surprise = HopeCache(model.config), [], []
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            out = model(ids[None, start:stop], past_key_values=cache, use_cache=True, output_surprise=True)
            logits.append(out.logits[0])
            surprise.append(out.surprise[0])
        alone = F.cross_entropy(torch.cat(logits)[:-1], ids[1:], reduction="none")
        whole = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    assert np.isnan(recording.loss[0])
    assert torch.equal(torch.from_numpy(recording.loss[1:]), alone)
    torch.testing.assert_close(torch.from_numpy(recording.loss[1:]), whole, rtol=1e-9, atol=1e-9)
    assert len(recording.memories) == (mixer != "attention")
    for trace in recording.memories:
        assert np.array_equal(trace.surprise, torch.cat(surprise, 1)[0].numpy())
        assert trace.eta.shape == trace.alpha.shape == (27, 2)
        assert np.isfinite(trace.recall[-1]).all()


def test_a_model_in_half_precision_is_recorded_in_that_of_its_states(hope, ids):
    model = hope("self_modifying_titans", mixer_options={"self_modifying_titans": {"chunk_size": 32}})
    model = model.to(torch.bfloat16)
    recording = record(model, ids)
    with torch.no_grad():
        logits = model(ids[None], use_cache=True, output_surprise=True).logits[0, :-1].float()
    alone = F.cross_entropy(logits, ids[1:], reduction="none")
    assert torch.equal(torch.from_numpy(recording.loss[1:]), alone.double())
    assert len(np.unique(recording.memories[0].eta)) == recording.memories[0].eta.size


def test_a_hybrid_shows_each_memory_and_the_loss_of_all(hope, ids):
    mixers = ["attention", "titans", "attention", "deltanet"]
    recording = record(hope(mixers, num_hidden_layers=4), ids)
    assert [trace.name for trace in recording.memories] == ["layers.1.mixer", "layers.3.mixer"]
    assert [trace.layer for trace in recording.memories] == [1, 3]


def test_texts_of_tokens_are_the_text():
    tokenizer, text = byte_tokenizer(), "naïve → 東京\n<b>"
    found = words(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(found) == text
    assert found[2:5] == ("", "ï", "v")
    assert words(None, [3, 5]) == ("3 ", "5 ")


def test_bad_input_is_refused(hope, ids):
    model = hope()
    with pytest.raises(ValueError, match=r"stack_levels\(model"):
        record(torch.nn.Linear(2, 2), ids)
    for wrong in (ids[:1], ids.view(1, -1), ids.float()):
        with pytest.raises(ValueError, match=r"ids must be \[T\] integers"):
            record(model, wrong)
    with pytest.raises(ValueError, match="no tokenizer"):
        lens(model, "text")
    with pytest.raises(ValueError, match="max_tokens must be at least 2"):
        lens(model, ids, max_tokens=1)
    with pytest.raises(ValueError, match="needs two"):
        lens(model, "a", byte_tokenizer())
