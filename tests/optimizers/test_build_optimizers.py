"""`build`: one optimizer per level equals loops by hand; every optimizer resumes in an accumulation."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.optimizers import M3, DeltaGD, build
from nested_learning.optimizers.recipe import by_name, decayed_names, matrices_and_rest
from nested_learning.parts import parts

CONFIG = HopeConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=1,
    num_heads=2,
    cms_levels=[{"chunk_size": 8}, {"chunk_size": 64}],
    pad_token_id=None,
)
NEEDING = {"multifrequency", "memoryoptimizer"}  # more than a name
TRAINABLE = sorted(by_name().keys() - NEEDING - {"lbfgs", "sparseadam"})
OFTEN = ("adamw", "deltagd", "deltamomentum", "m3", "muon", "nadam")
PRECISIONS = [
    *((name, torch.float32) for name in TRAINABLE),
    *(
        pytest.param(name, torch.bfloat16, marks=[] if name in OFTEN else pytest.mark.slow)
        for name in TRAINABLE
    ),
]


def new(dtype=torch.float64):
    torch.manual_seed(0)
    return HopeForCausalLM(CONFIG).to(dtype)


def gradients(model, step):
    """Leave the gradients of a loss over the step's own ids."""
    ids = torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(step))
    model(ids, labels=ids).loss.backward()


def train(model, optimizer, steps, schedule=None):
    for step in steps:
        gradients(model, step)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# Against loops by hand --------------------------------------------------------------------------------------


def groups(model, names, decay):
    named, decayed = dict(model.named_parameters()), decayed_names(model)
    return [
        {"params": [named[n] for n in names if (n in decayed) is with_decay], "weight_decay": wd}
        for with_decay, wd in ((True, decay), (False, 0.0))
        if any((n in decayed) is with_decay for n in names)
    ]


def muon_by_hand(model, names, lr):
    """torch's Muon for the matrices of a CMS block and AdamW for its norms."""
    named = dict(model.named_parameters())
    matrices = [named[n] for n in names if named[n].ndim == 2]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1),
        torch.optim.AdamW([named[n] for n in names if named[n].ndim != 2], lr=lr, weight_decay=0.0),
    ]


def levels_by_hand(twin):
    """(period, names, torch's optimizers) of each level that the test below gives `build`."""
    found = parts(twin)
    rest = found.find("embedding") + found.find("norms")
    cms0 = groups(twin, found.find("cms.0"), 0.1)
    m3 = M3([cms0[0], {**cms0[1], "adamw_only": True}], lr=1e-2, frequency=2)
    slow = found.find("initial") + found.find("gates")
    return [
        (5, found.find("cms.1"), muon_by_hand(twin, found.find("cms.1"), 3e-2)),
        (2, found.find("cms.0"), [m3]),
        (3, slow, [torch.optim.SGD(groups(twin, slow, 0.1), lr=1e-2, momentum=0.9)]),
        (1, found.find("projections"), [
            torch.optim.AdamW(groups(twin, found.find("projections"), 0.3), lr=1e-2, betas=(0.5, 0.6))
        ]),
        (1, rest, [torch.optim.AdamW(groups(twin, rest, 0.1), lr=1e-2, betas=(0.9, 0.95))]),
    ]  # fmt: skip


def train_by_hand(twin, levels, steps, reduction, max_grad_norm):
    """Steps of each level on what it has accumulated, at rates that fall as 1 / (1 + step)."""
    peaks = [[[g["lr"] for g in o.param_groups] for o in each] for *_, each in levels]
    named = dict(twin.named_parameters())
    waiting = {name: torch.zeros_like(p) for name, p in named.items()}
    for step in range(steps):
        gradients(twin, step)
        for name, p in named.items():
            waiting[name] += p.grad
        for (period, names, optimizers), peak in zip(levels, peaks, strict=True):
            if (step + 1) % period:
                continue
            for name in names:
                named[name].grad = waiting[name] / (period if reduction == "mean" else 1)
                waiting[name] = torch.zeros_like(named[name])
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_([named[name] for name in names], max_grad_norm)
            for inner, rates in zip(optimizers, peak, strict=True):
                for group, rate in zip(inner.param_groups, rates, strict=True):
                    group["lr"] = rate / (1 + step)
                inner.step()
        twin.zero_grad()


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_levels_equal_loops_by_hand(reduction, max_grad_norm):
    """Each level accumulates alone, is clipped alone, and steps with the rate of the run's step."""
    model, twin = new(), new()
    optimizer = build(
        "adamw",
        model,
        lr=1e-2,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        max_grad_norm=max_grad_norm,
        tokens_per_row=12,
        levels=[
            {"part": "cms.1", "name": "muon", "lr": 3e-2, "period": "chunk", "reduction": reduction},
            {"part": "cms.0", "name": "m3", "period": 2, "reduction": reduction, "frequency": 2},
            {
                "part": ["initial", "gates"],
                "name": "sgd",
                "momentum": 0.9,
                "period": 3,
                "reduction": reduction,
            },
            {"part": "projections", "betas": (0.5, 0.6), "weight_decay": 0.3},
        ],
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, range(11), schedule)
    train_by_hand(twin, levels_by_hand(twin), 11, reduction, max_grad_norm)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=name)
        assert not torch.equal(a, dict(new().named_parameters())[name])


