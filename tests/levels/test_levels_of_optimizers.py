"""Optimizers as levels: bytes before the first step equal those after it, frequencies, unknown ones."""

import re

import pytest
import torch
from torch import nn

from nested_learning import optimizers as no
from nested_learning.levels import levels
from tests.optimizers.cases import CASES


def model_of(dtype=torch.float32):
    """Parameters of one, two and four dimensions, and two matrices of one shape."""
    torch.manual_seed(0)
    parts = [nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 16), nn.Conv2d(2, 3, 3)]
    return nn.ModuleList(parts).to(dtype)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()


def memories(system):
    return [component for component in system.components if component.kind == "optimizer"]


def held(optimizer):
    """Bytes of all tensors in the optimizer's state, found without the code under test."""
    return sum(
        leaf.nbytes
        for state in optimizer.state.values()
        for leaf in torch.utils._pytree.tree_leaves(dict(state))
        if isinstance(leaf, torch.Tensor)
    )


TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "adam-amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "rmsprop-all": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
}


# DeltaGD needs inputs, not gradients alone: it has a test of its own.
BUILDS = {**TORCH, **{name: build for name, build in CASES.items() if name != "delta-gd"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_predicted_bytes_are_the_measured_ones(build, dtype):
    model = model_of(dtype)
    optimizer = build(model.parameters())
    before = levels(model, optimizer)
    train(model, optimizer, steps=2)
    after = levels(model, optimizer)
    assert [c.name for c in before.components] == [c.name for c in after.components]
    measured = {c.name: c.state_bytes for c in memories(after)}
    assert sum(measured.values()) == held(optimizer)
    if hasattr(optimizer, "state_bytes"):
        assert sum(measured.values()) == optimizer.state_bytes()
    assert {c.name: c.state_bytes for c in memories(before)} == measured
    assert all(c.measured for c in memories(after))


def test_on_the_meta_device():
    with torch.device("meta"):
        model = model_of()
    assert levels(model, torch.optim.AdamW(model.parameters())).to_dict()["parameters"] == 383


def outline(system):
    return [(str(level.frequency), [c.name for c in level.components]) for level in system.levels]


LINEAR = ["linear layers", "convolutions"]


def test_m3_has_a_slow_momentum_below_the_weights():
    model = model_of()
    assert outline(levels(model, no.M3(model.parameters(), frequency=7))) == [
        ("every optimizer step", ["M3: fast momentum", "M3: moments of AdamW's part"]),
        ("every optimizer step", LINEAR),
        ("every 7 optimizer steps", ["M3: slow momentum"]),
    ]


def test_what_a_momentum_needs_is_faster_than_it():
    model = model_of()
    learned = no.PreconditionedMomentum(model.parameters(), preconditioner="learned")
    assert outline(levels(model, learned)) == [
        ("every optimizer step", ["PreconditionedMomentum: learned preconditioner"]),
        ("every optimizer step", ["PreconditionedMomentum: momentum"]),
        ("every optimizer step", LINEAR),
    ]
    rmsprop = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    assert outline(levels(model, rmsprop))[:2] == [
        ("every optimizer step", ["RMSprop: square average"]),
        ("every optimizer step", ["RMSprop: momentum"]),
    ]


def test_a_given_preconditioner_never_changes():
    model = model_of()
    weight = model[0].weight
    given = {weight: torch.ones_like(weight)}
    optimizer = no.PreconditionedMomentum([weight], given=given)
    system = levels(model, optimizer)
    name = "PreconditionedMomentum: given preconditioner"
    assert (str(system[name].frequency), system[name].state_bytes) == ("never", weight.nbytes)
    assert system["PreconditionedMomentum: momentum"].state_bytes == weight.nbytes
    assert held(optimizer) == 2 * weight.nbytes


def test_periods_multiply_with_frequencies_of_the_inner_optimizer():
    model = model_of()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[1].parameters(), "period": 3},
        {"params": [*model[2].parameters(), *model[3].parameters()], "period": 12},
    ]
    optimizer = no.MultiFrequency(groups, inner=lambda g: no.M3(g, frequency=5), reduction="mean")
    system = levels(model, optimizer)
    slow = [str(c.frequency) for c in memories(system) if "slow" in c.name]
    assert slow == ["every 5 optimizer steps", "every 15 optimizer steps", "every 60 optimizer steps"]
    assert [str(c.frequency) for c in system.components if c.kind == "weights"] == [
        "every optimizer step",
        "every 3 optimizer steps",
        "every 12 optimizer steps",
        "every 12 optimizer steps",
    ]
    ranks = [level.frequency.rank for level in system.levels]
    assert ranks == sorted(ranks)
    train(model, optimizer, steps=4)  # the third group has none but the sum of its gradients
    found = memories(levels(model, optimizer))
    assert sum(c.state_bytes for c in found if c.measured) == optimizer.state_bytes()


