"""Optimizers on shards of parameters (FSDP2) take the step of one process that has all of them."""

from __future__ import annotations

import copy
import json
import math
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nested_learning import optimizers as no
from nested_learning.optimizers.mended import MENDED
from tests.optimizers.cases import CASES, Build


class Model(nn.Module):
    """Matrices high and wide, two of one shape, a single row, an odd number of rows, a kernel, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.wide, self.high = nn.Linear(6, 3), nn.Linear(3, 7, bias=False)
        self.kernel = nn.Conv1d(1, 3, 2)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.second(torch.tanh(self.first(x)))))
        x = x + self.kernel(x.unsqueeze(1)).sum((1, 2), keepdim=True).squeeze(1)
        return self.last(torch.tanh(self.high(self.wide(x))))


def delta_gd(params, **options):
    return no.DeltaGD(params, **{"lr": 0.02, **options})


def periodic(params, **options):
    *fast, slow = params
    groups = [{"params": fast, "period": 1}, {"params": [slow], "period": 2}]
    return no.MultiFrequency(groups, lambda groups: no.M3(groups, lr=0.1, frequency=2, **options))


def periodic_delta_gd(params, **options):
    return no.MultiFrequency(params, lambda groups: delta_gd(groups, **options), period=2)


def given(params, **options):
    params = list(params)
    out = params[0].shape[0]
    P = {params[0]: torch.arange(1.0, out * out + 1, dtype=torch.float64).view(out, out) / out**2}
    return no.DeltaMomentum(params, given=P, **{"lr": 0.05, **options})


class RowMemory(no.MomentumMemory):
    """A memory that mixes the elements of a gradient, as one of a user may."""

    def update(self, state, grad):
        # DCP makes the states of a new optimizer by a step with gradients of zero.
        return super().update(state, grad / grad.norm().clamp(min=1e-30))


def torch_muon(params):
    matrices = [p for p in params if p.ndim == 2]
    return MENDED[torch.optim.Muon](matrices, lr=0.05, weight_decay=0.1)


BUILDS: dict[str, Build] = {
    **CASES,
    "delta-gd": delta_gd,
    "periodic": periodic,
    "periodic-delta-gd": periodic_delta_gd,
    "given": given,
    "own-memory": lambda params, **k: no.MemoryOptimizer(params, RowMemory(), **{"lr": 0.02, **k}),
    "torch-adamw": lambda params: torch.optim.AdamW(params, lr=0.05),
    "torch-muon": torch_muon,
    "torch-adafactor": lambda params: MENDED[torch.optim.Adafactor](params, lr=0.05),
    "torch-rprop": lambda params: MENDED[torch.optim.Rprop](params, lr=0.05),
}
STEPS = 5


def collectors(optimizer: torch.optim.Optimizer) -> list[no.DeltaGD]:
    """Which collects inputs of layers: the optimizer, or the one inside it."""
    return [each for each in (optimizer, getattr(optimizer, "inner", None)) if isinstance(each, no.DeltaGD)]


def attached(build: Build, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = build(model.parameters())
    for each in collectors(optimizer):
        each.attach(model)
    return optimizer


def loss(model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=g, dtype=torch.float64) * torch.arange(1, 9).view(8, 1)
    y = torch.randn(8, 1, generator=g, dtype=torch.float64)
    return nn.functional.mse_loss(model(x.chunk(world)[rank]), y.chunk(world)[rank])


def sharded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for part in (model.first, model.high):
        fully_shard(part)
    return fully_shard(model)


def through_a_file(build: Build, model: nn.Module, optimizer, folder: str):
    """A new optimizer of the model with the state of the old one, which went through a checkpoint."""
    optimizer.zero_grad()  # or DCP would not make the states of the new one
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=folder)
    for each in collectors(optimizer):
        each.detach()
    new = attached(build, model)
    state = {"optimizer": get_optimizer_state_dict(model, new)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, new, state["optimizer"])
    return new


def difference(build: Build, start: nn.Module, folder: str) -> float:
    """Largest difference of a parameter after some steps, a checkpoint among them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain, parts = copy.deepcopy(start), sharded(start)
    one, many = attached(build, plain), attached(build, parts)
    for step in range(STEPS):
        if step == 3:
            many = through_a_file(build, parts, many, folder)
        for model, optimizer, place in ((plain, one, (0, 1)), (parts, many, (rank, world))):
            optimizer.zero_grad()
            loss(model, step, *place).backward()
            optimizer.step()
    pairs = zip(parts.parameters(), plain.parameters(), strict=True)
    return max(float((p.full_tensor() - q).detach().abs().max()) for p, q in pairs)


