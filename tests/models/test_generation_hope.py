"""`generate` against loops written out, and its use of the cache."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from nested_learning import HopeCache
from tests.models.small_models import CASES, RECURRENT, VOCAB, small_model

PAD = 30


@pytest.fixture
def model(mixers):
    """With larger embeddings: an untrained model would otherwise repeat one token whatever it has read."""
    model = small_model(mixers, pad_token_id=PAD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, PAD, (3, 9), generator=torch.Generator().manual_seed(1))


def greedy_loop(model, ids, steps):
    """Without any cache: the whole sequence again for each token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(ids, **kwargs)


def test_greedy_is_the_argmax_loop(model, ids):
    expected = greedy_loop(model, ids, 8)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(generate(model, ids, **options), expected)
    assert len({tuple(row) for row in expected[:, 9:].tolist()}) > 1  # depends on what was read


def test_left_padded_batch_equals_rows_alone(model, ids):
    rows = [ids[0], ids[1, :4], ids[2, :7]]
    batch = torch.stack([F.pad(row, (9 - len(row), 0), value=PAD) for row in rows])
    mask = (batch != PAD).long()
    got = generate(model, batch, attention_mask=mask)
    inferred = generate(model, batch)  # generate finds the padding by its id
    assert torch.equal(got, inferred)
    for row, tokens in zip(got, rows, strict=True):
        assert torch.equal(row[9:], greedy_loop(model, tokens[None], 8)[0, len(tokens) :])


