"""The parts of the optimizers' evidence: each runs, goes on where it stopped, and measures what it says."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

from benchmarks.common import Cache, OutOfTime, best, edge, mean, search, spread
from benchmarks.optimizers import __main__ as command
from benchmarks.optimizers import contestants, digits, language, orthogonal, regression, toy
from nested_learning.optimizers import M3, DeltaMomentum, OrthogonalMomentum

HAS_DIGITS = importlib.util.find_spec("sklearn") is not None
PARTS = [
    "toy",
    "orthogonal",
    "regression",
    pytest.param("digits", marks=pytest.mark.skipif(not HAS_DIGITS, reason="needs scikit-learn")),
    "language",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"word{i % 97} and {i % 13}" for i in range(3000)))
    return str(file)


@pytest.mark.parametrize("part", PARTS)
def test_quick_run(part, tmp_path, text):
    """Figures, plot and cache are written whole; a second run repeats the first from its cache."""
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("f", "json"), ("p", "png"), ("c", "json"))}
    line = [part, "--quick", "--json", str(files["f"]), "--plot", str(files["p"]), "--cache", str(files["c"])]
    if part == "language":
        line += ["--data", text]
    figures = command.main(line)
    written = json.loads(files["f"].read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written == json.loads(json.dumps(figures))
    assert all(claim["because"] for claim in written["parts"][part]["claims"])
    assert files["p"].read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()}
    results = files["c"].read_text()
    assert command.main(line)["parts"] == figures["parts"]
    assert files["c"].read_text() == results


# -- what they share


def test_an_interrupted_run_goes_on(tmp_path):
    file, calls = tmp_path / "cache.json", []

    def work(i):
        calls.append(i)
        return {"value": i}

    cache = Cache(file)
    assert [cache.get({"i": i}, lambda i=i: work(i)) for i in (0, 1)] == [{"value": 0}, {"value": 1}]
    cache.flush()
    again = Cache(file)
    assert [again.get({"i": i}, lambda i=i: work(i)) for i in (0, 1, 2)][2] == {"value": 2}
    assert calls == [0, 1, 2]


def test_no_run_starts_that_would_end_late(tmp_path, capsys):
    cache = Cache(max_minutes=1)
    cache.get({"i": 0}, lambda: 0)
    cache.longest = 61.0
    assert cache.get({"i": 0}, lambda: 1) == 0
    with pytest.raises(OutOfTime):
        cache.get({"i": 1}, lambda: 1)
    with pytest.raises(SystemExit) as stopped:
        command.main(["toy", "--quick", "--max_minutes", "1e-9", "--cache", str(tmp_path / "c.json")])
    assert stopped.value.code == 3
    assert "the same command goes on" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("[1, 2]")
    for line, message in (
        (["toy", "--cache", str(file)], "is no cache of these benchmarks"),
        (["toy", "--max_minutes", "1"], "needs --cache"),
        (["toy", "--seeds", "1"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(line)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_statistics_and_tuning():
    assert best([0.1, 1.0, 10.0], {0.1: 3.0, 1.0: 2.0, 10.0: None}.get) == 1.0
    with pytest.raises(ValueError, match="every learning rate"):
        best([1.0], lambda lr: None)
    assert mean([1.0, 2.0]) == 1.5
    assert mean([1.0, None]) is None
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert (edge(1.0, [0.1, 1.0, 10.0]), edge(10.0, [0.1, 1.0, 10.0])) == ("1", "10*")


@pytest.mark.parametrize("start", [0.1, 1.0, 10.0, 100.0])
def test_search_from_anywhere(start):
    """The lowest of a valley is found, and a rate beyond both worse neighbours is not tried."""
    tried = []

    def score(rate):
        tried.append(rate)
        return {0.1: 3.0, 1.0: 2.0, 10.0: 2.5, 100.0: None}[rate]

    assert search([0.1, 1.0, 10.0, 100.0], score, start) == 1.0
    assert len(set(tried)) == len(tried)
    assert start == 100.0 or start == 10.0 or 100.0 not in tried


def test_search_leaves_what_diverges():
    rates = [0.1, 1.0, 10.0, 100.0]
    assert search(rates, {0.1: 3.0}.get, 100.0) == 0.1
    with pytest.raises(ValueError, match="the lowest learning rate of"):
        search(rates, lambda rate: None, 10.0)


# -- the toy


def test_the_toys_gradient_and_minimum():
    landscape = toy.Landscape(5.0, 1.3, 2.7)
    p = torch.randn(
        50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    (expected,) = torch.autograd.grad(toy.value(p, landscape).sum(), p)
    torch.testing.assert_close(toy.gradient(p, landscape), expected, rtol=1e-12, atol=1e-12)
    assert toy.value(torch.zeros(2), landscape) == 0
    assert (toy.value(p, landscape) > 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_toys_rule_is_the_optimizers(beta):
    landscape = toy.Landscape(5.0, 1.0, 2.0)
    p = nn.Parameter(torch.tensor(toy.START, dtype=torch.float64))
    optimizer = DeltaMomentum([p], lr=0.005, momentum=0.9, beta=beta)
    columns = [torch.tensor([x], dtype=torch.float64) for x in (0.005, 0.9, beta)]
    for points in toy.descend(landscape, *columns, 200):
        torch.testing.assert_close(points[0], p.detach(), rtol=1e-9, atol=1e-9)
        p.grad = toy.gradient(p.detach(), landscape)
        optimizer.step()


def test_steps_to_converge_counts_from_the_last_step_above():
    """ψ = r² with k = 0; three runs: in from step 2 on, out again at the end, not a number."""
    r = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, torch.nan], [0.0, 1.0, torch.nan]])
    points = [torch.stack([row, torch.zeros(3)], -1) for row in r]
    assert toy.steps_to_converge(points, toy.Landscape(0.0, 1.0, 1.0)) == [2, None, None]


# -- orthogonal tasks


def test_the_tasks_are_orthogonal_and_have_one_solution():
    size, generator = orthogonal.Size(noise=0.0), torch.Generator().manual_seed(0)
    tasks = orthogonal.Tasks.draw(size, generator)
    W = torch.randn(tasks.solution.shape, generator=generator, requires_grad=True)
    slopes = []
    for task in range(size.tasks):
        x, y = tasks.sample(task, size, generator)
        (slope,) = torch.autograd.grad((x @ W.T - y).square().sum(), W)
        slopes.append(slope.flatten() / slope.norm())
    products = torch.stack(slopes) @ torch.stack(slopes).T
    torch.testing.assert_close(products, torch.eye(size.tasks), rtol=0, atol=1e-5)
    torch.testing.assert_close(tasks.losses(tasks.solution), torch.zeros(size.tasks))
    torch.testing.assert_close(tasks.losses(torch.zeros_like(tasks.solution)), torch.ones(size.tasks))


def test_gradient_descent_forgets_nothing():
    size = orthogonal.Size(tasks=3, rank=2, outputs=3, steps=30)
    found = orthogonal.scores(orthogonal.learn("gradient descent", 0.1, 0, size))
    assert abs(found["forgetting"]) < 1e-6
    assert found["at the end"] == pytest.approx(found["after its task"], abs=1e-6)


# -- the stream


def test_a_stream_is_as_correlated_as_it_says():
    stream = regression.Stream(condition=100.0, serial=0.9, period=50, steps=20_000)
    world = regression.World(stream, 0)
    values = torch.linalg.svdvals(world.root).square()
    assert values[0] / values[-1] == pytest.approx(100, rel=1e-3)
    assert values.sum() == pytest.approx(stream.inputs, rel=1e-5)
    x = world.x / world.x.std(0)
    assert (x[1:] * x[:-1]).mean() == pytest.approx(0.9, abs=0.02)
    assert len({id(W) for W in world.solutions}) > 1
    assert torch.equal(world.solutions[0], world.solutions[49])
    assert not torch.equal(world.solutions[49], world.solutions[50])


@pytest.mark.parametrize("name", list(regression.METHODS))
def test_every_method_has_the_minimum_that_it_is_measured_to(name):
    """Without noise and change all errors fall to zero, but that of DGD to W*: it ends at W*/2."""
    stream = regression.Stream(condition=1.0, serial=0.0, period=None, inputs=4, outputs=2, noise=0.0)
    rule, goal = regression.METHODS[name]
    curve = regression.follow(rule, 0.02, stream, 0)[goal]
    assert curve[0] == pytest.approx(1.0)
    assert curve[-1] == pytest.approx(0.25 if name == "DGD, error to W*" else 0.0, abs=0.03)


# -- networks


def test_digits_without_scikit_learn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stopped:
        digits.load()
    assert stopped.value.code == 2
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_images_are_cut_into_patches_and_divided_once():
    size = digits.Size(width=4, layers=1, heads=1, validation=3, test=4)
    model = digits.VisionTransformer(size)
    seen = []
    model.embedding.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    image = torch.arange(64.0).view(1, 8, 8)
    model(image)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 5].tolist() == image[0, 2:4, 2:4].flatten().tolist()
    data = digits.Split(torch.zeros(10, 8, 8), torch.arange(10))
    parts = digits.divide(data, size, 0)
    assert [len(part.labels) for part in parts] == [3, 3, 4]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(10))


@pytest.mark.parametrize("name", list(contestants.NETWORK))
def test_every_parameter_of_a_network_is_trained(name):
    model = digits.VisionTransformer(digits.Size(width=4, layers=1, heads=1))
    matrices, rest = contestants.split(model, model.matrices())
    assert {p.ndim for p in matrices} == {2}
    optimizer = contestants.NETWORK[name](matrices, rest, 0.01, (0.9, 0.99))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    if isinstance(optimizer, (M3, OrthogonalMomentum)):
        assert [group["adamw_only"] for group in optimizer.param_groups] == [False, True]


def test_the_embedding_is_no_matrix_of_muon():
    from nested_learning import HopeForCausalLM
    from nested_learning.models.presets import preset
    from nested_learning.training.config import OptimConfig

    model = HopeForCausalLM(preset("transformer-tiny", **language.QUICK.shape))
    optimizer = language.optimizer_of("Muon", model, OptimConfig(lr=0.01))
    matrices, rest = (set(group["params"]) for group in optimizer.param_groups)
    assert model.get_input_embeddings().weight in rest
    assert len(matrices) == 6  # q, k, v, o and the MLP's two
    assert len(matrices) + len(rest) == len(list(model.parameters()))
