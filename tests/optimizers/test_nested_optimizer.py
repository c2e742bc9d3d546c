"""Several optimizers as one: what is loaded is theirs, and theirs alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nested_learning.optimizers import M3, DeltaMomentum, MultiFrequency, NestedOptimizer


def weights(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, 2, generator=generator)) for n in sizes]


def feed(optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.1)


def delta(params):
    return DeltaMomentum(params, lr=0.1)


def nested(params, *makes):
    return NestedOptimizer([make([p]) for make, p in zip(makes, params, strict=True)])


def test_one_that_needs_a_closure_is_refused_before_others_have_stepped():
    first, second = weights(3, 4)
    with pytest.raises(ValueError, match=r"NestedOptimizer takes .*LBFGS needs closure at every step"):
        NestedOptimizer([sgd([first]), torch.optim.LBFGS([second])])


@pytest.mark.parametrize(
    ("sizes", "makes", "message"),
    [
        ((3, 4), (adamw, sgd), "does not belong to AdamW: it was saved by SGD"),
        ((3, 4), (sgd, delta), "does not belong to DeltaMomentum: it was saved by AdamW"),
        ((3, 4), (delta, adamw), "does not belong to DeltaMomentum: it was saved by SGD"),
        ((3, 5), (sgd, adamw), r"parameter 0 of group 0 has shape \(5, 2\), the saved one \(4, 2\)"),
    ],
    ids=["swapped", "second", "first", "shape"],
)
def test_states_of_others_are_refused_before_anything_is_loaded(sizes, makes, message):
    saved = nested(weights(3, 4), sgd, adamw)
    feed(saved, range(2))
    other = nested(weights(*sizes), *makes)
    feed(other, range(1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved.state_dict())
    torch.testing.assert_close(other.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert other.state_dict()["param_groups"] == before["param_groups"]


def test_a_file_that_does_not_say_whose_it_is_loads():
    saved = nested(weights(3, 4), sgd, adamw)
    feed(saved, range(2))
    older = copy.deepcopy(saved.state_dict())
    for extras in older["optimizers"]:
        del extras["optimizer"]
    other = nested(weights(3, 4), sgd, adamw)
    other.load_state_dict(older)
    torch.testing.assert_close(other.state_dict()["state"], older["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: nested(params, sgd, adamw),
        lambda params: nested(params, delta, adamw),
        lambda params: MultiFrequency(params, adamw, period=2),
        lambda params: MultiFrequency(params, lambda _: nested(params, sgd, adamw), period=3),
    ],
    ids=["nested", "mixed", "frequency", "both"],
)
def test_an_optimizer_loaded_from_one_that_goes_on_has_states_of_its_own(make):
    first = make(weights(3, 4))
    feed(first, range(4))
    params = [p for group in first.param_groups for p in group["params"]]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    second = make(copies)
    second.load_state_dict(first.state_dict())
    feed(first, range(4, 9))
    feed(second, range(4, 9))
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_of_one_skips_the_step_of_all(bad, value):
    params = weights(3, 4, 5)
    optimizer = nested(params, delta, adamw, lambda params: M3(params, lr=0.1))
    feed(optimizer, range(2))
    before = copy.deepcopy((optimizer.state_dict()["state"], params))
    for p in params:
        p.grad = torch.ones_like(p)
    params[bad].grad[0, 0] = value
    optimizer.step()
    torch.testing.assert_close((optimizer.state_dict()["state"], params), before, rtol=0, atol=0)
    assert [optimizer.optimizers[0].skipped_steps, optimizer.optimizers[2].skipped_steps] == [1, 1]
    feed(optimizer, range(2, 3))  # and goes on
    assert all(not torch.equal(p, was) for p, was in zip(params, before[1], strict=True))


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_bad_gradient_within_another_nested_optimizer_skips_the_step_of_all(bad):
    params = weights(3, 4, 5, 6)
    inner = nested(params[1:3], delta, adamw)
    optimizer = NestedOptimizer([adamw(params[:1]), inner, sgd(params[3:])])
    feed(optimizer, range(2))
    before = copy.deepcopy((optimizer.state_dict()["state"], params))
    for p in params:
        p.grad = torch.ones_like(p)
    params[bad].grad[0, 0] = float("nan")
    optimizer.step()
    torch.testing.assert_close((optimizer.state_dict()["state"], params), before, rtol=0, atol=0)
    assert inner.optimizers[0].skipped_steps == 1
    feed(optimizer, range(2, 3))
    assert all(not torch.equal(p, was) for p, was in zip(params, before[1], strict=True))


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_gradient_of_one_is_refused_by_all(bad):
    params = weights(3, 4)
    optimizer = nested(params, lambda params: DeltaMomentum(params, lr=0.1, error_if_nonfinite=True), adamw)
    feed(optimizer, range(1))
    before = copy.deepcopy(params)
    params[bad].grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"parameter 0 of group .* No parameter was changed"):
        optimizer.step()
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    feed(optimizer, range(1, 2))
    assert all(not torch.equal(p, was) for p, was in zip(params, before, strict=True))


def test_sparse_gradients_of_another_are_looked_at_too():
    embedding, weight = nn.Embedding(5, 2, sparse=True), weights(3)[0]
    sparse = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    optimizer = NestedOptimizer([sparse, delta([weight])])
    before = copy.deepcopy(embedding.weight)
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        (scale * (embedding(torch.tensor([1, 1])).sum() + weight.sum())).backward()
        optimizer.step()
        assert torch.equal(embedding.weight, before) == (scale != 1.0)


def test_momenta_are_cycled_where_all_groups_have_one():
    first, second = weights(3, 4)
    both = nested([first, second], adamw, adamw)
    torch.optim.lr_scheduler.OneCycleLR(both, 0.1, total_steps=9)
    assert [group["betas"][0] for group in both.param_groups] == [0.95, 0.95]
    mixed = nested([first, second], adamw, sgd)
    with pytest.raises(ValueError, match="must support momentum"):
        torch.optim.lr_scheduler.OneCycleLR(mixed, 0.1, total_steps=9)
    assert copy.deepcopy(both).defaults == both.defaults


def test_a_parameter_is_trained_by_one_optimizer_alone():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    nested = NestedOptimizer([torch.optim.SGD([first], lr=0.1), torch.optim.SGD([second], lr=0.1)])
    fresh = nn.Parameter(torch.ones(4))
    for params in (first, [first, fresh], iter([fresh, second]), [("name", first)]):
        with pytest.raises(ValueError, match="trained already"):
            nested.add_param_group({"params": params})
    assert len(nested.param_groups) == 2
    nested.add_param_group({"params": iter([fresh])})
    assert nested.param_groups[-1]["params"] == [fresh]


def test_hooks_of_state_dicts_are_called():
    def nested():
        return NestedOptimizer([torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)])

    saving, loading, called = nested(), nested(), []
    saving.register_state_dict_pre_hook(lambda optimizer: called.append(("before", optimizer)))
    saving.register_state_dict_post_hook(lambda optimizer, found: {**found, "seen": 1})
    loading.register_load_state_dict_pre_hook(lambda optimizer, found: {**found, "param_groups": changed})
    loading.register_load_state_dict_post_hook(lambda optimizer: called.append(("after", optimizer)))
    saved = saving.state_dict()
    assert saved["seen"] == 1
    changed = [{**saved["param_groups"][0], "lr": 0.5}]
    loading.load_state_dict(saved)
    assert called == [("before", saving), ("after", loading)]
    assert loading.param_groups[0]["lr"] == 0.5
    assert saved["param_groups"][0]["lr"] == 0.1  # what is loaded from is not changed


def test_what_is_no_state_dict_is_refused():
    nested = NestedOptimizer([torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)])
    with pytest.raises(ValueError, match="not an optimizer's state_dict: param_groups, state missing"):
        nested.load_state_dict({})
