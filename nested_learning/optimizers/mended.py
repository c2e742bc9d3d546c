"""Optimizers of torch as `build` makes them, where torch's own fall short.

On shards (FSDP2) the arithmetic of some fails: Newton-Schulz, means of rows and columns, and a step back per
element are operations that torch has not for every layout of a DTensor. Under half precision some go on from
a state_dict with rounded numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nested_learning.optimizers.base import MAX_GATHERED
from nested_learning.optimizers.saved_state import restore_scalars
from nested_learning.optimizers.sharded import aligned, is_sharded, like, local, whole, working


class _WholeStep(Optimizer):
    """The step of `rule`, taken on whole parameters by every process alike where they lie in shards.

    Groups, states and their names are those of `rule`.
    """

    rule: ClassVar[type[Optimizer]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for part in _parts([p for p in group["params"] if p.grad is not None]):
                self._step(group, part)
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        complete = [whole(p) if is_sharded(p) else p for p in params]
        for p, all_of_it in zip(params, complete, strict=True):
            if is_sharded(p) and p.grad is not None:
                all_of_it.grad = whole(aligned(p, p.grad))
        # The rule itself, for this step: it holds nothing but what stands in groups and states.
        inner = self.rule([{**group, "params": complete}])  # type: ignore[call-arg]
        with working(self.state, params, True):
            for p, all_of_it in zip(params, complete, strict=True):
                inner.state[all_of_it] = self.state[p]
            inner.step()
        for p, all_of_it in zip(params, complete, strict=True):
            if is_sharded(p):
                local(p).copy_(local(like(p, all_of_it, True)))


def _parts(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters, as many together as may be whole at one time."""
    parts: list[list[Tensor]] = []
    elements = 0
    for p in params:
        elements += p.numel()
        if not parts or elements > MAX_GATHERED:
            parts.append([])
            elements = p.numel()
        parts[-1].append(p)
    return parts


class Muon(_WholeStep, torch.optim.Muon):
    """torch.optim.Muon."""

    rule = torch.optim.Muon


class Adafactor(_WholeStep, torch.optim.Adafactor):
    """torch.optim.Adafactor."""

    rule = torch.optim.Adafactor


class Rprop(_WholeStep, torch.optim.Rprop):
    """torch.optim.Rprop."""

    rule = torch.optim.Rprop


class _ExactScalars(Optimizer):
    """An optimizer whose 0-D states keep their dtype when they are loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        super().load_state_dict(state_dict)
        restore_scalars(self, state_dict)


class NAdam(_ExactScalars, torch.optim.NAdam):
    """torch.optim.NAdam."""


class ASGD(_ExactScalars, torch.optim.ASGD):
    """torch.optim.ASGD."""


MENDED: dict[type[Optimizer], type[Optimizer]] = {
    torch.optim.Muon: Muon,
    torch.optim.Adafactor: Adafactor,
    torch.optim.Rprop: Rprop,
    torch.optim.NAdam: NAdam,
    torch.optim.ASGD: ASGD,
}