@pytest.mark.parametrize("mixers", [CASES["hybrid"]], ids=["hybrid"])
def test_beam_search_keeps_the_best_of_all_continuations(model, ids):
    """With as many beams as there are pairs of tokens, beam search over two steps is exhaustive search."""
    prompt = ids[:2]
    got = generate(model, prompt, max_new_tokens=2, num_beams=VOCAB * VOCAB, length_penalty=0.0)
    for row in range(2):
        first = model(prompt[row : row + 1]).logits[:, -1].log_softmax(-1)[0]
        extended = torch.cat([prompt[row].expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
        second = model(extended).logits[:, -1].log_softmax(-1)
        best = int((first[:, None] + second).argmax())
        assert got[row, 9:].tolist() == [best // VOCAB, best % VOCAB]


@pytest.mark.parametrize("padded", [False, True])
def test_beams_with_and_without_cache_agree(model, ids, padded):
    if padded:
        ids = torch.cat([torch.full((3, 2), PAD), ids], 1)
    options = {"num_beams": 4, "num_return_sequences": 2}
    mask = (ids != PAD).long()
    with_cache = generate(model, ids, attention_mask=mask, **options)
    without = generate(model, ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("mixers", [CASES["hybrid"]], ids=["hybrid"])
def test_sampling_follows_the_seed_and_the_distribution(model, ids):
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2000, "max_new_tokens": 1}
    samples = generate(model, ids[:1], **options)[:, -1]
    frequencies = torch.bincount(samples, minlength=VOCAB) / 2000
    expected = model(ids[:1]).logits[0, -1].detach().softmax(-1)
    assert float((frequencies - expected).abs().sum()) < 0.2
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids[:1], **options)[:, -1], samples)


@pytest.mark.parametrize("seen", [3, 7])  # more new tokens than seen ones, and fewer
def test_continuing_from_a_cache(model, ids, seen):
    expected = greedy_loop(model, ids, 8)[:, 9:]
    half = model(ids[:, :seen]).past_key_values
    for inputs, options in product((ids[:, seen:], ids), ({}, {"attention_mask": torch.ones_like(ids)})):
        cache = half.clone()
        got = generate(model, inputs, past_key_values=cache, **options)
        assert torch.equal(got[:, -8:], expected)
        assert got.shape[1] == inputs.shape[1] + 8
        assert cache.tokens_seen.tolist() == [9 + 7] * 3  # the last token is returned, not read


def test_new_text_that_repeats_the_old_one(model, ids):
    """Taken for all ids so far, unless the mask says that the columns are new ones."""
    seen = ids[:, :3]
    again = torch.cat([seen, ids[:, 3:6]], 1)
    cache = model(seen).past_key_values
    expected = greedy_loop(model, torch.cat([seen, again], 1), 8)[:, 9:]
    mask = torch.ones(3, cache.get_seq_length() + again.shape[1], dtype=torch.long)
    got = generate(model, again, past_key_values=cache.clone(), attention_mask=mask)
    assert torch.equal(got[:, -8:], expected)
    assert torch.equal(generate(model, again, past_key_values=cache), greedy_loop(model, again, 8))


@pytest.mark.parametrize("given", ["keywords", "configuration", "position", "model"])
def test_an_end_of_text_that_also_pads_is_read_after_a_cache(model, ids, given):
    """As in a first call, where no mask can be told from such a token."""
    options = {"pad_token_id": 5, "eos_token_id": [7, 5], "max_new_tokens": 8, "do_sample": False}
    ids[0, 5] = 5
    expected = greedy_loop(model, ids, 8)[:, 9:]
    expected[1:, 1:] = -1  # rows may end; the first token is enough
    args, kwargs = (), {"generation_config": GenerationConfig(**options)}
    if given == "keywords":
        kwargs = options
    elif given == "position":
        args, kwargs = (kwargs["generation_config"],), {}
    elif given == "model":
        model.generation_config, kwargs = kwargs["generation_config"], {}
    cache = model(ids[:, :4]).past_key_values
    got = model.generate(ids[:, 4:], *args, past_key_values=cache, **kwargs)
    assert torch.equal(got[:, 5], expected[:, 0])
    assert cache.tokens_seen.tolist() == [cache.get_seq_length()] * 3


def test_padding_that_a_configuration_names_is_not_read_after_a_cache(model, ids):
    cache = model(ids).past_key_values
    new = torch.cat([torch.full((3, 2), 4), ids[:, :3]], 1)
    config = GenerationConfig(pad_token_id=4, max_new_tokens=8, do_sample=False)
    got = model.generate(new, generation_config=config, past_key_values=cache)
    assert torch.equal(got[:, -8:], greedy_loop(model, torch.cat([ids, ids[:, :3]], 1), 8)[:, -8:])


@pytest.mark.parametrize("seen", [3, 7])  # more new embeddings than columns seen, and fewer
def test_embeddings_after_a_cache(model, ids, seen):
    """All of them so far, or, by the mask, the new ones."""
    expected = greedy_loop(model, ids, 8)[:, 9:]
    cache, embeds = model(ids[:, :seen]).past_key_values, model.get_input_embeddings()(ids)
    new, all_columns = embeds[:, seen:], torch.ones_like(ids)
    for given, mask in ((embeds, None), (embeds, all_columns), (new, all_columns)):
        got = generate(model, None, inputs_embeds=given, attention_mask=mask, past_key_values=cache.clone())
        assert torch.equal(got, expected)
    if seen == 7:
        with pytest.raises(
            ValueError, match=r"inputs_embeds has 2 columns, the cache has read 7: .*\[batch, 9\]"
        ):
            generate(model, None, inputs_embeds=new, past_key_values=cache)


def test_a_start_token_after_a_cache(model, ids):
    cache = model(ids[:1]).past_key_values
    got = generate(model, None, past_key_values=cache, bos_token_id=3)
    expected = greedy_loop(model, torch.cat([ids[:1], torch.tensor([[3]])], 1), 8)
    assert torch.equal(got, expected[:, 9:])


def test_continuing_a_padded_batch_from_a_cache(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    prompt = ids.masked_fill(mask == 0, PAD)
    expected = generate(model, prompt, attention_mask=mask)[:, 9:]
    for inputs, given in ((prompt, mask), (prompt[:, 5:], mask), (prompt[:, 5:], mask[:, 5:])):
        cache = model(prompt[:, :5], attention_mask=mask[:, :5]).past_key_values
        got = generate(model, inputs, attention_mask=given, past_key_values=cache)
        assert torch.equal(got[:, -8:], expected)


def test_generating_on_after_generating(model, ids):
    once = generate(model, ids, max_new_tokens=8)
    first = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, HopeCache)
    branch = cache.clone()
    assert torch.equal(generate(model, first.sequences, max_new_tokens=3, past_key_values=cache), once)
    last = generate(model, first.sequences[:, -1:], max_new_tokens=3, past_key_values=branch)
    assert torch.equal(last[:, 1:], once[:, -3:])


def test_beams_and_samples_from_a_cache_leave_it_alone(model, ids):
    cache = model(ids[:, :6]).past_key_values
    expected = generate(model, ids, num_beams=3)
    assert torch.equal(generate(model, ids, num_beams=3, past_key_values=cache), expected)
    assert (cache.batch_size, cache.get_seq_length()) == (3, 6)


def test_generation_from_embeddings(model, ids):
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, greedy_loop(model, ids, 8)[:, 9:])


def test_end_of_text_stops_a_row(model, ids):
    free = generate(model, ids)
    eos = int(free[0, 11])
    got = generate(model, ids, eos_token_id=eos)
    for row, whole in zip(got[:, 9:].tolist(), free[:, 9:].tolist(), strict=True):
        end = whole.index(eos) + 1 if eos in whole else len(whole)
        assert row[:end] == whole[:end]
        assert all(token == PAD for token in row[end:])


@pytest.mark.parametrize("case", [*RECURRENT, "hybrid", "sliding_window_attention"])
def test_state_stays_the_same_size(case, ids):
    model = small_model(CASES[case])
    sizes = {model(ids.repeat(1, n)).past_key_values.nbytes() for n in (1, 3, 7)}
    cache = model(ids).past_key_values
    generate(model, ids, past_key_values=cache, max_new_tokens=20)
    assert sizes == {cache.nbytes()}


def test_what_does_not_fit_is_refused(model, ids):
    with pytest.raises(ValueError, match="assisted generate is only supported for batch_size = 1"):
        generate(model, ids, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="cache_implementation='static' does not apply"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="must be a HopeCache"):
        generate(model, ids, past_key_values=[1])
    cache = HopeCache(model.config)
    with pytest.raises(ValueError, match="use_cache=False reads all columns again"):
        generate(model, ids, past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="atention_mask"):
        generate(model, ids, atention_mask=torch.ones_like(ids))