def states_in_shards(build: Build, start: nn.Module) -> bool:
    """Whether a state of a parameter's shape lies in shards as the parameter does."""
    model = sharded(start)
    optimizer = attached(build, model)
    loss(model, 0, dist.get_rank(), dist.get_world_size()).backward()
    optimizer.step()
    found = [
        isinstance(value, DTensor) and value.placements == p.placements
        for p, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor) and name in getattr(optimizer, "parameter_shaped", ())
    ]
    return all(found)


def nonfinite(build: Build, start: nn.Module) -> list[str]:
    """What an element that is NaN in the shard of the last process does in this one."""
    said = []
    for raising in (False, True):
        model = sharded(start)
        optimizer = build(model.parameters(), error_if_nonfinite=raising)
        if isinstance(optimizer, no.DeltaGD):
            optimizer.attach(model)
        loss(model, 0, dist.get_rank(), dist.get_world_size()).backward()
        before = [p.full_tensor().clone() for p in model.parameters()]
        if dist.get_rank() == dist.get_world_size() - 1:
            model.second.weight.grad.to_local()[0, 0] = math.nan
        try:
            optimizer.step()
            said.append(f"skipped {optimizer.skipped_steps}")
        except FloatingPointError as error:
            said.append(str(error))
        changed = [
            not torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), before, strict=True)
        ]
        said.append(f"{sum(changed)} changed")
    return said


def refusals(start: nn.Module) -> list[str]:
    said = []
    model = sharded(start)
    dmgd = no.DeepMomentumGD(model.parameters())
    early = copy.deepcopy(start)
    delta = no.DeltaGD(early.parameters()).attach(early)
    fully_shard(early)
    delta.param_groups[0]["params"] = list(early.parameters())  # as accelerate does
    loss(early, 0, 0, 1).backward()
    stale = copy.deepcopy(start)
    preconditioned = given(stale.parameters())
    fully_shard(stale)
    preconditioned.param_groups[0]["params"] = list(stale.parameters())
    loss(stale, 0, 0, 1).backward()
    for call in (lambda: dmgd.step(create_graph=True), delta.step, preconditioned.step):
        try:
            call()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def work(rank: int, world: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    start = Model().double()
    found: dict[str, object] = {"refusals": refusals(start)}
    for name, build in BUILDS.items():
        try:
            result: dict[str, object] = {"difference": difference(build, start, f"{path}/{name}")}
            if not name.startswith("torch"):
                result["sharded"] = states_in_shards(build, start)
            if name in CASES:
                result["nonfinite"] = nonfinite(build, start)
        except Exception as error:  # which is what the test shows
            result = {"error": f"{type(error).__name__}: {error}"}
        found[name] = result
    Path(f"{path}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_take_the_step_of_the_whole(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (2, port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name in BUILDS:
        assert first[name].get("difference", 1) < 1e-10, (name, first[name])
        assert first[name].get("sharded", True), name
        assert second[name]["difference"] < 1e-10, name
        if name in CASES:
            skipped, unchanged, message, unchanged_too = first[name]["nonfinite"]
            assert (skipped, unchanged, unchanged_too) == ("skipped 1", "0 changed", "0 changed"), name
            assert "parameter 2 of group 0, shape (6, 6)" in message
            assert second[name]["nonfinite"] == first[name]["nonfinite"]
    graph, late, stale = first["refusals"]
    assert "needs whole parameters" in graph
    assert "attach(model) after fully_shard" in late
    assert "make the optimizer after fully_shard" in stale


def test_delta_gd_on_layers_that_are_wrapped_by_themselves(tmp_path):
    """In one process, since a hook is to find the weight of such a layer in shards again."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        assert difference(delta_gd, Model().double(), str(tmp_path / "state")) < 1e-10
    finally:
        dist.destroy_process_group()
