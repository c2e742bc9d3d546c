"""Gates, consolidation, decay, low rank, precision, checkpointing, and writes that are dropped."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.writing import DeltaWriter
from nested_learning.optimizers import AdaGradMemory, AdamMemory, GDMemory, MomentumMemory
from tests.continual.architectures import tiny
from tests.continual.tiny_models import CONFIGS, random_ids, tiny_model
from tests.damage import read_file, write_checked

MODEL = tiny_model()


def learner_on(*levels, model=MODEL, **options):
    return stack_levels(model, levels=levels, **options)


def outcomes(learner, level=0):
    return [write.outcome for write in learner.writes if write.level == level]


class TestLearnMask:
    def test_all_true_changes_nothing(self):
        ids = random_ids(2, 20)
        plain, masked = (learner_on(Level(8, 0.3), Level(16, 0.2)) for _ in range(2))
        plain.observe(ids)
        masked.observe(ids, learn_mask=torch.ones(2, 20, dtype=torch.bool))
        for row in range(2):
            for name, delta in plain.memory.diff(row=row).items():
                assert torch.equal(masked.memory.diff(row=row)[name], delta)

    def test_a_chunk_without_a_token_to_learn_is_left_out(self):
        """Not a step of the rule either, which would go on by its momentum."""
        ids = random_ids(24)
        learner, twin = (learner_on(Level(8, 0.3, rule="momentum", decay=0.5)) for _ in range(2))
        learner.observe(ids[:8])
        before = learner.memory.diff()
        learner.observe(ids[8:], learn_mask=[0] * 8 + [1] * 8)
        assert outcomes(learner) == ["masked", "written"]
        learner.memory.restore(twin.memory.snapshot())
        learner.observe(ids[:8])
        learner.observe(ids[8:16], learn_mask=[False] * 8)
        assert {name: d.tolist() for name, d in learner.memory.diff().items()} == {
            name: d.tolist() for name, d in before.items()
        }

    def test_the_first_token_of_a_chunk_is_no_pair_of_it(self):
        learner = learner_on(Level(8, 0.3))
        learner.observe(random_ids(8), learn_mask=[1] + [0] * 7)
        assert outcomes(learner) == ["masked"]
        assert learner.memory.is_empty is False
        assert not learner.memory.diff()

    def test_rows_have_masks_of_their_own(self):
        ids = random_ids(2, 8)
        learner = learner_on(Level(8, 0.3))
        learner.observe(list(ids), learn_mask=[[1] * 8, [0] * 8])
        assert [write.outcome for write in learner.writes] == ["written", "masked"]

    @pytest.mark.parametrize(
        ("given", "mask", "message"),
        [
            (random_ids(4), [1, 0, 1], r"shape of the ids, rows of \[\(4,\)\], got \[\(3,\)\]"),
            (random_ids(2, 4), torch.ones(4), "shape of the ids"),
            (random_ids(2, 4), [[1] * 4], "shape of the ids"),
            (random_ids(4), [0, 1, 2, 0], "must be True or 1.*got 2"),
            (random_ids(4), [0.0, float("nan"), 1.0, 0.0], "must be True or 1"),
            (random_ids(4), [[1], [1, 2]], "shape of the ids"),
            (random_ids(4), [None, 1, 0, 1], "shape of the ids"),
            ("a text", [1, 1], "give ids, not text"),
        ],
    )
    def test_refused(self, given, mask, message):
        learner = stack_levels(MODEL, lambda text, **_: {"input_ids": [1, 2]}, levels=[Level(4, 0.1)])
        with pytest.raises(ValueError, match=message):
            learner.observe(given, learn_mask=mask)
        assert learner.memory.is_empty


class TestGate:
    def test_threshold(self):
        ids = random_ids(40)
        losses = learner_on(Level(8, 0.0)).observe(ids).unflatten(0, (5, 8))[:, 1:].mean(dim=1)
        threshold = float(losses.median())
        learner = learner_on(Level(8, 1e-9, gate=threshold))
        learner.observe(ids)
        assert outcomes(learner) == ["written" if loss > threshold else "gated" for loss in losses]
        assert set(outcomes(learner)) == {"written", "gated"}

    def test_a_gated_chunk_changes_nothing(self):
        open_, closed = learner_on(Level(8, 0.3)), learner_on(Level(8, 0.3, gate=100.0, decay=0.5))
        ids = random_ids(24)
        open_.observe(ids)
        closed.observe(ids)
        assert open_.memory.diff()
        assert not closed.memory.diff()
        assert outcomes(closed) == ["gated"] * 3

    def test_running_quantile(self):
        ids = random_ids(160)
        losses = learner_on(Level(8, 0.0)).observe(ids).unflatten(0, (20, 8))[:, 1:].mean(dim=1)
        learner = learner_on(Level(8, 1e-9, gate_quantile=0.6))
        learner.observe(ids)
        expected = ["written"] + [
            "written" if losses[i] > torch.quantile(losses[:i], 0.6) else "gated" for i in range(1, 20)
        ]
        assert outcomes(learner) == expected

    def test_slow_levels_gate_on_the_loss_of_their_own_chunk(self):
        learner = learner_on(Level(4, 0.0), Level(8, 1e-9, gate=0.0))
        losses = learner.observe(random_ids(16))
        writes = [write for write in learner.writes if write.level == 1]
        for write, chunk in zip(writes, losses.split(8), strict=True):
            assert write.loss == pytest.approx(chunk[1:].mean().item())


class TestConsolidation:
    def test_moves_the_share_and_leaves_the_model_as_it_was(self):
        plain = learner_on(Level(4, 0.3), Level(8, 0.0))
        moving = learner_on(Level(4, 0.3), Level(8, 0.0, consolidate=0.25))
        ids = random_ids(8)
        plain.observe(ids)
        moving.observe(ids)
        for name, delta in plain.memory.diff(level=0).items():
            torch.testing.assert_close(moving.memory.diff(level=0)[name], 0.75 * delta)
            torch.testing.assert_close(moving.memory.diff(level=1)[name], 0.25 * delta)
        probe = random_ids(1, 12, seed=5)
        torch.testing.assert_close(moving.logits(probe), plain.logits(probe))

    def test_acts_where_layers_overlap(self):
        learner = learner_on(Level(4, 0.3, layers=[0, 1]), Level(8, 0.0, layers=[1], consolidate=1.0))
        learner.observe(random_ids(8))
        fast, slow = learner.memory.diff(level=0), learner.memory.diff(level=1)
        assert {name.split(".")[2] for name in slow} == {"1"}
        for name, delta in fast.items():
            assert bool(delta.any()) == (".0." in name)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_from_a_low_rank_level(self, family):
        model = tiny_model(family)
        plain = learner_on(Level(4, 0.3, rank=2), Level(8, 0.0), model=model)
        moving = learner_on(Level(4, 0.3, rank=2), Level(8, 0.0, consolidate=0.5), model=model)
        ids = random_ids(8)
        plain.observe(ids)
        moving.observe(ids)
        for name, delta in plain.memory.diff().items():
            torch.testing.assert_close(moving.memory.diff()[name], delta)
            torch.testing.assert_close(moving.memory.diff(level=1)[name], 0.5 * delta)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
    @pytest.mark.parametrize(("rank", "down"), [(2, True), (3, False), (5, True)])
    def test_at_a_rank_by_the_best_approximation(self, family, rank, down, monkeypatch):
        """Against the definition in full matrices, whose part beyond the rank is cut off by their own SVD."""
        fast = Level(4, 0.9, rank=3, learn_down=down, decay=0.1)
        model = tiny_model(family) if family in CONFIGS else tiny(family)
        close = 1e-7 if family in CONFIGS else 1e-3  # stacks of experts have float32 alone
        learner = learner_on(fast, Level(8, 0.0, consolidate=0.4, rank=rank), model=model)
        take_over, moved = DeltaWriter.take_over, []

        def full(writer, state):
            deltas = {target: writer.full_delta(state, target) for target in writer.targets}
            return {target.name: delta for target, delta in deltas.items() if delta is not None}

        def spied(slow, state, fast, fast_state):
            before = full(fast, fast_state), full(slow, state)
            found = take_over(slow, state, fast, fast_state)
            moved.append((*before, full(fast, fast_state), full(slow, state)))
            return found

        monkeypatch.setattr(DeltaWriter, "take_over", spied)
        learner.observe(random_ids(40))
        truncated = [write.truncation for write in learner.writes if write.level == 1]
        assert len(moved) == len(truncated) == 5
        for (fast_before, slow_before, fast_after, slow_after), found in zip(moved, truncated, strict=True):
            lost = whole = 0.0
            for name, delta in fast_before.items():
                torch.testing.assert_close(fast_after[name], 0.6 * delta)
                exact = slow_before.get(name, 0) + 0.4 * delta
                u, values, v = torch.linalg.svd(exact, full_matrices=False)
                values[..., rank:] = 0
                kept = u * values[..., None, :] @ v
                torch.testing.assert_close(slow_after[name], kept, rtol=close, atol=1e-3 * close)
                lost += (exact - kept).square().sum()
                whole += exact.square().sum()
            assert found == pytest.approx((lost / whole).sqrt().item(), abs=close)
        assert (found > 1e-3) == (rank < 3 or down)  # where `down` is fixed, both share it


def test_decay_pulls_towards_the_pretrained_weights():
    learner = learner_on(Level(4, 0.3), Level(8, 0.2, decay=0.4))
    reference = learner_on(Level(4, 0.3), Level(8, 0.2))
    ids = random_ids(16)
    for either in (learner, reference):
        either.observe(ids[:8])
    before = learner.memory.diff(level=1)
    for either in (learner, reference):
        either.observe(ids[8:])
    after, expected = learner.memory.diff(level=1), reference.memory.diff(level=1)
    for name, delta in before.items():  # same first write, so only the decay of the second one differs
        torch.testing.assert_close(after[name], expected[name] - 0.4 * delta)


class TestLowRank:
    @pytest.mark.parametrize("family", CONFIGS)
    def test_first_write_is_the_projected_full_step(self, family):
        """Δ = −lr · G Pᵀ with P the projection on the rows of `down`: exact from autograd's full gradient."""
        model = tiny_model(family)
        ids = random_ids(6)
        learner = learner_on(Level(6, 0.5, rank=3, clip=None), model=model)
        full = learner_on(Level(6, 0.5, clip=None), model=model)
        learner.observe(ids)
        full.observe(ids)
        state = learner.memory.rows[0].levels[0]
        for name, step in full.memory.diff().items():
            down = state.deltas[f"{name}:down"]  # [r, in], its rows orthonormal
            torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64))
            expected = (step.T if family == "gpt2" else step) @ down.T @ down
            found = learner.memory.diff()[name]
            torch.testing.assert_close(found.T if family == "gpt2" else found, expected)

    def test_later_writes_are_autograd_on_the_factors(self):
        model = tiny_model()
        level = Level(6, 0.5, rank=2, clip=None, layers=[1])
        learner = learner_on(level, model=model, modules=["mlp.up_proj"])
        learner.observe(random_ids(6))
        name = "model.layers.1.mlp.up_proj.weight"
        factors = learner.memory.rows[0].levels[0].deltas
        down, up = (factors[name + end].clone().requires_grad_() for end in (":down", ":up"))
        learner.memory.rows[0].clear_context()
        ids = random_ids(6, seed=1)
        learner.observe(ids)
        weights = {name: model.get_parameter(name) + up @ down}
        logits = torch.func.functional_call(model, weights, (ids[None],)).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        grads = torch.autograd.grad(loss, (down, up))
        after = learner.memory.rows[0].levels[0].deltas
        torch.testing.assert_close(after[name + ":down"], down - 0.5 * grads[0])
        torch.testing.assert_close(after[name + ":up"], up - 0.5 * grads[1])

    def test_beside_a_full_level_on_the_same_weights(self):
        learner = learner_on(Level(4, 0.3), Level(8, 0.3, rank=2))
        learner.observe(random_ids(16))
        probe = random_ids(1, 12, seed=5)
        model = tiny_model()
        with torch.no_grad():
            for name, delta in learner.memory.diff().items():
                model.get_parameter(name).add_(delta)
        torch.testing.assert_close(learner.logits(probe), model(probe).logits)


