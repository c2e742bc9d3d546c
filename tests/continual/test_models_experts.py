"""Levels on fused MLPs and on the stacked experts of mixtures: found by structure, learned per expert."""

from __future__ import annotations

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.deltas import DOWN, UP
from nested_learning.continual.find import find_targets
from nested_learning.continual.rules import M3Rule, resolve_rule
from nested_learning.optimizers.memory_forms import MomentumMemory
from tests.continual.architectures import EXPERTS, FUSED, VOCAB, tiny
from tests.continual.oracle import Oracle

IDS = torch.randint(3, VOCAB, (33,), generator=torch.Generator().manual_seed(1))


def tiny_experts(name):
    """The plain loop over experts, which knows float64, with every parameter in float64."""
    model = tiny(name, torch.float64)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("name", FUSED)
def test_gate_and_up_in_one_map(name):
    model = tiny(name)
    assert [t.name for t in find_targets(model)] == [
        f"model.layers.{i}.mlp.{which}.weight" for i in (0, 1) for which in ("gate_up_proj", "down_proj")
    ]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "qwen2_moe"])
def test_stacked_experts_are_found(name):
    """[E, out, in] and [E, in, out], in one module or in two; a shared expert and a router beside them."""
    targets = find_targets(tiny(name))
    stacked = [t for t in targets if t.stack]
    inner = EXPERTS[name]["moe_intermediate_size"] if name == "qwen2_moe" else 24
    assert [(t.layer, t.stack, t.features) for t in stacked] == [
        (i, (4,), features) for i in (0, 1) for features in ((16, 2 * inner), (inner, 16))
    ]
    plain = {t.name.split(".", 3)[3] for t in targets if not t.stack}
    shared = {f"mlp.shared_expert.{which}_proj.weight" for which in ("gate", "up", "down")}
    feed_forward = {f"feed_forward.shared_expert.{which}_proj.weight" for which in ("gate", "up", "down")}
    assert plain == {"qwen2_moe": shared, "llama4_text": feed_forward}.get(name, set())