def test_delta_gd_must_be_attached_and_then_holds_the_moments_of_biases():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = no.DeltaGD(model.parameters())
    with pytest.raises(ValueError, match="attach"):
        levels(model, optimizer)
    with optimizer.attach(model):
        system = levels(model, optimizer)
        model(torch.randn(5, 6)).sum().backward()
        optimizer.step()
        assert held(optimizer) == levels(model, optimizer)["DeltaGD: moments"].state_bytes == 2 * (72 + 4)
    assert [(c.name, c.state_bytes) for c in memories(system)] == [("DeltaGD: moments", 2 * (72 + 4))]
    assert "delta gradient descent" in system["MLPs"].rule


def test_inputs_that_wait_beside_gradients_are_a_memory():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = no.MultiFrequency(model.parameters(), lambda groups: no.DeltaGD(groups), period=4)
    optimizer.inner.attach(model)
    [predicted] = [c for c in memories(levels(model, optimizer)) if "x xᵀ" in c.name]
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).sum().backward()
        optimizer.step()
    system = memories(levels(model, optimizer))
    [found] = [c for c in system if "x xᵀ" in c.name]
    assert found.state_bytes == predicted.state_bytes == 4 * (6**2 + 16**2) + 2 * 8
    assert str(found.frequency) == "every optimizer step"
    assert sum(c.state_bytes for c in system) == optimizer.state_bytes()


class Sign(torch.optim.Optimizer):
    """Nobody has described it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                self.state[p]["last"] = p.grad.sign()
                p.sub_(self.state[p]["last"], alpha=group["lr"])


def test_an_unknown_optimizer_is_described_by_its_state():
    model = model_of()
    optimizer = Sign(model.parameters())
    before = levels(model, optimizer)["Sign: state"]
    assert (before.state_bytes, before.measured) == (None, False)
    assert "unknown" in before.rule
    train(model, optimizer)
    after = levels(model, optimizer)["Sign: state"]
    assert (after.state_bytes, after.measured) == (sum(p.nbytes for p in model.parameters()), True)
    assert after.rule == "unknown; holds last"


def test_an_unknown_optimizer_does_not_hold_the_gradients_that_wait_around_it():
    model = model_of()
    optimizer = no.MultiFrequency(model.parameters(), inner=Sign, period=2)
    size = sum(p.nbytes for p in model.parameters())
    train(model, optimizer)
    waiting, own = memories(levels(model, optimizer))
    assert [(m.state_bytes, m.measured) for m in (waiting, own)] == [(size, True), (None, False)]
    train(model, optimizer)
    waiting, own = memories(levels(model, optimizer))
    assert [(m.state_bytes, m.measured) for m in (waiting, own)] == [(size, True), (size, True)]
    assert own.rule == "unknown; holds last"


def test_an_unknown_optimizer_that_holds_no_tensors_is_measured_once_it_has_stepped():
    model = model_of()
    optimizer = Sign(model.parameters())
    for p in model.parameters():
        optimizer.state[p]["count"] = 1
    (memory,) = memories(levels(model, optimizer))
    assert (memory.state_bytes, memory.measured) == (0, True)


INSIDE = {
    "nested": lambda params: no.NestedOptimizer([no.NestedOptimizer([torch.optim.AdamW(params)])]),
    "period around nested": lambda params: no.MultiFrequency(
        params, period=2, inner=lambda groups: no.NestedOptimizer([torch.optim.AdamW(groups)])
    ),
    "all of them": lambda params: no.NestedOptimizer(
        [
            no.MultiFrequency(
                params,
                period=2,
                inner=lambda groups: no.NestedOptimizer([no.NestedOptimizer([torch.optim.AdamW(groups)])]),
            )
        ]
    ),
}


@pytest.mark.parametrize("build", INSIDE.values(), ids=INSIDE)
def test_what_optimizers_inside_others_hold_counts_once(build):
    model = model_of()
    optimizer = build(list(model.parameters()))
    predicted = {c.name: c.state_bytes for c in memories(levels(model, optimizer))}
    train(model, optimizer, steps=2)
    measured = memories(levels(model, optimizer))
    assert {c.name: c.state_bytes for c in measured} == predicted
    assert all(c.measured for c in measured)
    assert sum(predicted.values()) == held(optimizer)


class Counted(torch.optim.Optimizer):
    """A wrapper with a state of its own beside that of the optimizer inside."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    def step(self, closure=None):
        self.inner.step()
        for p in self.inner.state:
            self.state[p]["steps"] = torch.zeros(())


