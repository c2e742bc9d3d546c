"""Finding the MLPs by structure, and what is refused before anything is learned."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, BloomConfig, PhiConfig

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.find import find_targets
from tests.continual.tiny_models import CONFIGS, random_ids, tiny_model

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SMALL = {"vocab_size": 61, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2}
EXPECTED = {
    "llama": ("model.layers", GATED),
    "qwen2": ("model.layers", GATED),
    "qwen3": ("model.layers", GATED),
    "mistral": ("model.layers", GATED),
    "gpt2": ("transformer.h", ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": ("gpt_neox.layers", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    "opt": ("model.decoder.layers", ("fc1", "fc2")),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_families(family):
    prefix, names = EXPECTED[family]
    targets = find_targets(tiny_model(family, layers=3))
    expected = [(f"{prefix}.{i}.{name}.weight", i) for i in range(3) for name in names]
    assert [(target.name, target.layer) for target in targets] == expected
    parameters = dict(tiny_model(family, layers=3).named_parameters())
    assert all(target.name in parameters for target in targets)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PhiConfig(num_hidden_layers=2, num_attention_heads=2, **SMALL), ("model.layers", ("fc1", "fc2"))),
        (BloomConfig(n_layer=2, n_head=2, **SMALL), ("transformer.h", ("dense_h_to_4h", "dense_4h_to_h"))),
    ],
)
def test_relatives_that_are_nowhere_named(config, expected):
    prefix, names = expected
    model = AutoModelForCausalLM.from_config(config)
    assert [t.name for t in find_targets(model)] == [
        f"{prefix}.{i}.mlp.{name}.weight" for i in (0, 1) for name in names
    ]
    learner = stack_levels(model, levels=[Level(4, 0.1)])
    assert learner.observe(random_ids(9))[1:].isfinite().all()
    assert len(learner.memory.diff()) == 4


def test_a_width_equal_to_the_hidden_one_is_an_mlp_too():
    """Shapes alone do not tell such an MLP from the attention's maps."""
    model = tiny_model()
    for layer in model.model.layers:
        for name, inputs, outputs in (("gate_proj", 16, 16), ("up_proj", 16, 16), ("down_proj", 16, 16)):
            setattr(layer.mlp, name, nn.Linear(inputs, outputs, bias=False))
    assert [t.name for t in find_targets(model)] == [t.name for t in find_targets(tiny_model())]


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", range(7)), ("last third", (4, 5, 6)), ([0, -1], (0, 6)), ((3,), (3,))]
)
def test_layers(layers, expected):
    assert Level(8, 0.1, layers=layers).layer_indices(7) == tuple(expected)


class TestRefused:
    def test_mlps_that_are_not_linear_maps(self):
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp = nn.Identity()
        with pytest.raises(ValueError, match=r"no MLP.*modules=\[…\].*self_attn\.q_proj"):
            stack_levels(model, levels=[Level(8, 0.1)])
        learner = stack_levels(model, levels=[Level(8, 0.1)], modules=["self_attn.o_proj"])
        learner.observe(random_ids(8))
        assert len(learner.memory.diff()) == 2

    def test_unknown_module(self):
        with pytest.raises(ValueError, match=r"unknown linear module 'mlp.up'.*Did you mean 'mlp.up_proj'"):
            find_targets(tiny_model(), ["mlp.up"])
        with pytest.raises(ValueError, match="no layer number"):
            find_targets(tiny_model(), ["lm_head"])

    def test_no_causal_language_model(self):
        bert = BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **SMALL))
        for model in (bert, nn.Linear(2, 2)):
            with pytest.raises(ValueError, match="expected a transformers causal language model"):
                stack_levels(model, levels=[Level(8, 0.1)])

    @pytest.mark.parametrize("sizes", [(8, 8), (8, 4), (4, 16, 8)])
    def test_chunk_sizes_that_do_not_increase(self, sizes):
        with pytest.raises(ValueError, match=r"must increase.*Did you mean"):
            stack_levels(tiny_model(), levels=[Level(size, 0.1) for size in sizes])

    @pytest.mark.parametrize(
        "settings",
        [
            {"chunk_size": 1},
            {"chunk_size": 2.5},
            {"lr": -1.0},
            {"lr": float("nan")},
            {"clip": 0.0},
            {"rank": 0},
            {"decay": 1.5},
            {"gate_quantile": 2.0},
            {"gate": 1.0, "gate_quantile": 0.5},
            {"rank": 2, "consolidate": 0.5},
            {"rank": 2, "consolidate": 0.5, "lr": 0.0, "learn_down": False},
            {"rule": "sdg"},
            {"rule": object()},
        ],
    )
    def test_settings_of_a_level(self, settings):
        with pytest.raises(ValueError):  # noqa: PT011 - each says what it expects
            Level(**{"chunk_size": 8, "lr": 0.1, **settings})

    @pytest.mark.parametrize("layers", [[7], [0, 0], [0, -7], [], "first", [0.5], [True]])
    def test_layers(self, layers):
        with pytest.raises(ValueError, match="layers"):
            Level(8, 0.1, layers=layers).layer_indices(7)

    def test_levels(self):
        for levels in ([], [8], [Level(4, 0.1, consolidate=0.5)]):
            with pytest.raises(ValueError, match="level"):
                stack_levels(tiny_model(), levels=levels)
        fast, slow = Level(4, 0.1), Level(8, 0.0, consolidate=0.5, rank=2)
        for levels in ([fast, slow], [fast, Level(6, 0.1), slow]):
            with pytest.raises(ValueError, match="has rank 2, but the level that it takes over from"):
                stack_levels(tiny_model(), levels=levels)
        with pytest.raises(ValueError, match="rank 17 is larger"):
            stack_levels(tiny_model(), levels=[Level(4, 0.1, rank=17)])

    @pytest.mark.parametrize(
        "options", [{"window": 65}, {"segment": 1}, {"overlap": 0}, {"window": 8, "overlap": 1}]
    )
    def test_reading(self, options):
        with pytest.raises(ValueError, match=r"window|segment"):
            stack_levels(tiny_model("gpt2"), levels=[Level(8, 0.1)], **options)

    def test_layers_without_attention(self):
        model = tiny_model()
        model.config.layer_types = ["full_attention", "compressed_sparse_attention"]
        with pytest.raises(ValueError, match="layers of type compressed_sparse_attention, full_attention"):
            stack_levels(model, levels=[Level(8, 0.1)])


def test_a_chunk_longer_than_the_model_reads_is_read_in_segments():
    learner = stack_levels(tiny_model("gpt2"), levels=[Level(150, 0.1)])
    surprise = learner.observe(random_ids(300))
    assert surprise[1:].isfinite().all()
    assert [write.position for write in learner.writes] == [150, 300]