@pytest.mark.parametrize(
    ("memory", "kept"),
    [
        (GDMemory(), 0),
        (MomentumMemory(0.5), 1),
        (AdamMemory(betas=(0.5, 0.9)), 2),
        (AdamMemory(betas=(0.0, 0.9)), 1),
        (AdaGradMemory(), 1),
    ],
)
@pytest.mark.parametrize("form", [{}, {"rank": 2}, {"sparse": 0.2}])
def test_a_memory_form_as_the_rule(memory, kept, form):
    class Spy:
        """The same memory, which counts, and all of whose state is kept."""

        written = 0

        def init(self, like):
            return memory.init(like)

        def update(self, state, grad):
            Spy.written += 1
            return memory.update(state, grad)

        def read(self, state):
            return memory.read(state)

    direct, spied = (learner_on(Level(4, 0.1, rule=rule, **form)) for rule in (memory, Spy()))
    spied_before = Spy.written  # that a sparse level's rule acts by row is tried on a small matrix
    for learner in (direct, spied):
        learner.observe(random_ids(12))
    state, whole = (learner.memory.rows[0].levels[0] for learner in (direct, spied))
    assert Spy.written - spied_before == 3 * len(state.deltas)
    for name, delta in direct.memory.diff().items():
        assert torch.equal(delta, spied.memory.diff()[name])
    # what no write looks at is not kept, all else is the same, and the budget has counted it
    found = {slot: {f: t for f, t in own.items() if t.shape[-2:] == state.deltas[slot].shape[-2:]}
             for slot, own in state.rule.items()}  # fmt: skip
    assert all(len(own) == kept for own in found.values())
    assert bool(found) == bool(kept)
    for slot, own in state.rule.items():
        assert all(torch.equal(t, whole.rule[slot][field]) for field, t in own.items())
    if "sparse" not in form:
        assert direct.info().rules == sum(t.nbytes for own in found.values() for t in own.values())