def test_without_levels_it_is_torchs_adamw():
    model, twin = new(torch.float32), new(torch.float32)
    optimizer = build("AdamW", model, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-9)
    names = [name for name, _ in twin.named_parameters()]
    by_hand = torch.optim.AdamW(groups(twin, names, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-9)
    assert type(optimizer) is torch.optim.AdamW
    assert repr(optimizer) == repr(by_hand)
    train(model, optimizer, range(3))
    train(twin, by_hand, range(3))
    assert equal(model, twin)


def test_one_norm_over_the_whole_without_levels():
    model, twin = new(), new()
    train(model, build("sgd", model, lr=0.1, max_grad_norm=0.1), range(2))
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(2):
        gradients(twin, step)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        by_hand.step()
        twin.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)  # the norm adds up in another order


def test_a_level_at_every_step_changes_nothing():
    model, twin = new(torch.float32), new(torch.float32)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    train(model, build("adamw", model, **options, levels=[{"part": "cms"}, {"part": "gates"}]), range(3))
    train(twin, build("adamw", twin, **options), range(3))
    assert equal(model, twin)


def test_delta_gd_forgets_the_inputs_of_all_steps_of_a_period():
    """The level's S is the mean over the inputs of K steps, its gradient the mean of K gradients."""
    model, twin = nn.Linear(3, 2, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    twin.load_state_dict(model.state_dict())
    level = {"part": "weight", "period": 2, "reduction": "mean"}
    optimizer = build("deltagd", model, lr=0.1, levels=[level])
    whole = DeltaGD(twin.parameters(), lr=0.1).attach(twin)
    x = torch.randn(8, 3, dtype=torch.float64)
    for half in x.chunk(2):
        model(half).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    twin(x).square().mean().backward()
    whole.step()
    torch.testing.assert_close(model.weight, twin.weight)


@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("factor", [float("nan"), None], ids=["not-finite", "no-step"])
def test_delta_gd_drops_the_inputs_of_a_step_that_was_not_taken(factor, period):
    """One with a gradient that is not finite, or that GradScaler skipped, so that `step` was not called."""
    model, twin = nn.Linear(3, 2, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(16, 3, dtype=torch.float64)
    for each in (model, twin):
        optimizer = build("deltagd", each, lr=0.1, levels=[{"part": "weight", "period": period}])
        for number, rows in enumerate(x.chunk(4)):
            if each is model and number == 1:
                (model(rows + 10).square().mean() * (factor or 1)).backward()
                if factor is not None:
                    optimizer.step()
                optimizer.zero_grad()
            each(rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=0)


# Resuming ---------------------------------------------------------------------------------------------------


def with_levels(name, model):
    levels = [{"part": "cms.1", "period": 4, "reduction": "mean"}, {"part": "projections", "period": 2}]
    return build(name, model, lr=1e-3, levels=levels, max_grad_norm=1.0)


def saved(optimizer):
    """The state_dict after a file as the Trainer writes and reads it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "dtype"), PRECISIONS)
def test_every_optimizer_resumes_in_an_accumulation(name, dtype):
    model = new(dtype)
    optimizer = with_levels(name, model)
    train(model, optimizer, range(3))  # three gradients wait in cms.1, one in projections
    weights, state = copy.deepcopy(model.state_dict()), saved(optimizer)
    again = new(dtype)
    again.load_state_dict(weights)
    resumed = with_levels(name, again)
    resumed.load_state_dict(state)
    for number, p in enumerate(again.parameters()):
        if dtype == torch.bfloat16 and "accumulated" in resumed.state.get(p, {}):
            assert resumed.state[p]["accumulated"].dtype == torch.float32, number
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert equal(model, again)
    assert not equal(model, new(dtype))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["nadam", "asgd"])
def test_half_precision_resumes_without_levels(name):
    """Also the products of rates and decays, which torch would load in the parameter's dtype."""
    model, again = new(torch.bfloat16), new(torch.bfloat16)
    optimizer, resumed = (build(name, each, lr=1e-3) for each in (model, again))
    train(model, optimizer, range(3))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(saved(optimizer))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            assert torch.equal(resumed.state[q][key], value), key
            assert resumed.state[q][key].dtype == value.dtype, key
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert equal(model, again)


def test_copies_go_on_as_the_original():
    model = new()
    optimizer = with_levels("muon", model)
    train(model, optimizer, range(5))
    twin, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(5, 9))
    train(twin, copied, range(5, 9))
    assert equal(model, twin)


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 1.0, "error_if_nonfinite": True},
        {"levels": [{"part": "cms.1", "period": 2}], "error_if_nonfinite": True},
        {"levels": [{"part": "cms.1", "period": 2, "error_if_nonfinite": True}]},
    ],
    ids=["clipped", "levels", "one-level"],
)
def test_gradients_that_are_not_finite_raise_at_every_level_that_says_so(options):
    model = new()
    optimizer = build("m3", model, **options)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(FloatingPointError, match="parameter 0 of group 0"):
        optimizer.step()


