"""Copies of a model and of its cache, and a model in threads."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nested_learning import HopeConfig, HopeForCausalLM

WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
MODELS = [
    ("self_modifying_titans", "lm"),
    ("mac", "none"),
    ("gated_deltanet", "regression"),
    ("attention", "lm"),
]


def model_of(mixer, update):
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        mixer=mixer,
        cms_levels=[{"chunk_size": 4}, {"chunk_size": 8}],
        cms_update=update,
    )
    return HopeForCausalLM(config).eval()


def ids(*shape):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("mixer", "update"), MODELS)
@pytest.mark.parametrize("graph", [False, True])
def test_a_copy_of_model_and_cache_goes_on_bit_by_bit(mixer, update, way, graph):
    model, x = model_of(mixer, update), ids(2, 21)
    with torch.set_grad_enabled(graph):
        cache = model(x[:, :13], use_cache=True).past_key_values
    twin, its_cache = way((model, cache))
    alone = way(cache)
    with torch.no_grad():
        expected = model(x[:, 13:], past_key_values=cache).logits
        assert torch.equal(twin(x[:, 13:], past_key_values=its_cache).logits, expected)
        assert torch.equal(model(x[:, 13:], past_key_values=alone).logits, expected)
    assert alone.nbytes() == cache.nbytes()  # what the states share stays shared


def test_a_deep_copy_has_no_graph_and_memory_of_its_own():
    model = model_of("self_modifying_titans", "none")
    cache = model(ids(1, 9), use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    for name, state in cache.states.items():
        for a, b in zip(state.tensors(), twin.states[name].tensors(), strict=True):
            assert torch.equal(a, b)
            assert not b.requires_grad
            assert a.data_ptr() != b.data_ptr() or not a.numel()


@pytest.mark.parametrize(("mixer", "update"), MODELS)
def test_a_model_in_threads_equals_one_call_after_the_other(mixer, update):
    model = model_of(mixer, update)
    texts = [ids(2, 11 + n) for n in range(6)]

    def work(x):
        model.zero_grad()
        return model(x).logits.detach()

    one_by_one = [work(x) for x in texts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, texts))
    for a, b in zip(one_by_one, together, strict=True):
        assert torch.equal(a, b)


def test_a_cache_that_read_many_pieces_is_copied():
    """A frame of the stack for each call would be too many."""
    model = model_of("deltanet", "none")
    cache, calls = None, sys.getrecursionlimit() // 2
    with torch.no_grad():
        for token in range(calls):
            x = torch.tensor([[token % 8]])
            cache = model(x, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert copied.get_seq_length() == calls
