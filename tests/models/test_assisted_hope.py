"""Guesses in generation, by lookup in the prompt or by another model, and columns that a cache takes back."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nested_learning import HopeCache
from nested_learning.memory.state import held_bytes
from tests.models.small_models import VOCAB, small_model

EXACT = {"rtol": 0, "atol": 1e-12}
LEARNING = {"cms_levels": [{"chunk_size": 2}, {"chunk_size": 4, "lr": 0.1}]}


def noisy_model(mixers, seed=0, **overrides):
    """With larger embeddings: an untrained model would otherwise repeat one token whatever it has read."""
    model = small_model(mixers, seed, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def model(mixers):
    return noisy_model(mixers)


@pytest.fixture
def prompt():
    """A phrase three times, so that looking a guess up finds one, right or wrong."""
    numbers = torch.Generator().manual_seed(3)
    phrase = torch.randint(0, VOCAB - 1, (1, 5), generator=numbers)
    return torch.cat([phrase.repeat(1, 3), torch.randint(0, VOCAB - 1, (1, 2), generator=numbers)], 1)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).double().eval()


def greedy(model, ids, steps=12, **options):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **options)


def columns_of_calls(model):
    """The number of columns of each call of the model from here on."""
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    return lengths


GUESSES = {
    "lookup": lambda model: {"prompt_lookup_num_tokens": 4},
    "itself": lambda model: {"assistant_model": model},
    "other": lambda model: {"assistant_model": noisy_model(["titans"], seed=5)},
    "foreign": lambda model: {"assistant_model": llama()},
}


def test_guesses_change_nothing(model, prompt):
    expected = greedy(model, prompt)
    for guess in ("lookup", "other"):
        assert torch.equal(greedy(model, prompt, **GUESSES[guess](model)), expected)


@pytest.mark.parametrize("learn_from_generated", [False, True])
@pytest.mark.parametrize("update", ["regression", "lm"])
def test_guesses_change_nothing_where_the_cms_learns(update, learn_from_generated, prompt):
    model = noisy_model(["titans", "sliding_window_attention"], cms_update=update, **LEARNING)
    options = {"learn_from_generated": learn_from_generated}
    expected = greedy(model, prompt, **options)
    for guess in ("lookup", "itself"):
        assert torch.equal(greedy(model, prompt, **options, **GUESSES[guess](model)), expected)


def test_right_guesses_save_calls_and_the_prompt_is_read_once(prompt):
    model = noisy_model(["titans"])
    lengths = columns_of_calls(model)
    expected = greedy(model, prompt)
    plain = list(lengths)
    lengths.clear()
    guessed = greedy(model, prompt, assistant_model=model)
    assert torch.equal(guessed, expected)
    lengths.clear()
    repeating = torch.cat([guessed, guessed], 1)[:, : guessed.shape[1] + prompt.shape[1]]
    greedy(model, repeating, prompt_lookup_num_tokens=4)
    assert lengths[0] == repeating.shape[1] - 1
    assert all(length <= 5 for length in lengths[1:])
    assert len(plain) == 12


@pytest.mark.parametrize("target", ["hope", "foreign"])
def test_every_guess_of_the_target_itself_is_right(target, prompt):
    """The assistant guesses five at a time, so the target reads all tokens in a fraction of the calls."""
    model = noisy_model(["titans"]) if target == "hope" else llama()
    if target == "foreign":
        assistant = noisy_model(["self_modifying_titans"])
        assert torch.equal(greedy(model, prompt, assistant_model=assistant), greedy(model, prompt))
        return
    assistant = noisy_model(["titans"])
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    lengths = columns_of_calls(model)
    greedy(model, prompt, assistant_model=assistant)
    assert lengths == [prompt.shape[1] - 1, 6, 6]


def test_samples_with_guesses(prompt):
    model = noisy_model(["titans"])
    for guess in ("lookup", "other", "foreign"):
        torch.manual_seed(0)
        options = {"max_new_tokens": 6, "do_sample": True, **GUESSES[guess](model)}
        assert model.generate(prompt, **options).shape[1] == prompt.shape[1] + 6
        options.update(top_k=1)  # the most probable token alone is left
        assert torch.equal(model.generate(prompt, **options), greedy(model, prompt, 6))


@pytest.mark.parametrize("way", ["new_tokens", "full_ids", "padded"])
def test_guesses_after_a_cache(prompt, way):
    model, seen = noisy_model(["titans", "sliding_window_attention"]), 7
    mask = torch.ones_like(prompt)
    if way == "padded":
        mask[:, :3] = 0
    options = {"attention_mask": mask} if way == "padded" else {}
    expected = greedy(model, prompt, **options)[:, -12:]
    inputs = prompt if way == "full_ids" else prompt[:, seen:]
    for guess in ("lookup", "itself"):
        cache = model(prompt[:, :seen], attention_mask=mask[:, :seen]).past_key_values
        got = greedy(model, inputs, past_key_values=cache, **options, **GUESSES[guess](model))
        assert torch.equal(got[:, -12:], expected)
        assert cache.get_seq_length() == prompt.shape[1] + 11  # the last token is returned, not read
        assert cache.recording is None


def test_hidden_states_of_the_prompt_with_guesses(prompt):
    model = noisy_model(["titans"])
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = greedy(model, prompt, **options)
    got = greedy(model, prompt, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(got.hidden_states[0], expected.hidden_states[0], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("pieces", [[9], [4, 5], [1, 3, 1, 1, 3]])
@pytest.mark.parametrize("removed", [0, 1, 4, 9])
def test_a_cropped_cache_is_that_of_the_columns_that_stay(ids, pieces, removed):
    model = noisy_model(["self_modifying_titans", "attention"])
    cache = model(ids[:, :4]).past_key_values
    cache.activate_past_recording()
    before = cache.nbytes()
    for number, piece in enumerate(ids[:, 4:].split(pieces, dim=1)):
        mask = torch.ones_like(piece) if number % 2 else None  # both kinds of calls
        model(piece, attention_mask=mask, past_key_values=cache)
    assert held_bytes(t for s in cache.recording.before.states.values() for t in s.tensors()) == before
    cache.crop(-removed)
    stay = 13 - removed
    assert cache.get_seq_length() == stay
    assert cache.tokens_seen.tolist() == [stay] * 3
    again = torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    whole = torch.cat([ids[:, :stay], again], 1)
    assert cache.is_prefix_of(whole)
    got = model(again, past_key_values=cache).logits
    torch.testing.assert_close(got, model(whole).logits[:, stay:], **EXACT)
    cache.crop(-2)  # from the last crop on, what was read can be taken back again
    assert cache.get_seq_length() == stay + 3


def test_what_cannot_be_taken_back(prompt):
    model = noisy_model(["titans"])
    cache = model(prompt).past_key_values
    with pytest.raises(ValueError, match=r"here from 0 to 0, got -2.*activate_past_recording"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(prompt[:, :3], past_key_values=cache)
    for removed in (2, -4):
        with pytest.raises(ValueError, match=f"here from -3 to 0, got {removed}"):
            cache.crop(removed)
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(ValueError, match="here from 0 to 0, got -1"):
        cache.crop(-1)
    assert isinstance(cache, HopeCache)
    assert cache.get_seq_length() == prompt.shape[1] + 3


REFUSED = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "high"},
    "group beam search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beam search": {"num_beams": 4, "force_words_ids": [[3]]},
}


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
@pytest.mark.parametrize("way", REFUSED)
def test_ways_that_come_from_the_hub_are_refused(way, trust, prompt):
    model = noisy_model(["titans"])
    with pytest.raises(ValueError, match=rf"Hope does not run code from the hub.*{way}.*use greedy"):
        greedy(model, prompt, **REFUSED[way], **trust)


def test_guesses_that_hope_does_not_have_are_refused(prompt):
    model = noisy_model(["titans"])
    with pytest.raises(ValueError, match="assistant_early_exit is no way for Hope to guess"):
        greedy(model, prompt, assistant_early_exit=1)
    with pytest.raises(ValueError, match="use_mtp is no way for Hope to guess"):
        greedy(model, prompt, use_mtp=True)


def test_continuous_batching_is_refused(prompt):
    model = noisy_model(["titans"])
    for call in (
        lambda: model.generate_batch(prompt.tolist(), max_new_tokens=2),
        lambda: greedy(model, prompt, cache_implementation="paged"),
        model.init_continuous_batching,
    ):
        with pytest.raises(ValueError, match=r"continuous batching .* pages key-value caches"):
            call()
