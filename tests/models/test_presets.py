"""Presets: sizes, equal budgets, overrides."""

import pytest
import torch

from nested_learning import PRESETS, HopeForCausalLM, preset


def count(config) -> int:
    with torch.device("meta"):
        return HopeForCausalLM(config).num_parameters()


def test_tiny_presets_have_equal_parameter_counts():
    counts = {name: count(preset(name)) for name in PRESETS if name.endswith("-tiny")}
    assert 0.95e6 < counts["hope-tiny"] < 1.15e6
    for name, parameters in counts.items():
        assert abs(parameters / counts["hope-tiny"] - 1) < 0.02, (name, counts)


@pytest.mark.parametrize(
    ("name", "total"), [("hope-340m", 340e6), ("hope-760m", 760e6), ("hope-1.3b", 1.3e9)]
)
def test_paper_sizes(name, total):
    config = preset(name)
    assert abs(count(config) / total - 1) < 0.05
    assert config.hidden_size // config.num_heads == 64
    assert config.vocab_size == 32_000


def test_tiny_preset_is_for_bytes():
    config = preset("hope-tiny")
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (258, 257, None)
    assert config.mixer_options == {"self_modifying_titans": {"chunk_size": 32}}
    assert [level["chunk_size"] for level in config.cms_levels] == [512, 2048]


@pytest.mark.parametrize("name", PRESETS)
def test_overrides(name):
    config = preset(name, num_hidden_layers=2, hidden_size=64, num_heads=2)
    assert (config.num_hidden_layers, config.hidden_size, config.num_heads) == (2, 64, 2)
    assert preset(name).num_hidden_layers != 2  # presets do not share state


@pytest.mark.parametrize(
    ("name", "overrides", "options"),
    [
        (
            "hope-tiny",
            {"mixer_options": {"self_modifying_titans": {"momentum": True}}},
            {"self_modifying_titans": {"chunk_size": 32, "momentum": True}},
        ),
        (
            "hope-tiny",
            {"mixer_options": {"self_modifying_titans": {"chunk_size": 16}}},
            {"self_modifying_titans": {"chunk_size": 16}},
        ),
        ("hope-tiny", {"mixer": "titans"}, {"titans": {"chunk_size": 32}}),
        ("hope-tiny", {"mixer": "attention"}, {}),
        (
            "hope-tiny",
            {
                "mixer": ["sliding_window_attention", "titans"],
                "num_hidden_layers": 2,
                "mixer_options": {"sliding_window_attention": {"window": 8}},
            },
            {"titans": {"chunk_size": 32}, "sliding_window_attention": {"window": 8}},
        ),
        ("transformer-tiny", {}, {}),
        ("hope-340m", {"mixer": "titans"}, {"titans": {"chunk_size": 64}}),
    ],
)
def test_mixer_options_are_merged_per_mixer(name, overrides, options):
    assert preset(name, **overrides).mixer_options == options


def test_wrong_overrides_reach_the_configurations_own_errors():
    for overrides, message in (
        ({"mixer": 3}, "a name or a list of names, got 3"),
        ({"mixer": "titns"}, "Did you mean 'titans'"),
        ({"mixer_options": [1]}, "keyed by mixer name"),
        ({"mixer_options": {"self_modifying_titans": 3}}, "keyed by mixer name"),
        ({"mixer_options": {"titans": {}}}, "'titans', which no block uses"),
    ):
        with pytest.raises(ValueError, match=message):
            preset("hope-tiny", **overrides)


def test_baselines_take_overrides_of_their_mixers():
    config = preset("mag-tiny", mixer_options={"mag": {"window": 8}})
    assert config.mixer_options == {"mag": {"window": 8, "memory_options": {"chunk_size": 32}}}
    assert preset("moneta-tiny").mixer_options == {"moneta": {"chunk_size": 32}}
    assert preset("mag-tiny", mixer="attention").mixer_options == {}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'hope-tiny'"):
        preset("hope-tinny")
    with pytest.raises(ValueError, match="Did you mean 'hidden_size'"):
        preset("hope-tiny", hiden_size=3)
