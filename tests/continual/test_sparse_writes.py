"""Sparse writes against a loop over dense matrices with masks; what is kept, installed, saved and refused."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from nested_learning.cli.level_flags import add_level_flags, levels_of
from nested_learning.cli.parsing import new_parser, parse
from nested_learning.continual import Level, stack_levels
from nested_learning.levels import levels as nested_system
from nested_learning.optimizers import AdaGradMemory
from tests.continual.oracle import Oracle
from tests.continual.test_invariances import assert_equal_contents, contents
from tests.continual.test_memory_file import rewrite
from tests.continual.tiny_models import _LLAMA, random_ids, tiny_model

MODEL = tiny_model()
PROBE = random_ids(1, 12, seed=5)
MLP = "model.layers.0.mlp"


def learner_on(*levels, model=MODEL, **options):
    return stack_levels(model, levels=levels, **options)


def fused_model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Phi3Config(**_LLAMA, num_hidden_layers=1, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    return model.double().eval()


class SparseOracle(Oracle):
    """One level, dense everywhere: a mask of the weight's shape says what a write changes."""

    def __init__(self, model, size, lr, names, fraction, adam, decay):
        super().__init__(model, [(size, lr, names, 1.0, None)])
        self.fraction, self.adam, self.decay = fraction, adam, decay
        self.usual, self.chunks, self.moments, self.ever = {}, 0, {}, {}

    def _write(self, _):
        lr, sums, masks = self.levels[0][1], self.sums[0], {}
        for mlp in sorted({name.rsplit(".", 2)[0] for name in sums}):
            own = [name for name in sums if name.startswith(f"{mlp}.")]
            squares = sum(self.by_unit(name, sums[name]).square().sum(1) for name in own)
            score = squares.clone()
            if mlp in self.usual:
                score = squares / (self.usual[mlp] + self.usual[mlp].mean())
            self.usual[mlp] = (self.usual.get(mlp, 0) * self.chunks + squares) / (self.chunks + 1)
            best = sorted(range(len(score)), key=lambda j, s=score: -float(s[j]))
            for j in best[: math.ceil(self.fraction * len(score))]:
                for name in own:
                    masks.setdefault(name, torch.zeros_like(sums[name]))
                    self.by_unit(name, masks[name], write=j)
        self.chunks += 1
        norm = torch.sqrt(sum((sums[n] * masks[n]).square().sum() for n in sums))
        for name, mask in masks.items():
            g = sums[name] * mask * min(1.0, 1.0 / float(norm))
            delta = self.deltas[0][name]
            delta *= 1 - self.decay
            if self.adam:
                m, v, t = self.moments.setdefault(name, [torch.zeros_like(g) for _ in range(3)])
                t += mask
                m += mask * 0.1 * (g - m)
                v += mask * 0.001 * (g * g - v)
                t1 = t.clamp_min(1)
                g = mask * (m / (1 - 0.9**t1)) / ((v / (1 - 0.999**t1)).sqrt() + 1e-8)
            delta -= lr * g
            self.ever[name] = self.ever.get(name, 0) + mask
            sums[name].zero_()

    def by_unit(self, name, matrix, write=None):
        """[units, weights], a copy; with `write` ones go into that unit of the matrix instead."""
        turned = matrix.T if name.endswith(("down_proj.weight", "c_fc.weight")) else matrix
        parts = turned.chunk(2) if "gate_up" in name else (turned,)
        if write is not None:
            for part in parts:
                part[write] = 1.0
        return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    ("make", "rule", "decay"),
    [(tiny_model, "adam", 0.0), (lambda: tiny_model("gpt2"), "gd", 0.1), (fused_model, "adam", 0.05)],
)
def test_against_dense_matrices_with_masks(make, rule, decay):
    model = make()
    modules = ["mlp.gate_up_proj", "mlp.down_proj"] if "Phi3" in type(model).__name__ else None
    learner = learner_on(Level(8, 0.2, rule=rule, sparse=0.15, decay=decay), model=model, modules=modules)
    names = [target.name for target in learner.reader.writers[0].targets]
    oracle = SparseOracle(model, 8, 0.2, names, 0.15, rule == "adam", decay)
    ids = random_ids(48)
    torch.testing.assert_close(learner.observe(ids), oracle.observe(ids), equal_nan=True)
    found = learner.memory.diff()
    for name, delta in oracle.deltas[0].items():
        torch.testing.assert_close(found[name], delta, rtol=1e-8, atol=1e-11)
        assert 0 < oracle.ever[name].count_nonzero() < delta.numel()  # some units often, some never
    for mlp, units in learner.memory.rows[0].levels[0].units.items():
        name = next(n for n in names if n.startswith(f"{mlp}."))
        ever = oracle.by_unit(name, oracle.ever[name])[:, 0]
        assert units.tolist() == ever.nonzero()[:, 0].tolist()
        assert ever.max() > 1