def test_distributed_checkpoints_hold_it():
    model = new()
    optimizer = with_levels("m3", model)
    train(model, optimizer, range(5))
    again = copy.deepcopy(model)
    resumed = with_levels("m3", again)
    set_optimizer_state_dict(again, resumed, get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, range(5, 9))
    train(again, resumed, range(5, 9))
    assert equal(model, again)


def test_what_does_not_fit_is_refused_before_anything_is_loaded():
    model = new()
    optimizer = with_levels("adamw", model)
    train(model, optimizer, range(2))
    before = saved(optimizer)
    other = build("adamw", model, levels=[{"part": "projections", "period": 4}, {"part": "cms.1"}])
    with pytest.raises(ValueError, match="Build it with the same levels"):
        optimizer.load_state_dict(other.state_dict())
    swapped = build("adamw", model, levels=[{"part": "cms.0", "period": 4}, {"part": "projections"}])
    with pytest.raises(ValueError, match=r"group of 'cms.0' where 'cms.1' is here"):
        optimizer.load_state_dict(swapped.state_dict())
    with pytest.raises(ValueError, match="does not belong to MultiFrequency"):
        optimizer.load_state_dict(with_levels("adam", model).state_dict())
    after = saved(optimizer)
    assert str(before) == str(after)


def test_parameters_added_later_are_the_last_ones():
    model = new()
    model.lm_head.weight.requires_grad_(False)  # the embedding too: they are one
    optimizer = with_levels("adamw", model)
    embedding = model.lm_head.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [embedding], "lr": 0.5})
    assert optimizer.param_groups[-1]["lr"] == 0.5
    before = embedding.detach().clone()
    train(model, optimizer, range(1))
    assert not torch.equal(before, embedding)


# Names, shapes, periods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_optimizer_by_name_moves_every_parameter(name):
    model = new(torch.float32)
    optimizer = build(name, model)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(2))
    still = [n for (n, p), b in zip(model.named_parameters(), before, strict=True) if torch.equal(p, b)]
    assert still == []
    assert all(p.isfinite().all() for p in model.parameters())


def test_matrices_are_weights_of_maps():
    model = HopeForCausalLM(HopeConfig(**{**CONFIG.to_dict(), "mixer": "mac", "tie_word_embeddings": False}))
    matrices, rest = matrices_and_rest(model, model.named_parameters())
    assert all(p.ndim == 2 for _, p in matrices)
    left = {name.rpartition(".")[0].rpartition(".")[2] for name, p in rest if p.ndim == 2}
    assert left == {"embed_tokens", "lm_head", "mixer"}  # the last: persistent tokens


def test_an_embedding_is_one_where_a_head_that_shares_it_comes_first():
    model = nn.ModuleDict({"out": nn.Linear(4, 8, bias=False), "inner": nn.Linear(4, 4, bias=False)})
    model["embedding"] = nn.Embedding(8, 4)
    model["out"].weight = model["embedding"].weight
    assert decayed_names(model) == {"inner.weight"}
    matrices, rest = matrices_and_rest(model, model.named_parameters())
    assert [[name for name, _ in found] for found in (matrices, rest)] == [["inner.weight"], ["out.weight"]]