def test_experts_by_name():
    model = tiny("mixtral")
    found = find_targets(model, ["mlp.experts.down_proj"])
    assert [t.name for t in found] == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_deltas_of_experts_against_plain_autograd(name):
    model = tiny_experts(name)
    names = [t.name for t in find_targets(model)]
    oracle = Oracle(model, [(8, 0.1, names, 1.0, None), (16, 0.05, names, None, None)])
    learner = stack_levels(model, levels=[Level(8, 0.1), Level(16, 0.05, clip=None)])
    expected = oracle.observe(IDS[:32])
    torch.testing.assert_close(learner.observe(IDS[:32]), expected, equal_nan=True, rtol=1e-9, atol=1e-9)
    for level in (0, 1):
        for target, delta in learner.memory.diff(level).items():
            torch.testing.assert_close(delta, oracle.deltas[level][target], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_one_pair_of_factors_per_expert(name):
    """The first write moves `up` alone, by the gradient of the expert's matrix on its own directions."""
    model = tiny_experts(name)
    names = [t.name for t in find_targets(model)]
    oracle = Oracle(model, [(8, 1.0, names, None, None)])
    learner = stack_levels(model, levels=[Level(8, 0.1, rank=2, clip=None)])
    oracle.observe(IDS[:8])
    learner.observe(IDS[:8])
    state = learner.memory.rows[0].levels[0]
    for target in find_targets(model):
        gradient = -oracle.deltas[0][target.name]
        gradient = gradient.mT if target.transposed else gradient
        down, up = state.deltas[target.name + DOWN], state.deltas[target.name + UP]
        assert down.shape == (4, 2, target.features[0])
        torch.testing.assert_close(down @ down.mT, torch.eye(2, dtype=torch.float64).expand(4, 2, 2))
        torch.testing.assert_close(up, -0.1 * gradient @ down.mT, rtol=1e-9, atol=1e-12)
    # later both factors move, and the gradient is that at W + up · down
    learner.observe(IDS[8:16])
    merged = tiny_experts(name)
    for target, delta in learner.memory.diff().items():
        merged.get_parameter(target).data += delta
    torch.testing.assert_close(learner.logits(IDS[None]), merged(IDS[None]).logits, rtol=1e-9, atol=1e-9)


def test_an_expert_that_no_token_is_routed_to_learns_nothing():
    model = tiny("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e4
    learner = stack_levels(model, levels=[Level(8, 0.1), Level(32, 0.1, rule="adam"), Level(64, 0.1, rank=2)])
    learner.observe(IDS)
    for level in (0, 1):
        for delta in learner.memory.diff(level).values():
            assert (delta[:3].flatten(1).norm(dim=1) > 0).all()
            assert not delta[3].any()
    sums = learner.memory.rows[0].levels[2].sums
    assert sums
    assert not any(total[3].any() for total in sums.values())


class _RowMomentum:
    """A memory form that mixes the elements of a matrix: momentum, scaled by the norm of the matrix."""

    inner = MomentumMemory()

    def init(self, like):
        return self.inner.init(like)

    def update(self, state, grad):
        return self.inner.update(state, grad)

    def read(self, state):
        found = self.inner.read(state)
        return found / (1 + found.norm())


@pytest.mark.parametrize("rule", ["m3", _RowMomentum()], ids=["m3", "form"])
def test_rules_of_matrices_see_one_expert_at_a_time(rule):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 5, 4, generator=generator) for _ in range(3)]
    stacked, alone = {}, [{} for _ in range(3)]
    for g in grads:
        direction, stacked, factor = resolve_rule(rule).step(stacked, {"w": g}, 0.5)
        for e in range(3):
            one = M3Rule() if rule == "m3" else resolve_rule(rule)
            found, alone[e], scale = one.step(alone[e], {"w": g[e]}, 0.5)
            torch.testing.assert_close(direction["w"][e] * factor, found["w"] * scale)


@pytest.mark.parametrize(
    "rule", ["m3", "adam", "momentum", _RowMomentum()], ids=["m3", "adam", "momentum", "form"]
)
def test_a_memory_file_holds_stacks(tmp_path, rule):
    def learner():
        levels = [
            Level(8, 0.1, rule=rule if isinstance(rule, str) else "gd"),
            Level(16, 0.05, rank=2, rule=rule),
        ]
        return stack_levels(model, levels=levels)

    model = tiny("mixtral")
    first, second = learner(), learner()
    first.observe(IDS[:27])
    first.memory.save(tmp_path / "memory.safetensors")
    second.memory.load(tmp_path / "memory.safetensors")
    assert torch.equal(first.observe(IDS), second.observe(IDS))
    for name, delta in first.memory.diff().items():
        assert torch.equal(delta, second.memory.diff()[name])


def test_the_budget_counts_every_expert():
    learner = stack_levels(tiny("mixtral"), levels=[Level(8, 0.1), Level(16, 0.1, rank=2)])
    budget = learner.info()
    learner.observe(IDS[:32])
    held = learner.memory.rows[0].levels
    assert sum(t.nbytes for state in held for t in state.deltas.values()) == budget.deltas
    assert budget.learned_parameters == 2 * 4 * 3 * 16 * 24


@pytest.mark.parametrize("checkpointing", [False, True])
def test_factors_of_experts_leave_no_trace(checkpointing):
    model = tiny("mixtral")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = stack_levels(model, levels=[Level(8, 0.3, rank=2)], gradient_checkpointing=checkpointing)
    losses = learner.observe(IDS)
    assert torch.equal(losses[9:], stack_levels(model, levels=[Level(8, 0.3, rank=2)]).observe(IDS)[9:])
    with learner.active() as active, pytest.raises(IndexError):
        active(torch.tensor([[VOCAB + 5]]))
    for name, p in model.named_parameters():
        assert isinstance(p, torch.nn.Parameter)
        assert torch.equal(p, before[name])
