"""Two processes with half the inputs each take the step of one process with all of them."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nested_learning.optimizers import DeltaGD


def train(rank: int, processes: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=g, dtype=torch.float64) * torch.arange(1, 9).view(8, 1)
    y = torch.randn(8, 2, generator=g, dtype=torch.float64)
    wrapped: nn.Module = model
    if processes > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
        wrapped = DistributedDataParallel(model)
    optimizer = DeltaGD(model.parameters(), lr=0.1).attach(model)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x.chunk(processes)[rank]), y.chunk(processes)[rank]).backward()
        optimizer.step()
    torch.save([p.detach() for p in model.parameters()], f"{path}/{processes}-{rank}.pt")
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    train(0, 1, port, str(tmp_path))
    mp.spawn(train, (2, port, str(tmp_path)), nprocs=2)
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for a, b, c in zip(one, first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert torch.equal(b, c)
