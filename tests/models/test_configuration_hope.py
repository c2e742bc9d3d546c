"""HopeConfig: round trips, and what it refuses."""

import copy
import json

import pytest
from torch import nn
from transformers import AutoConfig

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.layers import CMSLevel
from nested_learning.layers.registry import MIXERS
from tests.models.small_models import small_config, small_model


def test_round_trip_through_json(tmp_path, mixers):
    config = small_config(mixers, segment_size=7, cms_activation="swiglu", pad_token_id=3, norm_eps=1e-5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HopeConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.fingerprint() == config.fingerprint()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hope"


def test_overrides_when_loading(tmp_path):
    small_config(["attention"]).save_pretrained(tmp_path)
    assert HopeConfig.from_pretrained(tmp_path, segment_size=5).segment_size == 5
    assert AutoConfig.from_pretrained(tmp_path, num_attention_heads=4).num_heads == 4
    with pytest.raises(ValueError, match="hidden_size"):
        HopeConfig.from_pretrained(tmp_path, num_heads=3)
    with pytest.raises(ValueError, match="Did you mean 'segment_size'"):
        HopeConfig.from_pretrained(tmp_path, segmentsize=5)


def test_overrides_when_loading_a_model(tmp_path):
    small_model(["attention"]).save_pretrained(tmp_path)
    assert HopeForCausalLM.from_pretrained(tmp_path, segment_size=5).config.segment_size == 5
    with pytest.raises(TypeError, match="segmentsize"):
        HopeForCausalLM.from_pretrained(tmp_path, segmentsize=5)


def test_defaults_and_names():
    config = HopeConfig()
    assert config.eos_token_id is None
    assert config.layer_mixers == ["self_modifying_titans"] * 4
    assert [level["chunk_size"] for level in config.cms_levels] == [512, 2048]
    assert HopeConfig(num_attention_heads=8).num_heads == 8
    assert HopeConfig().cms_levels is not HopeConfig().cms_levels


def test_what_every_transformers_config_accepts_still_works():
    config = HopeConfig(
        torch_dtype="bfloat16",
        name_or_path="here",
        num_labels=3,
        architectures=["HopeForCausalLM"],
        output_hidden_states=True,
        attn_implementation="sdpa",
    )
    assert str(config.dtype) == "torch.bfloat16"
    assert (config.name_or_path, config.num_labels, config.output_hidden_states) == ("here", 3, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 8}, "Did you mean 'hidden_size'"),
        ({"temperature": 0.7}, "'temperature' is a setting of generation"),
        ({"hidden_size": 30}, r"hidden_size \(30\) must be divisible by num_heads \(4\)"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer"),
        ({"segment_size": 0}, "segment_size must be a positive integer"),
        ({"norm_eps": 0}, "norm_eps must be a positive number"),
        ({"mixer": "atention"}, "Did you mean 'attention'"),
        ({"mixer": ["attention"]}, "mixer lists 1 blocks, num_hidden_layers is 4"),
        ({"mixer": 3}, "a name or a list of names, got 3"),
        ({"mixer": "attention", "mixer_options": {"attention": {"windw": 3}}}, "unknown option of mixer"),
        ({"mixer": "attention", "mixer_options": {"atention": {}}}, "Did you mean 'attention'"),
        ({"mixer": "attention", "mixer_options": {"qk_norm": True}}, "keyed by mixer name"),
        ({"mixer": "attention", "mixer_options": {"titans": {}}}, "'titans', which no block uses"),
        (
            {"mixer": "attention", "mixer_options": {"attention": {"num_kv_heads": 3}}},
            "must divide num_heads",
        ),
        ({"mixer": "sliding_window_attention"}, "missing 1 required positional argument: 'window'"),
        ({"mixer_options": {"self_modifying_titans": {"chunk_size": 0}}}, "chunk"),
        ({"cms_levels": [{"chunk_size": 6}, {"chunk_size": 9}]}, "6 does not divide 9"),
        ({"cms_levels": [{"chunk_size": 6, "activation": "relu"}]}, "Did you mean 'relu2'"),
        (
            {"mixer": "attention", "mixer_options": {"attention": {"rope_theta": "10000"}}},
            "rope_theta must be a positive number, or None for no positions, got '10000'",
        ),
        ({"cms_levels": [{"chunk_size": 2**63}]}, r"cms_levels holds 9223372036854775808; expected whole"),
        (
            {"cms_levels": [{"chunk_size": 4, "clip": 1e300}]},
            r"cms_levels holds 1e\+300; expected at most",
        ),
        (
            {"mixer": "attention", "mixer_options": {"attention": {"norm_eps": "x"}}},
            "norm_eps must be a positive",
        ),
        (
            {"mixer": "attention", "mixer_options": {"attention": {"rope_theta": 10**20}}},
            "mixer_options holds",
        ),
        ({"pad_token_id": "x"}, "pad_token_id must be None or a token id at least 0, got 'x'"),
        ({"eos_token_id": []}, "eos_token_id must be None or a token id, or a list of them"),
        ({"dtype": "x"}, "dtype must be a floating dtype of torch or its name"),
        ({"dtype": []}, "dtype must be a floating dtype"),
        ({"id2label": 4}, "id2label must be"),
        ({"vocab_size": 2**63}, "vocab_size must be a positive integer"),
        ({"cms_levels": [{"chunk_size": 6, "expansion": "2"}]}, "must be a positive number, got '2'"),
        (
            {"cms_levels": [{"chunk_size": 6, "expansion": float("nan")}]},
            "must be a positive number, got nan",
        ),
        ({"cms_levels": [{"chunk_size": 6, "expansion": 1e-3}]}, "no hidden unit at hidden_size 256"),
        ({"cms_levels": [{"chunk_size": 6, "activation": 3}]}, "unknown activation of a CMS level: '3'"),
        ({"cms_levels": 512}, "CMS levels are a list"),
        ({"cms_expansion": 1e-3}, "no hidden unit at hidden_size 256"),
        ({"cms_expansion": float("inf")}, "cms_expansion must be a positive number, got inf"),
        ({"cms_variant": "nestd"}, "Did you mean 'nested'"),
        (
            {"cms_levels": [{"chunk_size": 6, "lr": 0.1}]},
            "lr of a CMS level needs update 'regression' or 'lm'",
        ),
        ({"cms_update": "ml"}, "unknown CMS update 'ml'"),
        ({"cms_nested_gradient": "exakt"}, "Did you mean 'exact'"),
        ({"cms_nested_gradient": "exact"}, "needs variant 'nested'"),
        ({"cms_meta_gradient": "exakt"}, "Did you mean 'exact'"),
        ({"cms_meta_gradient": "exact"}, "belongs to cms_update 'lm', not to 'none'"),
        ({"cms_activation": "swigl"}, "Did you mean 'swiglu'"),
    ],
)
def test_bad_values_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        HopeConfig(**fields)


