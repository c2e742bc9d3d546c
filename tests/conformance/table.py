"""Tests of transformers that cannot apply to Hope, each with the reason; and the tested configurations."""

from __future__ import annotations

from typing import Any

_TOKENS = "cms_update='lm' learns from the loss of the next token: it needs input_ids, not inputs_embeds"
# By configuration, test name (without its parameters) to the reason.
NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "lm": {
        "test_retain_grad_hidden_states_attentions": (
            "a model with cms_update='lm' runs in segments: its hidden states are joined from theirs, and no "
            "gradient passes through the joined ones"
        ),
        "test_inputs_embeds": _TOKENS,
        "test_inputs_embeds_matches_input_ids": _TOKENS,
        "test_generate_from_inputs_embeds": _TOKENS,
        "test_generate_from_random_inputs_embeds": _TOKENS,
        "test_generate_continue_from_inputs_embeds": _TOKENS,
    },
}

# What a file of an older version than the installed transformers fails with, to the reason.
OUTDATED = {"unexpected keyword argument 'grouped_entities'": "pipelines no longer take grouped_entities"}

# Tests that transformers asks of models with attention only, and that hold for every Hope.
FOR_ATTENTION = ("test_left_padding_compatibility",)

# Tests that ask for a kind of transformers' cache (by a name that the installed version may lack); Hope has
# one of its own, and its guesses are taken back all the same.
OWN_CACHE = (
    "test_assisted_decoding_matches_greedy_search",
    "test_assisted_decoding_sample",
    "test_prompt_lookup_decoding_matches_greedy_search",
)

# Tests that compare one call of `generate` with two: in the second, what the first one generated is in the
# prompt, from which a CMS learns in context. They hold where it learns from what it generates too.
LEARNING_FROM_GENERATED = (
    "test_generate_continue_from_past_key_values",
    "test_generate_continue_from_inputs_embeds",
)

# Short chunks, so that the tests' seven tokens cross boundaries.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "self_modifying_titans": {
        "mixer": "self_modifying_titans",
        "mixer_options": {"self_modifying_titans": {"chunk_size": 4}},
    },
    "titans": {"mixer": "titans", "mixer_options": {"titans": {"chunk_size": 4}}},
    "gated_deltanet": {"mixer": "gated_deltanet", "mixer_options": {"gated_deltanet": {"chunk_size": 4}}},
    "mac": {"mixer": "mac", "mixer_options": {"mac": {"segment": 4}}},
    "attention": {"mixer": "attention"},
    "hybrid": {
        "mixer": ["sliding_window_attention", "self_modifying_titans"],
        "mixer_options": {
            "sliding_window_attention": {"window": 4},
            "self_modifying_titans": {"chunk_size": 4},
        },
    },
    "regression": {
        "mixer": "gated_deltanet",
        "mixer_options": {"gated_deltanet": {"chunk_size": 4}},
        "cms_update": "regression",
    },
    "lm": {
        "mixer": "gated_deltanet",
        "mixer_options": {"gated_deltanet": {"chunk_size": 4}},
        "cms_update": "lm",
    },
}
