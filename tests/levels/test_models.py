"""Which levels a model has: literal expectations, and state bytes against what a running model holds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModel,
    BarkSemanticConfig,
    BarkSemanticModel,
    BertConfig,
    CTRLConfig,
    DogeConfig,
    FunnelConfig,
    FunnelModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Qwen3NextConfig,
    T5Config,
)

from nested_learning import (
    Attention,
    ContinuumMemorySystem,
    HopeForCausalLM,
    SelfModifyingTitans,
    continual,
    preset,
)
from nested_learning.continual import stack_levels
from nested_learning.layers import LowRankSelfModifyingMLP, SelfModifyingLinear, SlidingWindowAttention
from nested_learning.layers.memory import MemoryLayer
from nested_learning.layers.registry import MIXERS, build_mixer
from nested_learning.levels import every_steps, levels
from nested_learning.models import HopeConfig
from nested_learning.optimizers import M3, MultiFrequency
from tests.continual.tiny_models import random_ids, tiny_model

MIXER = "self_modifying_titans"


def outline(system):
    """[(frequency, {name: parameters}), …] of all levels."""
    return [
        (str(level.frequency), {component.name: component.parameters for component in level.components})
        for level in system.levels
    ]


def passes(system, kind):
    """{(source, target)} of one kind."""
    return {
        (source, target)
        for transfer in system.transfers
        if transfer.kind == kind
        for source in transfer.sources
        for target in transfer.targets
    }


@pytest.fixture
def hope():
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_heads=2,
            mixer=MIXER,
            mixer_options={MIXER: {"chunk_size": 4, "projection_chunk_size": 8}},
            cms_levels=[{"chunk_size": 16}, {"chunk_size": 64}],
        )
    )


# Per layer of the fixture: 5 memories of 2 heads with W1, W2 of 4 × 4 each; in, gate and out projections,
# 24 convolutions of width 4, gates from 4 to 2 heads, a norm of 4; two blocks of 8 → 16 → 8 with a norm.
INITIAL, PROJECTIONS, BLOCK = 5 * 2 * 2 * 16, 24 * 8 + 64 + 64 + 24 * 4 + 2 * (4 * 2 + 2) + 4, 2 * 8 * 16 + 8
HOPE_WEIGHTS = {
    "embedding (also the head)": 88,
    "norms": 3 * 8,
    f"{MIXER}: initial memories": 2 * INITIAL,
    f"{MIXER}: projections and gates": 2 * PROJECTIONS,
    "CMS level 1 (chunk 16)": 2 * BLOCK,
    "CMS level 2 (chunk 64)": 2 * BLOCK,
}
GENERATING = {f"{MIXER}: M_{name}": 0 for name in ("k", "v", "eta", "alpha")}


def test_hope_with_adamw(hope):
    system = levels(hope, torch.optim.AdamW(hope.parameters()))
    assert outline(system) == [
        ("every token", {f"{MIXER}: M_memory": 0}),
        ("every 8 tokens", GENERATING),
        ("every optimizer step", {"AdamW: moments": 0}),
        ("every optimizer step", HOPE_WEIGHTS),
    ]
    assert system.parameters == hope.num_parameters()
    assert system[f"{MIXER}: M_memory"].where == ("model.layers.0.mixer", "model.layers.1.mixer")
    assert "anchor set every 4 tokens" in system[f"{MIXER}: M_memory"].rule


def test_what_passes_in_hope(hope):
    system = levels(hope, torch.optim.AdamW(hope.parameters()))
    memories = {*GENERATING, f"{MIXER}: M_memory"}
    initial, projections = f"{MIXER}: initial memories", f"{MIXER}: projections and gates"
    assert passes(system, "initial state") == {(initial, memory) for memory in memories}
    assert passes(system, "backpropagation") == {
        (memory, weights) for memory in memories for weights in (initial, projections)
    }
    assert passes(system, "generation of context") == (
        {(maker, memory) for maker in (projections, *GENERATING) for memory in memories}
        | {(weights, "AdamW: moments") for weights in HOPE_WEIGHTS}
    )
    after = {"embedding (also the head)", "norms", "CMS level 1 (chunk 16)", "CMS level 2 (chunk 64)"}
    assert passes(system, "conditioning on output") == (
        {("AdamW: moments", weights) for weights in HOPE_WEIGHTS}
        | {(f"{MIXER}: M_memory", weights) for weights in after - {"embedding (also the head)"}}
    )


def test_hope_without_an_optimizer_still_learns_in_context(hope):
    system = levels(hope)
    assert outline(system) == [
        ("every token", {f"{MIXER}: M_memory": 0}),
        ("every 8 tokens", GENERATING),
        ("never", HOPE_WEIGHTS),
    ]
    assert passes(system, "backpropagation") == set()
    assert {component.kind for component in system.components} == {"memory", "weights"}


def test_cms_levels_step_at_their_own_frequency(hope):
    slow = [p for name, p in hope.named_parameters() if "cms.blocks.1" in name]
    ids = {id(p) for p in slow}
    fast = [p for p in hope.parameters() if id(p) not in ids]
    optimizer = MultiFrequency(
        [{"params": fast}, {"params": slow, "period": 4}], inner=lambda groups: torch.optim.AdamW(groups)
    )
    in_fast = {name: count for name, count in HOPE_WEIGHTS.items() if name != "CMS level 2 (chunk 64)"}
    system = levels(hope, optimizer)
    assert outline(system)[2:] == [
        (
            "every optimizer step",
            {"MultiFrequency: moments, every optimizer step": 0},
        ),
        ("every optimizer step", {**{"MultiFrequency: sum of 4 gradients": 0}, **in_fast}),
        ("every 4 optimizer steps", {"MultiFrequency: moments, every 4 optimizer steps": 0}),
        ("every 4 optimizer steps", {"CMS level 2 (chunk 64)": 2 * BLOCK}),
    ]
    assert passes(system, "generation of context") >= {
        ("CMS level 2 (chunk 64)", "MultiFrequency: sum of 4 gradients")
    }
    assert ("CMS level 2 (chunk 64)", "MultiFrequency: moments, every 4 optimizer steps") not in passes(
        system, "generation of context"
    )


def test_cms_that_learns_in_context():
    cms = ContinuumMemorySystem(8, [{"chunk_size": 16}, {"chunk_size": 64}], update="lm")
    assert outline(levels(cms, torch.optim.SGD(cms.parameters()))) == [
        ("every 16 tokens", {"CMS level 1 (chunk 16) in context": 0}),
        ("every 64 tokens", {"CMS level 2 (chunk 64) in context": 0}),
        ("every optimizer step", {"CMS level 1 (chunk 16)": BLOCK, "CMS level 2 (chunk 64)": BLOCK}),
    ]


def test_cms_levels_say_how_they_write():
    options = [{"chunk_size": 4, "rule": "adam", "retention": 0.5}, {"chunk_size": 8, "lr": 0.0}]
    system = levels(ContinuumMemorySystem(8, options, update="regression"))
    rule = system["CMS level 1 (chunk 4) in context"].rule
    assert rule == "Adam's memory on the sum over the chunk (eq 71); clipped to norm 1; " + (
        "retention 0.5 towards the initial state"
    )
    assert "CMS level 2 (chunk 8) in context" not in {c.name for c in system.components}  # static


def test_nested_cms_passes_initial_states_from_level_to_level():
    cms = ContinuumMemorySystem(8, [{"chunk_size": 4}, {"chunk_size": 8}], variant="nested", update="lm")
    passed = [t for t in levels(cms).transfers if t.kind == "initial state" and "in context" in t.sources[0]]
    assert [(t.sources, t.targets) for t in passed] == [
        (("CMS level 2 (chunk 8) in context",), ("CMS level 1 (chunk 4) in context",))
    ]
    assert "every 8 tokens" in passed[0].what


@pytest.mark.parametrize("nesterov", [True, False])
def test_m3_says_what_its_step_reads(nesterov):
    model = torch.nn.Linear(4, 4, bias=False)
    system = levels(model, M3(model.parameters(), lr=0.1, alpha=0.3, nesterov=nesterov))
    rule = next(c.rule for c in system.components if c.kind == "weights")
    assert ("NewtonSchulz(β₁M₁ + " in rule) == nesterov
    assert "0.3 O₂" in rule


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("read", ["token", "chunk"])
def test_memory_layer_state_is_what_a_running_layer_holds(momentum, read):
    layer = SelfModifyingTitans(
        8, num_heads=2, chunk_size=4, projection_chunk_size=2, momentum=momentum, read=read
    )
    system = levels(layer)
    memories = [component for component in system.components if component.kind == "memory"]
    _, state = layer(torch.randn(1, 7, 8))  # not at a boundary: the anchor and the weights differ
    besides = state.conv_tail.nbytes + state.position.nbytes
    assert sum(component.state_bytes for component in memories) == state.nbytes() - besides
    assert {component.state_per for component in memories} == {"sequence"}
    memory = system["self_modifying_titans: M_memory"].frequency
    assert str(memory) == ("every token" if read == "token" else "every 4 tokens")
    assert str(system["self_modifying_titans: M_k"].frequency) == "every 2 tokens"
    if momentum and read == "token":  # equally often, but the memory needs the momentum's state
        assert outline(system)[:2] == [
            ("every token", {"self_modifying_titans: momentum of the writes": 0}),
            ("every token", {"self_modifying_titans: M_memory": 0}),
        ]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_described(mixer):
    """The state of each that is one memory layer is found; all are composed of parts that are."""
    options = {"window": 4} if mixer == "sliding_window_attention" else {}
    layer = build_mixer(mixer, 16, 2, options)
    system = levels(layer, torch.optim.AdamW(layer.parameters()))
    in_context = [component for component in system.components if component.kind == "memory"]
    assert in_context
    assert system.levels[0].frequency.rank < every_steps().rank
    assert system.parameters == sum(p.numel() for p in layer.parameters())
    if isinstance(layer, MemoryLayer):
        _, state = layer(torch.randn(1, 7, 16))
        tail = 0 if state.conv_tail is None else state.conv_tail.nbytes
        found = sum(component.state_bytes for component in in_context)
        assert found == state.nbytes() - tail - state.position.nbytes


def test_titans_as_context():
    layer = build_mixer("mac", 16, 2, {"segment": 4})
    system = levels(layer)
    _, state = layer(torch.randn(1, 7, 16))
    attention = system["softmax attention (segment 4)"]
    assert attention.state_bytes == state.key.nbytes + state.value.nbytes
    assert [str(level.frequency) for level in system.levels] == [
        "∞ (non-parametric)",
        "every token",
        "every token",
        "never",
    ]
    assert passes(system, "generation of context") >= {
        ("titans: M_memory", attention.name),
        (attention.name, "titans: M_memory"),
    }


def test_an_embedding_shared_by_embeddings_is_no_head():
    config = T5Config(d_model=16, d_kv=4, num_heads=4, num_layers=1, d_ff=8, vocab_size=32)
    system = levels(AutoModel.from_config(config))
    assert system["embedding"].parameters == 32 * 16
    assert len(system["softmax attention"].where) == 3  # encoder, decoder, from one to the other


def test_layers_that_rewrite_their_weights():
    linear = SelfModifyingLinear(6, 5)
    system = levels(linear, torch.optim.SGD(linear.parameters(), lr=0.1))
    _, state = linear(torch.randn(1, 3, 6))
    memory = system["self-modifying weight"]
    assert (str(memory.frequency), memory.state_bytes) == ("every token", state.nbytes())
    assert system["self-modifying weight: initial"].parameters == 30
    assert passes(system, "initial state") == {("self-modifying weight: initial", "self-modifying weight")}
    mlp = LowRankSelfModifyingMLP(6)
    system = levels(mlp)
    _, state = mlp(torch.randn(1, 3, 6))
    assert system["context of the low-rank change"].state_bytes == state.nbytes()
    assert passes(system, "generation of weights") == {
        ("context of the low-rank change", "MLPs that a memory changes")
    }


def test_attention_state_is_what_a_running_layer_holds():
    layer = Attention(16, num_heads=4, num_kv_heads=2)
    (component,) = levels(layer).levels[0].components
    _, state = layer(torch.randn(1, 9, 16))
    assert (component.name, component.frequency.unit) == ("softmax attention", "infinite")
    assert (component.state_per, 9 * component.state_bytes) == ("token", state.nbytes())
    layer = SlidingWindowAttention(16, num_heads=4, window=5)
    (component,) = levels(layer).levels[0].components
    _, state = layer(torch.randn(1, 9, 16))
    assert (component.name, component.state_per) == ("softmax attention (window 5)", "sequence")
    assert (
        component.state_bytes == sum(t[:, :, -4:].contiguous().nbytes for t in (state.key, state.value)) + 32
    )


def test_hope_attention():
    system = levels(HopeForCausalLM(preset("hope-attention-tiny", num_hidden_layers=1, hidden_size=32)))
    assert [str(level.frequency) for level in system.levels] == ["∞ (non-parametric)", "never"]
    assert [component.name for component in system.levels[0].components] == ["softmax attention"]


# transformers -----------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
LLAMA = LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=2)


def test_llama_with_adamw():
    model = LlamaForCausalLM(LLAMA)
    system = levels(model, torch.optim.AdamW(model.parameters()))
    assert outline(system) == [
        ("∞ (non-parametric)", {"softmax attention": 0}),
        ("every optimizer step", {"AdamW: moments": 0}),
        (
            "every optimizer step",
            {
                "embedding": 32 * 16,
                "attention projections": 2 * (2 * 16 * 16 + 2 * 8 * 16),
                "MLPs": 2 * 3 * 16 * 24,
                "norms": 5 * 16,
                "head": 32 * 16,
            },
        ),
    ]
    assert system["attention projections"].needs == ("AdamW: moments",)
    assert passes(system, "conditioning on output") >= {
        ("softmax attention", weights) for weights in ("MLPs", "norms", "head")
    }
    assert ("softmax attention", "embedding") not in passes(system, "conditioning on output")
    assert passes(system, "backpropagation") == {("softmax attention", "attention projections")}


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=32),
        GPTNeoXConfig(**SMALL, intermediate_size=24),
        Phi3Config(**SMALL, intermediate_size=24, num_key_value_heads=2, pad_token_id=0),
        CTRLConfig(n_embd=16, n_layer=2, n_head=4, dff=24, vocab_size=32),
        DogeConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, keep_window_size=4, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_the_cache_of_any_attention_is_found(config):
    """Independent of names: the cache of a running model."""
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    system = levels(model)
    assert 5 * system["softmax attention"].state_bytes == held
    assert len(system["softmax attention"].where) == 2
    assert system.parameters == model.num_parameters()


def test_attention_with_a_window_and_without_a_cache():
    mistral = AutoModel.from_config(
        MistralConfig(**SMALL, intermediate_size=24, num_key_value_heads=2, sliding_window=4)
    ).eval()
    with torch.no_grad():
        cache = mistral(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert levels(mistral)["softmax attention (window 4)"].state_bytes == held
    bert = AutoModel.from_config(BertConfig(**SMALL, intermediate_size=24))
    assert levels(bert)["softmax attention"].where == (
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
    )
    mixed = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)
    assert len(levels(mixed)["softmax attention"].where) == 2


def test_attention_by_other_names():
    sizes = {"hidden_size": 16, "num_heads": 4, "num_layers": 2, "block_size": 16}
    bark = BarkSemanticModel(BarkSemanticConfig(input_vocab_size=32, output_vocab_size=32, **sizes)).eval()
    with torch.no_grad():
        cache = bark(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 5 * levels(bark)["softmax attention"].state_bytes == held
    funnel = FunnelConfig(vocab_size=32, block_sizes=[2], d_model=16, n_head=4, d_head=4, d_inner=24)
    with torch.device("meta"):  # it has no cache
        system = levels(FunnelModel(funnel))
    assert system["softmax attention"].where[:2] == (
        "encoder.blocks.0.0.attention",
        "encoder.blocks.0.1.attention",
    )


BOUNDED = {
    "mistral": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 24,
    },
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window": 4, "num_experts": 2},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "sliding_window_size": 4,
        "swa_head_dim": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "moe_intermediate_size": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    },
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_attention_whose_cache_is_bounded_in_one_of_two_layers(kind):
    sizes = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **{**sizes, **BOUNDED[kind]})).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    bounded, whole = (layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    system = levels(model)
    window = system["softmax attention (window 4)"]
    assert (window.state_bytes, window.state_per) == (bounded, "sequence")
    seen = "the tokens of its chunk of 4" if kind == "llama4_text" else "the last 4 tokens"
    assert window.context == f"{seen}, as keys and values"
    assert 9 * system["softmax attention"].state_bytes == whole


def test_a_configuration_per_layer_is_that_of_the_layer():
    config = MistralConfig(
        **SMALL, intermediate_size=24, sliding_window=None, per_layer_config={1: {"sliding_window": 4}}
    )
    with torch.device("meta"):
        system = levels(AutoModel.from_config(config))
    assert system["softmax attention"].where == ("layers.0.self_attn",)
    assert system["softmax attention (window 4)"].where == ("layers.1.self_attn",)


def test_linear_attention_is_not_taken_for_softmax_attention():
    config = Qwen3NextConfig(
        **SMALL,
        intermediate_size=24,
        num_key_value_heads=2,
        head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert levels(model)["softmax attention"].where == ("layers.1.self_attn",)


# torch ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


RESNET = {"convolutions": 224 + 4 * 576, "norms": 4 * 16, "linear layers": 90}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resnet_with_sgd(momentum):
    model = ResNet()
    system = levels(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum))
    weights = ("every optimizer step", {"running statistics": 0, **RESNET})
    momenta = [("every optimizer step", {"SGD: momentum": 0})] if momentum else []
    assert outline(system) == [*momenta, weights]
    assert system["running statistics"].state_bytes == sum(b.nbytes for b in model.buffers())
    assert outline(levels(model)) == [("never", {"running statistics": 0, **RESNET})]


def test_frozen_and_forgotten_parameters_never_change():
    model = ResNet()
    model.stem.requires_grad_(False)
    trained = [*model.stem.parameters(), *model.blocks.parameters()]
    system = levels(model, torch.optim.SGD(trained, lr=0.1, momentum=0.9))
    assert outline(system) == [
        ("every optimizer step", {"SGD: momentum": 0}),
        (
            "every optimizer step",
            {
                "convolutions, every optimizer step": 4 * 576,
                "running statistics": 0,
                "norms": 64,
            },
        ),
        ("never", {"convolutions, never": 224, "linear layers": 90}),
    ]
    assert "frozen" in system["convolutions, never"].rule
    assert "no optimizer" in system["linear layers"].rule
    assert system["SGD: momentum"].state_bytes == 4 * (4 * 576 + 64)


def test_recurrent_layers_and_plain_mlps():
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 5, num_layers=2),
            "mlp": nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)),
        }
    )
    system = levels(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [component.name for component in system.levels[0].components] == ["recurrent state"]
    _, (h, c) = model["lstm"](torch.randn(4, 3))
    assert system["recurrent state"].state_bytes == h.nbytes + c.nbytes
    assert system["MLPs"].parameters == 5 * 7 + 7 + 7 * 2 + 2


def test_shared_modules_count_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleList([shared, shared])
    assert levels(model).parameters == 20
    assert levels(nn.Identity()).levels == ()


class TestLearner:
    """A pretrained model with levels: `nested_learning.continual`."""

    def learner(self):
        return stack_levels(
            tiny_model(layers=4),
            levels=[
                continual.Level(4, 0.1, rule="adam"),
                continual.Level(16, 0.2, layers=[2, 3], gate_quantile=0.3, decay=0.1),
                continual.Level(64, 0.0, layers=[1, 2], consolidate=0.5),
            ],
        )

    def test_levels(self):
        one, three = 3 * 16 * 24, [3 * 16 * 24] * 3
        system = levels(self.learner())
        assert system.name == "LlamaForCausalLM that keeps learning"
        assert outline(system) == [
            ("∞ (non-parametric)", {"softmax attention": 0}),
            ("every 4 tokens", {"Δ1 (chunk 4)": 0}),
            ("every 16 tokens", {"Δ2 (chunk 16)": 0}),
            ("every 64 tokens", {"Δ3 (chunk 64)": 0}),
            (
                "never",
                {
                    "weights under Δ1": one,
                    "weights under Δ1, Δ3": three[0],
                    "weights under Δ1, Δ2, Δ3": three[1],
                    "weights under Δ1, Δ2": three[2],
                    "embedding": 61 * 16,
                    "attention projections": 4 * (2 * 16 * 16 + 2 * 16 * 8),
                    "norms": 9 * 16,
                    "head": 61 * 16,
                },
            ),
        ]
        assert system["Δ2 (chunk 16)"].rule == (
            "gd, lr 0.2 (eq 71); clipped to norm 1; where the loss exceeds the running quantile 0.3; "
            "decay 0.1 towards the base"
        )
        assert system["Δ3 (chunk 64)"].rule == "writes nothing itself (lr 0)"

    def test_what_passes(self):
        system = levels(self.learner())
        assert passes(system, "generation of weights") == {("Δ2 (chunk 16)", "Δ3 (chunk 64)")}
        names = [f"Δ{n} (chunk {size})" for n, size in ((1, 4), (2, 16), (3, 64))]
        learning = names[:2]
        assert passes(system, "conditioning on weights") == {
            (source, target) for target in learning for source in names if source != target
        }
        assert ("weights under Δ1, Δ3", "Δ3 (chunk 64)") in passes(system, "initial state")
        assert ("softmax attention", "weights under Δ1") in passes(system, "conditioning on output")

    def test_state_bytes_are_what_it_holds(self):
        slower = [continual.Level(16, 0.2, layers=[2, 3]), continual.Level(64, 0.1, rank=2, rule="momentum")]
        learner = stack_levels(tiny_model(layers=4), levels=[continual.Level(4, 0.1, rule="adam"), *slower])
        learner.observe(random_ids(127))  # all have written, and the sums of the slower ones have begun
        rows = [state.tensors() for state in learner.memory.rows[0].levels]
        held = [sum(t.nbytes for t in tensors if t.ndim) for tensors in rows]  # without counters
        system = levels(learner)
        assert [component.state_bytes for component in system.components if component.name[0] == "Δ"] == held

    def test_with_an_optimizer_of_the_base(self):
        learner = self.learner()
        system = levels(learner, torch.optim.AdamW(learner.model.parameters()))
        assert str(system["weights under Δ1"].frequency) == "every optimizer step"
        assert ("AdamW: moments", "weights under Δ1") in passes(system, "conditioning on output")


class NoOperations(TorchDispatchMode):
    """Refuses every operation on a tensor: on a weight in shards each one waits for all processes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        assert not taken, f"{func} on a tensor of a model that is only described"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_no_value_is_read(mixer):
    """The main process alone describes a model whose weights lie in shards."""
    options = {mixer: {"window": 4}} if mixer == "sliding_window_attention" else {}
    config = HopeConfig(
        hidden_size=8, num_hidden_layers=1, num_heads=2, mixer=mixer, mixer_options=options, vocab_size=11
    )
    model = HopeForCausalLM(config)
    optimizers = [torch.optim.AdamW(model.parameters()), M3([p for p in model.parameters() if p.ndim == 2])]
    for optimizer in (None, *optimizers):
        with NoOperations():
            assert levels(model, optimizer).levels


def test_no_value_of_a_learner_is_read():
    two = [continual.Level(8, 0.1), continual.Level(16, 0.1, rule="adam")]
    learner = stack_levels(tiny_model(), levels=two)
    with NoOperations():
        assert levels(learner).levels