@pytest.mark.parametrize(("tokens", "periods"), [(64, [1, 1]), (12, [1, 5]), (8, [1, 8]), (1, [8, 64])])
def test_period_of_a_chunk(tokens, periods):
    model = new()
    levels = [{"part": "cms.0", "period": "chunk"}, {"part": "cms.1", "period": "chunk"}]
    optimizer = build("sgd", model, levels=levels, tokens_per_row=tokens)
    found = {group["name"]: group["period"] for group in optimizer.param_groups}
    assert found == {"cms.0": periods[0], "cms.1": periods[1], "rest": 1}


def frozen():
    model = new()
    for name in parts(model).find("gates"):
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": [{"part": "cms.2"}]}, r"levels\[0\] \(cms.2\): unknown part.*Did you mean 'cms.\d'"),
        ({"levels": [{"part": "head"}]}, "tied to its embedding"),
        ({"levels": [{"part": "cms"}, {"part": "cms.1"}]}, r"levels\[1\].*is in levels\[0\] \(cms\) too"),
        ({"levels": [{"part": "gates"}]}, "parameters are frozen"),
        ({"levels": [{"part": "cms", "period": 0}]}, "whole number >= 1, or 'chunk'; got 0"),
        ({"levels": [{"part": "cms", "period": 1.5}]}, "whole number >= 1"),
        ({"levels": [{"part": "cms", "period": "chunk"}], "tokens_per_row": 4}, "with one chunk length"),
        ({"levels": [{"part": "cms.1", "period": "chunk"}]}, "needs tokens_per_row"),
        (
            {"levels": [{"part": "cms.1", "period": "chunk"}], "tokens_per_row": 0},
            "tokens_per_row must be at",
        ),
        ({"levels": [{"part": "cms.1", "reduction": "max"}]}, "must be 'sum' or 'mean', got 'max'"),
        ({"levels": [{"part": "norms", "name": "muon"}]}, "train these with adamw"),
        ({"levels": [{"part": "norms", "name": "m4"}]}, "unknown optimizer 'm4'"),
        ({"levels": [{"part": "norms", "momentum": 0.9}]}, "unknown key of a level that AdamW trains: 'mom"),
        ({"levels": [{"period": 4}]}, "expected keys such as"),
        ({"levels": ["cms.1"]}, "expected keys such as"),
        ({"levels": [{"part": "cms", "lr": "fast"}]}, r"levels\[0\] \(cms\): lr must be .*got 'fast'"),
        ({"levels": [{"part": "cms", "weight_decay": -1}]}, r"\(cms\): weight_decay must be .*got -1"),
        ({"levels": [{"part": "cms", "weight_decay": "no"}]}, r"\(cms\): weight_decay must be .*got 'no'"),
        ({"levels": [{"part": "cms", "period": 10**400}]}, r"\(cms\): period must be .*got 1000"),
        ({"levels": [{"part": "cms", "name": "lbfgs"}]}, r"\(cms\): .*LBFGS needs closure at every step"),
        ({"name": "lbfgs", "max_grad_norm": 1.0}, "LBFGS needs closure at every step"),
        ({"weight_decay": float("nan")}, "weight_decay must be .*got nan"),
        ({"lr": 10**400}, "lr must be .*got 1000"),
        ({"differentiable": True}, "cannot move a model's parameters in place"),
        ({"levels": [{"part": "cms", "betas": [0.9, 2]}]}, r"levels\[0\] \(cms\): Invalid beta"),
        (
            {"levels": [{"part": "cms", "betas": [0.9]}]},
            r"\(cms\): .*betas is \(0.9,\); expected 2 numbers",
        ),
        ({"betas": (0.9, 0.9, 0.9)}, r"betas is \(0.9, 0.9, 0.9\); expected 2 numbers"),
        ({"betas": 0.9}, "betas is 0.9; expected 2 numbers"),
        ({"adamw": {"betas": [0.9]}}, r"betas is \(0.9,\); expected 2 numbers"),
        ({"name": "adamm"}, "Did you mean 'adam"),
        ({"name": "multifrequency"}, "MultiFrequency needs inner besides parameters"),
        ({"beta": (0.9, 0.9)}, "unknown option of AdamW: 'beta'. Did you mean 'betas'"),
        ({"name": "rprop", "weight_decay": 0.1}, "Rprop has no weight decay"),
        ({"lr": -1.0}, "lr must be .*got -1.0"),
        ({"levels": [{"part": "cms"}], "max_grad_norm": -1}, "max_grad_norm must be"),
    ],
)
def test_bad_input(fields, message):
    model = frozen()
    with pytest.raises(ValueError, match=message):
        build(fields.pop("name", "adamw"), model, **fields)