def test_all_units_are_the_full_level():
    sparse, full = (learner_on(Level(4, 0.3, rule="adam", sparse=s), Level(12, 0.1)) for s in (1.0, None))
    ids = random_ids(30)
    torch.testing.assert_close(sparse.observe(ids), full.observe(ids), equal_nan=True)
    torch.testing.assert_close(sparse.logits(PROBE), full.logits(PROBE))


def test_a_new_unit_starts_from_the_empty_state_of_the_rule():
    learner = learner_on(Level(4, 0.3, rule=AdaGradMemory(initial=2.0), sparse=0.05))
    learner.observe(random_ids(40))
    state = learner.memory.rows[0].levels[0]
    assert len(state.units[MLP]) > 2
    assert all(bool((stored["total"] >= 2.0).all()) for stored in state.rule.values())


SPARSE = (
    Level(4, 0.3, rule="adam", sparse=0.1),
    Level(8, average_of=0, rate=0.5),
    Level(12, 0.2, sparse=0.2, rule="momentum", layers=[1]),
    Level(20, 0.1, layers=[0]),
    Level(24, 0.0, consolidate=0.5),
)


class TestMemory:
    def test_pieces_rows_scopes_files_and_copies(self, tmp_path):
        ids = random_ids(2, 50)
        rows, whole, streamed = (learner_on(*SPARSE) for _ in range(3))
        rows.observe(ids)
        whole.observe(ids[1])
        assert_equal_contents(contents(rows, 1), contents(whole))
        for piece in ids[1].split([5, 19, 3, 23]):
            streamed.observe(piece)
        for a, b in zip(contents(streamed), contents(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        before = [t.clone() for t in contents(whole)]
        with whole.adaptation_scope():
            whole.observe(ids[0])
        assert_equal_contents(contents(whole), before)
        whole.memory.save(tmp_path / "m")
        loaded, twin = learner_on(*SPARSE), copy.deepcopy(whole)
        loaded.memory.load(tmp_path / "m")
        for learner in (whole, loaded, twin):
            learner.observe(ids[0])
        assert_equal_contents(contents(loaded), contents(whole))
        assert_equal_contents(contents(twin), contents(whole))

    def test_what_is_installed_is_what_was_learned(self):
        """Between learners, rows and levels that touch other units of the same weights."""
        first, second = learner_on(*SPARSE), learner_on(Level(5, 0.9, sparse=0.1))
        for piece in random_ids(2, 30).split(15, dim=1):
            first.observe(piece)
            second.observe(piece)
            for learner, row in ((first, 0), (second, 0), (first, 1), (second, 1)):
                for levels in (None, [0], [len(learner.levels) - 1]):
                    weights = {n: p.detach().clone() for n, p in MODEL.named_parameters()}
                    for level in [None] if levels is None else levels:
                        for name, delta in learner.memory.diff(level=level, row=row).items():
                            weights[name] += delta
                    expected = functional_call(MODEL, weights, (PROBE,)).logits
                    torch.testing.assert_close(learner.logits(PROBE, row=row, levels=levels), expected)
        assert torch.equal(first.logits(PROBE, levels=[]), MODEL(PROBE).logits)

    def test_bfloat16_weights_are_rounded_once(self):
        model = tiny_model(dtype=torch.bfloat16)
        learner = learner_on(Level(4, 0.01, sparse=0.2), Level(8, 0.01, sparse=0.2), model=model)
        learner.observe(random_ids(24))
        deltas = learner.memory.diff()
        with learner.active():
            for target in learner.reader.writers[0].targets:
                assert deltas[target.name].dtype == torch.float32
                expected = (target.weight.float() + deltas[target.name]).bfloat16()
                assert torch.equal(target.module.weight, expected)
                assert not torch.equal(expected, target.weight)

    def test_the_file_is_a_small_part_of_a_full_one(self, tmp_path):
        config = LlamaConfig(**{**_LLAMA, "intermediate_size": 1600, "num_hidden_layers": 2})
        model = AutoModelForCausalLM.from_config(config).eval()
        sizes = {}
        for sparse in (0.01, 1.0, None):
            learner = learner_on(Level(4, 0.1, rule="adam", sparse=sparse), model=model)
            learner.observe(random_ids(4))
            budget = learner.info()
            steps = sum(stored["step"].nbytes for stored in learner.memory.rows[0].levels[0].rule.values())
            assert learner.memory.nbytes == budget.deltas + budget.rules + steps
            learner.observe(random_ids(8, seed=1))
            learner.memory.save(tmp_path / "m")
            sizes[sparse] = (tmp_path / "m").stat().st_size
            assert (
                learner.memory.nbytes
                <= budget.largest - budget.total + budget.deltas + budget.rules + steps * 100
            )
        assert sizes[0.01] < 0.08 * sizes[None]
        assert sizes[1.0] < 1.05 * sizes[None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"0/0/units/{MLP}": lambda t: t.flip(0)}, "ascending"),
        ({f"0/0/units/{MLP}": lambda t: t + 24}, "from 0 to 23"),
        ({f"0/0/units/{MLP}": lambda t: t.int()}, "torch.int32"),
        ({f"0/0/units/{MLP}": lambda t: t[:-1]}, "expected bfloat16 or float32 or float64 of shape"),
        ({f"0/0/units/{MLP}": lambda t: t[:0]}, "ascending"),
        ({f"0/0/units/{MLP}": lambda t: t[0]}, "of shape"),
        ({f"0/0/units/{MLP}": lambda t: None}, "of shape"),
        ({f"0/0/delta/{MLP}.up_proj.weight": lambda t: t[:, :-1]}, "of shape"),
        ({f"0/0/delta/{MLP}.up_proj.weight": lambda t: None}, "is missing"),
        ({f"0/0/rule/step/{MLP}.up_proj.weight": lambda t: t[:-1]}, "of shape"),
        ({f"0/0/rule/step/{MLP}.up_proj.weight": lambda t: t - 99}, "expected a count"),
        ({f"0/0/rule/mean/{MLP}.up_proj.weight": lambda t: t.T}, "of shape"),
        ({f"0/0/background/{MLP}": lambda t: -t}, "finite numbers from 0"),
        ({f"0/0/background/{MLP}": lambda t: t[1:]}, "of shape"),
        ({"0/0/chunks": lambda t: None}, "chunks is missing"),
        ({"0/0/chunks": lambda t: -t}, "chunks is -"),
        ({"0/1/chunks": lambda t: torch.tensor(1)}, "unexpected tensors 0/1/chunks"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path_factory, saved, change, message):
    path = tmp_path_factory.mktemp("damaged") / "m"
    path.write_bytes(saved.read_bytes())

    def apply(tensors, _):
        for name, how in change.items():
            new = how(tensors.pop(name, None))
            if new is not None:
                tensors[name] = new.contiguous().clone()

    rewrite(path, apply)
    learner = learner_on(*SPARSE[:2])
    with pytest.raises(ValueError, match=message):
        learner.memory.load(path)
    assert learner.memory.is_empty


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    learner = learner_on(*SPARSE[:2])
    learner.observe(random_ids(18))
    path = tmp_path_factory.mktemp("sparse") / "m"
    learner.memory.save(path)
    return path


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparse": 0.0}, "sparse must be a finite number > 0 and <= 1, got 0.0"),
            ({"sparse": 1.5}, "sparse must be"),
            ({"sparse": True}, "sparse must be"),
            ({"sparse": 0.1, "rank": 2}, "sparse is 0.1 and rank is 2"),
            ({"sparse": 0.1, "consolidate": 0.5}, "sparse is 0.1 and consolidate is 0.5"),
            ({"sparse": 0.1, "rule": "m3"}, "rule is 'm3', which writes a matrix as a whole"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Level(8, 0.1, **options)
        with pytest.raises(ValueError, match=r"sparse is 0\.1 and average_of is 0"):
            Level(8, average_of=0, rate=0.1, sparse=0.1)

    @pytest.mark.parametrize("modules", [["mlp.up_proj"], ["self_attn.q_proj", "self_attn.k_proj"]])
    def test_modules_that_are_no_mlp(self, modules):
        with pytest.raises(ValueError, match="not the matrices of one MLP"):
            learner_on(Level(8, 0.1, sparse=0.1), modules=modules)


def test_description_and_flags():
    level = Level(4, 0.1, sparse=0.25)
    assert Level(**level.describe()) == level
    assert "sparse" not in Level(4, 0.1).describe()
    learner = learner_on(level, Level(8, 0.1, sparse=0.5))
    system = nested_system(learner)
    rule = "gd, lr 0.1 (eq 71); clipped to norm 1; to the 0.25 of the hidden units whose gradient stands out"
    assert system["Δ1 (chunk 4)"].rule == rule
    assert system["Δ1 (chunk 4)"].state_bytes == 2 * (6 * 3 * 16 * 8 + 6 * 8 + 24 * 8)
    parser = new_parser("chat", "", "")
    add_level_flags(parser, chunk_sizes=(32, 128), level_lr=0.1)
    argv = "--chunk_sizes 4 8 16 --sparse 0.1 --average_of -1 0 -1 --rate 0 .5 0"
    expected = Level(4, 0.1, sparse=0.1), Level(8, average_of=0, rate=0.5), Level(16, 0.1, sparse=0.1)
    assert levels_of(parse(parser, argv.split())) == expected