def test_state_of_a_wrapper_counts_beside_that_of_the_optimizer_inside():
    model = model_of()
    optimizer = Counted(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(model, optimizer)
    found = {c.name: c.state_bytes for c in memories(levels(model, optimizer))}
    size = sum(p.nbytes for p in model.parameters())
    assert found == {"Counted: state": 8 * 4, "Counted: other state": size}


def test_a_memory_is_predicted_until_it_is_held_whatever_others_have_done():
    model = model_of()
    first, *rest = model.parameters()
    groups = [{"params": [first]}, {"params": rest, "period": 3}]
    optimizer = no.MultiFrequency(groups, inner=torch.optim.AdamW)
    predicted = {c.name: c.state_bytes for c in memories(levels(model, optimizer))}
    train(model, optimizer)
    slow = "MultiFrequency: moments, every 3 optimizer steps"
    found = memories(levels(model, optimizer))
    assert {c.name: c.state_bytes for c in found} == predicted
    assert {c.name for c in found if not c.measured} == {slow}
    train(model, optimizer, steps=2)
    assert all(c.measured for c in memories(levels(model, optimizer)))


def test_a_memory_whose_parameters_had_no_gradient_yet_is_predicted():
    model = model_of()
    groups = [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "betas": (0.5, 0.9)}]
    optimizer = torch.optim.AdamW(groups)
    sizes = [c.state_bytes for c in memories(levels(model, optimizer))]
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = memories(levels(model, optimizer))
    assert [(c.state_bytes, c.measured) for c in after] == list(zip(sizes, (True, False), strict=True))


def test_state_of_parameters_frozen_later_is_not_lost():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    model[3].requires_grad_(False)
    system = levels(model, optimizer)
    frozen = sum(p.nbytes for p in model[3].parameters())
    assert system["AdamW: other state"].state_bytes == 2 * frozen + 2 * 4
    assert sum(c.state_bytes for c in memories(system)) == held(optimizer)
    assert str(system["convolutions"].frequency) == "never"


def test_several_optimizers_and_the_trainers_wrapper():
    from accelerate import Accelerator

    model = model_of()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices)
    pair = [muon, Accelerator(cpu=True).prepare_optimizer(torch.optim.AdamW(rest))]
    system = levels(model, pair)
    assert system.optimizer == "Muon and AdamW"
    assert system["Muon: momentum"].state_bytes == sum(p.nbytes for p in matrices)
    assert system["AdamW: moments"].state_bytes == 2 * sum(p.nbytes for p in rest) + 4 * len(rest)
    train(model, muon)
    assert levels(model, muon)["Muon: momentum"].state_bytes == held(muon)
    with pytest.raises(ValueError, match="parameters of another"):
        levels(model, [muon, torch.optim.SGD(model.parameters(), lr=0.1)])


def test_optimizers_that_do_not_fit_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match="trains none of the model's 8 parameters"):
        levels(model, torch.optim.SGD(model_of().parameters(), lr=0.1))


def test_what_is_no_optimizer_is_refused():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given, kind in [
        ("adamw", "str"),
        (["adamw"], "str"),
        (0.1, "float"),
        (torch.tensor(0.1), "Tensor"),
        ({"a": optimizer}, "dict"),
        ([optimizer, None], "NoneType"),
        (torch.optim.AdamW, "the class AdamW"),
        (torch.optim.lr_scheduler.StepLR(optimizer, 1), "StepLR"),
    ]:
        with pytest.raises(ValueError, match=f"expected torch optimizers or None, got {kind}; give one"):
            levels(model, given)
    for several in ((optimizer,), iter([optimizer]), {"a": optimizer}.values()):
        assert levels(model, several).optimizer == "SGD"


def test_what_is_no_model_is_refused():
    for given, kind in [("gpt2", "str"), (None, "NoneType"), (nn.Linear, "the class Linear")]:
        with pytest.raises(ValueError, match=f"expected a torch.nn.Module or a Learner, got {kind}; make"):
            levels(given)


def described(optimizer):
    """The rule of the momentum and the step of the weights, in words."""
    weight = optimizer.param_groups[0]["params"][0]
    model = nn.Module()
    model.weight = weight
    system = levels(model, optimizer)
    step = next(component.rule for component in system.components if component.kind == "weights")
    return memories(system)[0].rule, step


def value(text, **numbers):
    """Of a formula such as `0.9 m + 0.1 g (eq 33)`."""
    text = re.sub(r"\(eq .*?\)", "", text).replace("·", "*").replace("−", "-")
    return eval(re.sub(r"([0-9.]+) ([mg])", r"\1*\2", text), {}, numbers)


@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.3}, {"nesterov": True}], ids=["plain", "dampening", "nesterov"]
)
def test_sgd_steps_as_it_is_described(options):
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, **options)
    weight.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()  # whose momentum is the gradient
    rule, step = described(optimizer)
    m, W = optimizer.state[weight]["momentum_buffer"].item(), weight.item()
    weight.grad.fill_(-3.0)
    optimizer.step()
    m = value(rule.partition("←")[2], m=m, g=-3.0)
    assert m == pytest.approx(optimizer.state[weight]["momentum_buffer"].item())
    assert value(step.partition("←")[2], m=m, g=-3.0, W=W, lr=0.1) == pytest.approx(weight.item())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Muon, no.OrthogonalMomentum])
def test_muon_says_what_it_orthogonalises(make, nesterov):
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = make([weight], lr=0.1, momentum=0.8, nesterov=nesterov)
    assert f"NewtonSchulz({'0.8 m + 0.2 g' if nesterov else 'm'})" in described(optimizer)[1]
