"""Generation through torch.compile: one graph for all positions, equal numbers, where it steps aside."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from transformers import CompileConfig, TextStreamer

from nested_learning import HopeCache
from nested_learning.layers.registry import MIXERS
from tests.models.small_models import HYBRID, MORE_OPTIONS, OPTIONS, VOCAB, small_model

OTHERS = [name for name in MIXERS if name not in (*OPTIONS, *MORE_OPTIONS, "memory")]
# Those with attention over a window grow until it is full: the whole model's graph is made for each length.
GROWING = ("attention", "sliding_window_attention", "mag", "mal")
RECURRENT = [name for name in MIXERS if name not in (*GROWING, "memory")]
FAST = ("sliding_window_attention", "attention")
LENGTHS = (3, 8, 13)  # of prompts: within a chunk and a window, at a boundary, beyond
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LEARNING = {
    "regression": {"cms_update": "regression"},
    "nested": {"cms_update": "regression", "cms_variant": "nested"},
    "lm": {"cms_update": "lm"},
}


def slow_unless(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield Counter()
    torch.compiler.reset()


def config_of(backend, **options) -> CompileConfig:
    config = CompileConfig(backend=backend, **options)
    config._compile_all_devices = True
    return config


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read_by_token(model, call, prompt: int, tokens: int = 12, apart: bool = False):
    """Logits of the tokens after a prompt, one call each, and the cache after them.

    With `apart` the cache holds what fields share more than once, as after a compiled call.
    """
    ids = ids_of(2, prompt + tokens)
    cache = model(ids[:, :prompt], use_cache=True).past_key_values
    cache = cache._with(lambda state: state.unshared()) if apart else cache
    logits = [call(ids[:, [i]], past_key_values=cache).logits for i in range(prompt, prompt + tokens)]
    return torch.cat(logits, 1), cache


def same_cache(actual: HopeCache, expected: HopeCache) -> None:
    assert actual.get_seq_length() == expected.get_seq_length()
    assert torch.equal(actual.prefix_hash, expected.prefix_hash)
    assert torch.equal(actual.tokens_seen, expected.tokens_seen)
    assert actual.states.keys() == expected.states.keys()
    for name, state in expected.states.items():
        found, wanted = actual.states[name].to_tensors(), state.to_tensors()
        assert found.keys() == wanted.keys()
        for field, tensor in wanted.items():
            torch.testing.assert_close(found[field], tensor, **EXACT)


def same(model, call, apart: bool = False) -> None:
    """`call` reads tokens after prompts of several lengths as the model does."""
    for length in LENGTHS:
        expected, before = read_by_token(model, model, length)
        actual, cache = read_by_token(model, call, length, apart=apart)
        torch.testing.assert_close(actual, expected, **EXACT)
        same_cache(cache, before)


@pytest.mark.parametrize("mixer", slow_unless(FAST, [*OPTIONS, *MORE_OPTIONS, *OTHERS]))
def test_one_graph_for_all_positions_prompts_and_layers(mixer, graphs):
    model = small_model([mixer, mixer])
    same(model, model.get_compiled_call(config_of(graphs, fullgraph=True)))
    assert graphs.count == 1


@pytest.mark.slow
def test_a_hybrid_has_a_graph_for_each_kind_of_block(graphs):
    model = small_model(HYBRID)
    same(model, model.get_compiled_call(config_of(graphs, fullgraph=True)))
    assert graphs.count == 2


@pytest.mark.parametrize("mixer", slow_unless(["titans"], RECURRENT))
def test_one_graph_of_the_whole_model(mixer, graphs):
    model = small_model([mixer])
    same(model, torch.compile(model, backend=graphs, fullgraph=True, dynamic=False), apart=True)
    assert graphs.count == 1


@pytest.mark.parametrize("cms", slow_unless(["regression"], LEARNING))
def test_a_cms_that_learns(cms, graphs):
    model = small_model(["linear_attention"], **LEARNING[cms])
    same(model, model.get_compiled_call(config_of(graphs)))
    assert graphs.count == 1


def test_blocks_without_an_mlp(graphs):
    model = small_model(["titans", "titans"], cms_levels=[])
    same(model, model.get_compiled_call(config_of(graphs, fullgraph=True)))
    assert graphs.count == 1


# generate --------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "samples": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 2},
    "guesses": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens(way, graphs, capsys):
    model = small_model(["sliding_window_attention"])
    ids = ids_of(1 if way == "guesses" else 3, 6)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :4] = 0
    options = {"max_new_tokens": 14, "attention_mask": mask, "pad_token_id": 0, **WAYS[way]}
    found = []
    for config in (None, config_of(graphs)):
        torch.manual_seed(0)
        found.append(model.generate(ids, compile_config=config, **options))
    assert torch.equal(*found)
    assert graphs.count == (
        1 if way in ("greedy", "samples") else 0
    )  # others read tokens by calls of their own


def test_a_stream_and_a_state_on_disk(graphs, tmp_path):
    """A compiled run's cache is saved and goes on plainly, and the other way round."""
    model = small_model(["sliding_window_attention"])
    config = config_of(graphs)
    ids = ids_of(1, 2)
    whole = model.generate(ids, max_new_tokens=16, pad_token_id=0)

    class Pieces(TextStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            pass

    for first, then in ((config, None), (None, config)):
        cache, pieces = HopeCache(model.config), Pieces()
        options = {"past_key_values": cache, "pad_token_id": 0, "streamer": pieces}
        begun = model.generate(ids, max_new_tokens=1, compile_config=first, **options)
        begun = model.generate(begun, max_new_tokens=6, compile_config=first, **options)
        cache.save(tmp_path / "cache")
        options["past_key_values"] = HopeCache.load(tmp_path / "cache", model)
        rest = model.generate(begun, max_new_tokens=9, compile_config=then, **options)
        assert torch.equal(rest, whole)
        assert pieces.ids[-9:] == whole[0, -9:].tolist()


def test_without_a_compiler_it_warns_once_and_answers():
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    torch.compiler.reset()
    model = small_model(HYBRID)  # two kinds of blocks, one warning
    expected = model.generate(ids_of(1, 5), max_new_tokens=8, pad_token_id=0)
    config = config_of(backend)
    with pytest.warns(RuntimeWarning, match="no compiler here") as warned:
        found = model.generate(ids_of(1, 5), max_new_tokens=8, pad_token_id=0, compile_config=config)
    assert torch.equal(found, expected)
    assert len([w for w in warned if "no compiler" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate(ids_of(1, 5), max_new_tokens=8, pad_token_id=0, compile_config=config)


def test_what_reads_more_than_a_token_or_wants_gradients_is_not_compiled(graphs):
    model = small_model(["sliding_window_attention"])
    call = model.get_compiled_call(config_of(graphs))
    cache = call(ids_of(2, 5)).past_key_values
    call(ids_of(2, 1), past_key_values=cache).logits.sum().backward()
    with torch.no_grad():
        call(ids_of(2, 3), past_key_values=cache.detach())
        begins = torch.zeros(2, 1, dtype=torch.long)  # a new document
        found = call(ids_of(2, 1), past_key_values=cache.detach(), position_ids=begins).logits
        alone = model(ids_of(2, 1)).logits
    torch.testing.assert_close(found, alone, **EXACT)
    assert graphs.count == 0


def scale_output(module, args, output, factor):
    return (output[0] * factor, *output[1:])


def test_hooks_of_one_kind_may_hold_what_differs(graphs):
    """By layer, and from one call to the next: what a hook does is more than that there is one."""
    model = small_model(["sliding_window_attention", "sliding_window_attention"])
    call = model.get_compiled_call(config_of(graphs))
    for factors in ((1.0, 3.0), (0.5, 0.5), ()):
        hooks = [
            layer.mixer.register_forward_hook(partial(scale_output, factor=factor))
            for layer, factor in zip(model.model.layers, factors, strict=False)
        ]
        (expected, _), (found, _) = read_by_token(model, model, 3, 3), read_by_token(model, call, 3, 3)
        torch.testing.assert_close(found, expected, **EXACT)
        for hook in hooks:
            hook.remove()
    assert graphs.count > 0


def test_nothing_compiles_by_itself(graphs):
    model = small_model(["sliding_window_attention"])
    options = {"past_key_values": HopeCache(model.config)}
    assert not model._valid_auto_compile_criteria(options, model.generation_config)


def test_a_copy_compiles_anew(graphs):
    model = small_model(["sliding_window_attention"])
    call = model.get_compiled_call(config_of("eager"))
    read_by_token(model, call, 3, 2)
    assert model.get_compiled_call(config_of("eager")).keywords == call.keywords  # kept
    expected, _ = read_by_token(model, model, 3, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, _ = read_by_token(other, other.get_compiled_call(config_of("eager")), 3, 2)
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.slow
def test_compiled_code(tmp_path):
    """Inductor's code, in float32, of the mixer with the most operations."""
    torch.compiler.reset()
    model = small_model(["self_modifying_titans"]).float()
    call = model.get_compiled_call(config_of("inductor"))
    expected, before = read_by_token(model, model, 8)
    actual, cache = read_by_token(model, call, 8)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for name, state in before.states.items():
        for a, b in zip(cache.states[name].tensors(), state.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
