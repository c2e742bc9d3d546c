"""The tasks of optimizers measure what they say; the optimizers are those of `build`."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

from nested_learning.evals import find_method, find_task
from nested_learning.evals.methods.optimizers import optimizers
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.tasks.optimizers import digits, orthogonal, regression, toy
from nested_learning.evals.tasks.optimizers.networks import network_optimizer
from nested_learning.optimizers import M3, DeltaMomentum, OrthogonalMomentum
from nested_learning.optimizers.recipe import matrices_and_rest

HAS_DIGITS = importlib.util.find_spec("sklearn") is not None
TRIALS = [
    ("optimizers-toy", "delta-momentum"),
    ("optimizers-orthogonal", "m3"),
    ("optimizers-regression", "dgd"),
    pytest.param(
        "optimizers-digits",
        "muon",
        marks=pytest.mark.skipif(not HAS_DIGITS, reason="needs scikit-learn"),
    ),
    ("optimizers-transformer", "muon"),
    ("optimizers-hope", "m3"),
]


@pytest.mark.parametrize(("name", "method"), TRIALS)
def test_one_trial_of_a_task(name, method, tmp_path):
    """Figures are those of the columns and the same again; the plot is written."""
    task = find_task(name).at("smoke")
    assert task.missing() is None
    chosen = find_method(method).at(task.grid(find_method(method))[0])
    figures = task.run(chosen, 0)
    json.dumps(figures, allow_nan=False)
    assert set(task.columns) <= set(figures)
    headline = (task.run if "toy" in name else task.tune)(chosen, 0)[task.headline]
    again = (task.run if "toy" in name else task.tune)(chosen, 0)[task.headline]
    assert headline == again
    task.plot({method: MethodRow(method, chosen.settings, {0: figures})}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rates_are_chosen_over_seeds_and_divergence_has_no_figure():
    assert [
        len(find_task(f"optimizers-{name}").at("small").tuning_seeds()) for name in ("digits", "orthogonal")
    ] == [10, 2]
    diverged = find_task("optimizers-orthogonal").at("smoke", steps=60)
    figures = diverged.run(find_method("momentum").at({"lr": 1e6}), 0)
    assert figures["at the end"] is None
    json.dumps(figures, allow_nan=False)


def test_a_text_that_is_not_here(monkeypatch):
    from nested_learning.training.data.download import DownloadError

    def offline():
        raise DownloadError("no network")

    monkeypatch.setattr("nested_learning.evals.tasks.optimizers.language.shakespeare_file", offline)
    assert "NESTED_LEARNING_DATA" in find_task("optimizers-hope").at("small").missing()
    assert find_task("optimizers-hope").at("small", source="stdlib").missing() is None


def test_an_optimizer_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="'m3' has no learning rate"):
        find_method("m3").build(nn.Linear(2, 2))
    assert "takes optimizer" in find_task("optimizers-digits").at("smoke").accepts(find_method("ewc"))
    assert "compares gradient-descent and dgd" in find_task("optimizers-regression").at("smoke").accepts(
        find_method("m3")
    )


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


def runs_of(*steps):
    """Figures of a rule with runs at two rates and one momentum."""
    beta = 1.0
    return {"runs": [[lr, 0.9, beta, n] for lr, n in zip((0.1, 0.2), steps, strict=True)]}


@pytest.mark.parametrize(
    ("momentum", "delta", "verdict"),
    [
        ((9, 9), (5, 5), "holds"),
        ((9, None), (None, None), "cannot be told here"),
        ((5, 5), (9, None), "does not"),
    ],
)
def test_equal_constants_are_judged_point_by_point(momentum, delta, verdict):
    claim = toy.FasterAtEqualConstants("", "", 1.0)
    plain = {seed: runs_of(*momentum) for seed in (0, 1)}
    rows = {
        "momentum": MethodRow("momentum", {}, plain),
        "delta-momentum": MethodRow("delta-momentum", {}, {seed: runs_of(*delta) for seed in (0, 1)}),
    }
    assert claim.judge(rows).verdict == verdict
    assert claim.judge({}).verdict == "cannot be told here"


def test_a_seed_is_a_landscape():
    task = find_task("optimizers-toy").at("smoke")
    [method] = optimizers("momentum")
    assert task.run(method, 0)["runs"] != task.run(method, 1)["runs"]
    assert len(toy.LANDSCAPES) == find_task("optimizers-toy").budgets["small"].seeds
    with pytest.raises(ValueError, match="one of 27 landscapes, got 27"):
        task.run(method, 27)


# -- orthogonal tasks


def test_the_tasks_are_orthogonal_and_have_one_solution():
    size, generator = orthogonal.OrthogonalOptions(noise=0.0), torch.Generator().manual_seed(0)
    tasks = orthogonal.OrthogonalTasks.draw(size, generator)
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
    size = orthogonal.OrthogonalOptions(tasks=3, rank=2, outputs=3, steps=30)
    found = orthogonal.scores(orthogonal.learn(find_method("gradient-descent").at({"lr": 0.1}), 0, size))
    assert abs(found["forgetting"]) < 1e-6
    assert found["at the end"] == pytest.approx(found["after its task"], abs=1e-6)


# -- the stream


def test_a_stream_is_as_correlated_as_it_says():
    stream = regression.RegressionStream(condition=100.0, serial=0.9, period=50, steps=20_000)
    world = regression.StreamSamples(stream, 0)
    values = torch.linalg.svdvals(world.root).square()
    assert values[0] / values[-1] == pytest.approx(100, rel=1e-3)
    assert values.sum() == pytest.approx(stream.inputs, rel=1e-5)
    x = world.x / world.x.std(0)
    assert (x[1:] * x[:-1]).mean() == pytest.approx(0.9, abs=0.02)
    assert len({id(W) for W in world.solutions}) > 1
    assert torch.equal(world.solutions[0], world.solutions[49])
    assert not torch.equal(world.solutions[49], world.solutions[50])


@pytest.mark.parametrize("figure", [regression.ON_L, regression.ON_BOTH, regression.TO_W])
@pytest.mark.parametrize("name", ["gradient-descent", "dgd"])
def test_every_method_has_the_minimum_that_it_is_measured_to(name, figure):
    """Without noise and change all errors fall to zero, but that of DGD to W*: it ends at W*/2."""
    stream = regression.RegressionStream(1.0, 0.0, None, inputs=4, outputs=2, noise=0.0)
    curve = regression.curve_of(find_method(name).at({"lr": 0.02}), figure, stream, 0)
    assert curve[0] == pytest.approx(1.0)
    assert curve[-1] == pytest.approx(0.25 if (name, figure) == ("dgd", regression.TO_W) else 0.0, abs=0.03)


# -- networks


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        digits.load_digits()


def test_images_are_cut_into_patches_and_divided_once():
    size = digits.DigitsOptions(width=4, layers=1, heads=1, validation=3, test=4)
    model = digits.VisionTransformer(size)
    seen = []
    model.embedding.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    image = torch.arange(64.0).view(1, 8, 8)
    model(image)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 5].tolist() == image[0, 2:4, 2:4].flatten().tolist()
    data = digits.Digits(torch.zeros(10, 8, 8), torch.arange(10))
    parts = digits.divide(data, size, 0)
    assert [len(part.labels) for part in parts] == [3, 3, 4]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(10))


@pytest.mark.parametrize("name", ["adamw", "muon", "m3", "dmgd", "delta-momentum"])
def test_every_parameter_of_a_network_is_trained(name):
    model = digits.VisionTransformer(digits.DigitsOptions(width=4, layers=1, heads=1))
    matrices, rest = matrices_and_rest(model, model.named_parameters())
    assert {n for n, _ in matrices} == {
        n for n, p in model.named_parameters() if n.startswith("encoder.") and p.ndim == 2
    }
    optimizer = network_optimizer(find_method(name).at({"lr": 0.01}), model, (0.9, 0.99))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    if isinstance(optimizer, (M3, OrthogonalMomentum)):
        adamw = {id(p) for g in optimizer.param_groups if g["adamw_only"] for p in g["params"]}
        assert adamw == {id(p) for _, p in rest}
        assert {g["adamw_betas"] for g in optimizer.param_groups} == {(0.9, 0.99)}
        assert {g["adjust_lr"] for g in optimizer.param_groups} == {"match_rms_adamw"}
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}


def test_the_embedding_is_no_matrix_of_muon():
    from nested_learning import HopeForCausalLM
    from nested_learning.models.presets import preset

    shape = find_task("optimizers-transformer").budgets["smoke"].shape
    model = HopeForCausalLM(preset("transformer-tiny", **shape))
    optimizer = network_optimizer(find_method("muon").at({"lr": 0.01}), model, (0.9, 0.95))
    matrices = [p for g in optimizer.param_groups if not g["adamw_only"] for p in g["params"]]
    rest = {p for g in optimizer.param_groups if g["adamw_only"] for p in g["params"]}
    assert model.get_input_embeddings().weight in rest
    assert len(matrices) == 6  # q, k, v, o and the MLP's two
    assert len(matrices) + len(rest) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["optimizers-digits", "optimizers-orthogonal"])
def test_more_rates_than_the_grid_has_are_the_whole_grid(name):
    task, more = (find_task(name).at("small", rates=rates) for rates in (1, 99))
    method = task.methods()[0]
    assert len(more.grid(method)) > len(task.grid(method)) >= 1
    assert all(setting in more.grid(method) for setting in task.grid(method))