def test_a_file_with_what_rules_no_longer_keep_loads(tmp_path):
    """Until 0.1 the state of a rule without momentum had its last gradient."""
    rule, path = AdamMemory(betas=(0.0, 0.99)), tmp_path / "memory.safetensors"
    learner, other, right = (learner_on(Level(4, 0.1, rule=rule), Level(8, 0.1)) for _ in range(3))
    learner.observe(random_ids(10))
    learner.memory.save(path)
    right.memory.load(path)
    tensors, metadata = read_file(path)
    for name in [name for name in tensors if "/rule/square/" in name]:
        tensors[name.replace("square", "mean")] = torch.randn_like(tensors[name])
    rows = json.loads(metadata["rows"])
    assert rows[0]["levels"][0]["rule"] == ["square", "step"]
    rows[0]["levels"][0]["rule"] = ["mean", "square", "step"]
    write_checked(path, tensors, {**metadata, "rows": json.dumps(rows)})
    other.memory.load(path)
    ids = random_ids(12, seed=1)
    assert torch.equal(other.observe(ids), right.observe(ids))


class TestNotFinite:
    def broken_model(self):
        model = tiny_model()
        with torch.no_grad():
            model.model.embed_tokens.weight[7] = math.nan
        return model

    def test_the_write_is_dropped_and_reported(self):
        learner = learner_on(Level(4, 0.3), Level(8, 0.2), model=self.broken_model())
        ids = random_ids(24)
        ids[ids == 7] = 8
        learner.observe(ids[:8])
        before = {i: {n: t.clone() for n, t in learner.memory.diff(level=i).items()} for i in (0, 1)}
        bad = ids[8:16].clone()
        bad[1] = 7
        with pytest.warns(RuntimeWarning, match=r"level 0 learned nothing from.* token 12"):
            learner.observe(bad[:4])
        assert outcomes(learner) == ["dropped"]
        for name, delta in learner.memory.diff(level=0).items():
            assert torch.equal(delta, before[0][name])
        # the sum of the slow chunk holds the same loss, so it is dropped too
        with pytest.warns(RuntimeWarning, match="level 1"):
            surprise = learner.observe(bad[4:])
        assert outcomes(learner) == ["written"]
        assert outcomes(learner, level=1) == ["dropped"]
        assert surprise[1:].isfinite().all()  # the bad token has left the context
        for name, delta in learner.memory.diff(level=1).items():
            assert torch.equal(delta, before[1][name])
        learner.observe(ids[16:])
        assert [write.outcome for write in learner.writes] == ["written"] * 3

    def test_an_infinite_gradient_with_a_finite_loss(self):
        model = tiny_model()
        model.model.layers[1].mlp.register_full_backward_hook(lambda _, g, __: (g[0] * math.inf,))
        learner = learner_on(Level(4, 0.3, rule="adam"), model=model)
        with pytest.warns(RuntimeWarning):
            learner.observe(random_ids(4))
        assert not learner.memory.diff()
        assert math.isfinite(learner.writes[0].loss)