def test_a_field_set_to_nonsense_later_is_refused_by_the_model():
    config = small_config(["attention"])
    config.num_heads = 3
    with pytest.raises(ValueError, match="divisible by num_heads"):
        HopeForCausalLM(config)


def test_fingerprint_follows_what_shapes_states():
    config = small_config(["attention", "attention"])
    titans = {"self_modifying_titans": {"chunk_size": 32}}
    memories = HopeConfig(mixer_options=titans)
    for options in (
        {"chunk_size": 32.0},
        {"chunk_size": 32, "projection_chunk_size": 32},
        {"chunk_size": 32, "projection_chunk_size": None, "expansion": 1, "momentum": False},
    ):
        spelled = copy.deepcopy(memories)  # the config itself would refuse 32.0
        spelled.mixer_options = {"self_modifying_titans": options}
        assert spelled.fingerprint() == memories.fingerprint()
    for options in ({"chunk_size": 64}, {"chunk_size": 32, "projection_chunk_size": 64}):
        assert HopeConfig(mixer_options={"self_modifying_titans": options}).fingerprint() != (
            memories.fingerprint()
        )
    same = [
        small_config(["attention", "attention"], vocab_size=99, tie_word_embeddings=False),
        small_config(["attention", "attention"], cms_expansion=2, norm_eps=1e-6),
        small_config(
            ["attention", "attention"],
            cms_levels=[CMSLevel(chunk_size=2), {"chunk_size": 8, "activation": None}],
        ),
        small_config(
            ["attention", "attention"],
            mixer_options={"attention": {"num_kv_heads": 1, "rope_theta": 10_000}},
        ),
        small_config(["attention", "attention"], use_cache=False, segment_size=4, initializer_scale=0.1),
        small_config(["attention"], num_hidden_layers=2, mixer="attention"),
        small_config(
            ["attention", "attention"], mixer_options={"attention": {"num_kv_heads": 1, "qk_norm": True}}
        ),
    ]
    other = [
        small_config(["attention", "sliding_window_attention"]),
        small_config(["attention"]),
        small_config(["attention", "attention"], hidden_size=32),
        small_config(["attention", "attention"], mixer_options={}),
        small_config(["attention", "attention"], cms_levels=[{"chunk_size": 2}]),
    ]
    assert {c.fingerprint() for c in same} == {config.fingerprint()}
    assert len({c.fingerprint() for c in [config, *other]}) == 1 + len(other)
    every_head = small_config(["attention"], mixer_options={"attention": {"num_kv_heads": 2}})
    assert every_head.fingerprint() == small_config(["attention"], mixer_options={}).fingerprint()


def test_levels_may_be_objects(tmp_path):
    levels = [CMSLevel(chunk_size=2, expansion=1.0), {"chunk_size": 8, "activation": "gelu"}]
    config = small_config(["attention"], cms_levels=levels)
    assert config.cms_levels == [{"chunk_size": 2, "expansion": 1.0}, levels[1]]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).cms_levels == config.cms_levels


def test_layers_are_built_once_for_a_check_that_is_repeated_and_values_are_still_looked_at(monkeypatch):
    built = []

    def factory(hidden_size: int, num_heads: int, size: object = 1) -> nn.Module:
        built.append(size)
        if size is True or size == 7:
            raise ValueError("not that size")
        return nn.Identity()

    monkeypatch.setitem(MIXERS, "counted", factory)
    config = small_config(["counted", "counted"])
    for size in (1, 1.0, [1], (1,)):  # equal or nearly, but not the same
        config.mixer_options = {"counted": {"size": size}}
        config.validate()
        config.validate()
    assert built == [1, 1, 1.0, [1], (1,)]  # the first by default
    for size in (True, 7, 7):
        config.mixer_options = {"counted": {"size": size}}
        with pytest.raises(ValueError, match="not that size"):
            config.validate()
    assert built[-3:] == [True, 7, 7]
    config.mixer_options = {"counted": {"size": {1, 2}}}
    for _ in range(2):
        config.validate()
    assert built[-2:] == [{1, 2}] * 2  # nothing of JSON: it could have changed
