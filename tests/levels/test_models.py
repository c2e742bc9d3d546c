"""Which levels a model has: literal expectations, and state bytes against what a running model holds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModel,
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
from tests.continual.tiny_models import tiny_model
from tests.levels.parts import outline, passes

MIXER = "self_modifying_titans"


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