class TestPrecision:
    def test_bfloat16_model_has_float32_memory(self):
        model = tiny_model(dtype=torch.bfloat16)
        levels = Level(8, 0.05, rule="adam"), Level(16, 0.02, rule="m3"), Level(32, 0.1, rank=2)
        learner = learner_on(*levels, model=model)
        surprise = learner.observe(random_ids(44))
        assert surprise.dtype == torch.float32
        for state in learner.memory.rows[0].levels:
            assert {t.dtype for t in state.tensors() if t.is_floating_point()} == {torch.float32}
        for level in range(3):
            assert all(delta.dtype == torch.float32 for delta in learner.memory.diff(level=level).values())
        for target in learner.reader.writers[0].targets:
            assert target.weight.dtype == torch.bfloat16

    def test_steps_below_the_resolution_of_bfloat16_add_up(self):
        model = tiny_model(dtype=torch.bfloat16)
        exact = learner_on(Level(8, 1e-3), model=model)
        ids = random_ids(8)
        steps = []
        for _ in range(3):
            before = exact.memory.diff()
            exact.memory.rows[0].clear_context()
            exact.observe(ids)
            after = exact.memory.diff()
            steps.append(sum((after[n] - before.get(n, 0)).square().sum() for n in after).sqrt())
        torch.testing.assert_close(torch.stack(steps), torch.full((3,), 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_checkpointing_changes_nothing(family):
    """Bit for bit; in a model with dropout left in training mode, too."""
    model = tiny_model(family).train()
    levels = (Level(8, 0.3), Level(16, 0.2, layers=[1]), Level(32, 0.1, rank=2))
    plain = learner_on(*levels, model=model)
    checkpointed = learner_on(*levels, model=model, gradient_checkpointing=True)
    ids = random_ids(64)
    assert torch.equal(plain.observe(ids)[1:], checkpointed.observe(ids)[1:])
    for name, delta in plain.memory.diff().items():
        assert torch.equal(delta, checkpointed.memory.diff()[name])
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_gradient_checkpointing_runs_layers_twice():
    model = tiny_model()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    learner_on(Level(8, 0.3), model=model, gradient_checkpointing=True).observe(random_ids(8))
    assert len(calls) == 2


def test_one_forward_and_one_backward_per_token():
    """A whole text is read once: chunks of 8, with the crossing token apart."""
    model = tiny_model()
    read, backward = [], []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    mlp.register_full_backward_hook(lambda *_: backward.append(1))
    learner_on(Level(8, 0.3), Level(16, 0.1), model=model).observe(random_ids(32))
    assert sum(read) == 31  # the last token predicts nothing yet
    assert len(backward) == 4 + 2  # and two crossing pairs inside slow chunks
