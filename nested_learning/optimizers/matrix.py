"""Optimizers whose step is a nearly orthogonal matrix: momentum read through Newton-Schulz, and M3.

They act on parameters with exactly two dimensions. All others, biases, norms, convolutions, and whole
groups with `adamw_only=True` (where embeddings and the output head belong), are trained by AdamW with the
learning rate `lr · adamw_lr_scale`, so that one schedule drives both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from nested_learning._precision import bfloat16_is_slow
from nested_learning.ops import newton_schulz
from nested_learning.ops.norm import magnitude
from nested_learning.optimizers.arithmetic import Group, divisible, entry
from nested_learning.optimizers.base import BaseOptimizer, Params
from nested_learning.optimizers.checks import (
    COUNT,
    DECAY,
    FLAG,
    NON_NEGATIVE,
    POSITIVE,
    THREE_DECAYS,
    TWO_DECAYS,
    Bound,
    Check,
    Choice,
)
from nested_learning.optimizers.memory_forms import AdamMemory, memory_direction

MAX_STACKED = 2**24  # elements that one batched Newton-Schulz may hold, per intermediate matrix
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def _iteration_dtype(work: torch.dtype, device: torch.device) -> torch.dtype:
    """What "auto" iterates in: bfloat16 is enough, but on some CPUs 20 times as slow as float32."""
    if work == torch.float64:
        return work
    return torch.float32 if bfloat16_is_slow(device) else torch.bfloat16


def orthogonalise(matrices: list[Tensor], iteration: str, steps: int, dtype: str, eps: float) -> list[Tensor]:
    """Newton-Schulz of each matrix; matrices of one shape, or of its transpose, run as one batch."""
    results: list[Tensor] = list(matrices)
    batches: defaultdict[Any, list[int]] = defaultdict(list)
    for i, M in enumerate(matrices):
        batches[min(M.shape), max(M.shape), M.device, M.dtype].append(i)
    for (short, long, _, work), members in batches.items():
        run_in = _iteration_dtype(work, matrices[members[0]].device) if dtype == "auto" else DTYPES[dtype]
        size = max(1, MAX_STACKED // (short * long))
        for part in (members[i : i + size] for i in range(0, len(members), size)):
            wide = [matrices[i].to(run_in) for i in part]
            wide = [M.mT if M.shape[0] > M.shape[1] else M for M in wide]
            stack = wide[0] if len(wide) == 1 else torch.stack(wide)
            if iteration == "cubic":
                done = newton_schulz.cubic(stack, steps, eps=eps)
            else:
                done = newton_schulz.quintic(stack, steps, eps=eps)
            for i, O in zip(part, [done] if len(wide) == 1 else done.unbind(0), strict=True):  # noqa: E741
                results[i] = (O.mT if matrices[i].shape[0] > matrices[i].shape[1] else O).to(work)
    return results


def shape_factor(rule: str, shape: torch.Size) -> float:
    """The factor of a matrix's step, as `adjust_lr_fn` of torch.optim.Muon computes it."""
    rows, cols = shape
    if rule == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols)) if rule == "match_rms_adamw" else 1.0


class _MatrixRule(BaseOptimizer):
    """A group split into its matrices, which a subclass trains, and the rest, which AdamW trains."""

    options: ClassVar[dict[str, Check]] = {
        **BaseOptimizer.options,
        "ns_steps": Bound(low=1, high=1000, integer=True),
        "ns_dtype": Choice(("auto", *DTYPES)),
        "ns_eps": POSITIVE,
        "adjust_lr": Choice(("original", "match_rms_adamw", "none")),
        "nesterov": FLAG,
        "adamw_only": FLAG,
        "adamw_lr_scale": NON_NEGATIVE,
        "adamw_betas": TWO_DECAYS,
        "adamw_eps": NON_NEGATIVE,
    }
    parameter_shaped = ("momentum", "mean", "square", "slow", "slow_direction")

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        directions = list(grads)
        chosen = [i for i, p in enumerate(params) if p.ndim == 2 and not group["adamw_only"]]
        if chosen:
            matrices = [params[i] for i in chosen]
            found = self._matrix_directions(group, matrices, [grads[i] for i in chosen])
            for i, p, O in zip(chosen, matrices, found, strict=True):  # noqa: E741
                factor = shape_factor(group["adjust_lr"], p.shape)
                directions[i] = O if factor == 1 else O * factor
        memory = AdamMemory(tuple(group["adamw_betas"]), group["adamw_eps"])
        for i in set(range(len(params))) - set(chosen):
            u = memory_direction(memory, self.state[params[i]], grads[i])
            directions[i] = group["adamw_lr_scale"] * u
        return directions

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        return p.ndim == 2 and not group["adamw_only"]

    def _matrix_directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The directions of the matrices, before the factor by shape; updates `self.state`."""
        raise NotImplementedError

    def _orthogonalise(self, group: Group, matrices: list[Tensor]) -> list[Tensor]:
        iteration = group.get("iteration", "quintic")
        return orthogonalise(matrices, iteration, group["ns_steps"], group["ns_dtype"], group["ns_eps"])


class OrthogonalMomentum(_MatrixRule):
    """Momentum with a non-linear output, eq 52: W ← W − lr · σ(m), σ = Newton-Schulz. This is Muon.

    m ← μ m + (1 − μ) g; the matrix given to σ is m, or μ m + (1 − μ) g once more with `nesterov`. The step
    is multiplied by the factor of `adjust_lr`. Equal to torch.optim.Muon with the same options; in addition
    matrices of one shape share one batched iteration, and float64 parameters are iterated in float64.

    Parameters that are not matrices, and groups with `adamw_only=True`: AdamW at lr · adamw_lr_scale.
    State: m, 1×, for matrices; 2× for the rest.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: μ.
        nesterov: look one step ahead.
        iteration: "quintic" (Muon's) or "cubic" (eq 44, whose result is not orthogonal: see
            `ops.newton_schulz.cubic`; it needs `ns_steps` of about 100).
        ns_steps: iterations.
        ns_dtype: "bfloat16", "float32", "float64", or "auto": float64 for float64 parameters, else
            bfloat16, or float32 on a CPU that has no instructions for bfloat16.
        ns_eps: smallest norm that is divided by.
        adjust_lr: "original" √max(1, rows/cols), "match_rms_adamw" 0.2√max(rows, cols), or "none".
        adamw_only: train this group by AdamW.
        adamw_lr_scale: AdamW's learning rate as a multiple of lr.
        adamw_betas, adamw_eps: β₁, β₂ and ε of AdamW.
        weight_decay: decoupled, times lr, for all parameters.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    options: ClassVar[dict[str, Check]] = {
        **_MatrixRule.options,
        "momentum": DECAY,
        "iteration": Choice(("quintic", "cubic")),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        iteration: str = "quintic",
        ns_steps: int = 5,
        ns_dtype: str = "auto",
        ns_eps: float = newton_schulz.DEFAULT_EPS,
        adjust_lr: str = "original",
        adamw_only: bool = False,
        adamw_lr_scale: float = 1.0,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def _matrix_directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        mu = group["momentum"]
        momenta = [entry(self.state[p], "momentum", g) for p, g in zip(params, grads, strict=True)]
        torch._foreach_lerp_(momenta, grads, 1 - mu)  # m ← μ m + (1 − μ) g
        read = torch._foreach_lerp(grads, momenta, mu) if group["nesterov"] else momenta
        return self._orthogonalise(group, list(read))  # eq 52: u = σ(m)


class M3(_MatrixRule):
    """Multi-scale momentum Muon, Algorithm 1: a fast and a slow momentum, both orthogonalised.

    `paper_exact=True`, as printed, with sums that only grow:
        M₁ ← M₁ + β₁g, V ← V + β₂g²; before steps f + 1, 2f + 1, … M₂ ← M₂ + β₃ Σ(the last f gradients) and
        O₂ = NS(M₂), with O₂ = 0 before; W ← W − lr · (NS(M₁) + α O₂)/(√V + ε).
    M₁ then weighs the first gradient like the last, and 1/√V shrinks the step as 1/√t without end.
    The default (ours): averages M₁ ← β₁M₁ + (1 − β₁)g, V ← β₂V + (1 − β₂)g² (corrected for its start at
    zero), M₂ ← β₃M₂ + (1 − β₃)Σ; with `nesterov`, β₁M₁ + (1 − β₁)g is read in the place of M₁, as Muon
    does; and U = (NS(M₁) + α O₂)/(√V + ε) is brought back to the Frobenius norm of its numerator, so that
    the step has Muon's size whatever the units of the loss:
    W ← W − lr · factor · U ‖NS(M₁) + α O₂‖/‖U‖.
    M₂ takes each gradient as it comes; only its reading waits for the end of a block.
    With these defaults its loss is below Muon's on two language models (docs/log.md).

    Parameters that are not matrices, and groups with `adamw_only=True`: AdamW at lr · adamw_lr_scale.
    State: M₁, M₂, V and O₂, 4×, for matrices; 2× for the rest.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: (β₁, β₂, β₃).
        alpha: α, the weight of the slow direction.
        eps: ε.
        frequency: f, steps per block of the slow momentum.
        ns_steps, ns_dtype, ns_eps: Newton-Schulz, as for `OrthogonalMomentum`.
        paper_exact: the printed sums instead of averages.
        nesterov: look one step ahead; by default True, with `paper_exact`, which has none, False.
        adjust_lr: factor by shape, as for `OrthogonalMomentum`; by default "original", with `paper_exact`
            "none".
        adamw_only, adamw_lr_scale, adamw_betas, adamw_eps: as for `OrthogonalMomentum`.
        weight_decay: decoupled, times lr; not part of the paper's form.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    options: ClassVar[dict[str, Check]] = {
        **_MatrixRule.options,
        "betas": THREE_DECAYS,
        "alpha": NON_NEGATIVE,
        "eps": POSITIVE,
        "frequency": COUNT,
        "paper_exact": FLAG,
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.99, 0.9),
        alpha: float = 0.1,
        eps: float = 1e-8,
        frequency: int = 10,
        ns_steps: int = 5,
        paper_exact: bool = False,
        nesterov: bool | None = None,
        ns_dtype: str = "auto",
        ns_eps: float = newton_schulz.DEFAULT_EPS,
        adjust_lr: str | None = None,
        adamw_only: bool = False,
        adamw_lr_scale: float = 1.0,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        nesterov = not paper_exact if nesterov is None else nesterov
        adjust_lr = adjust_lr or ("none" if paper_exact else "original")
        super().__init__(params, locals())

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["paper_exact"] and group["nesterov"]:
            raise ValueError(
                "nesterov=True goes with averages; Algorithm 1 (paper_exact=True) has none. Set "
                "nesterov=False where paper_exact is set."
            )

    def _matrix_directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Algorithm 1 as printed, or the same with averages; the bias corrections belong to the averages."""
        beta1, beta2, _ = group["betas"]
        exact = group["paper_exact"]
        states = [self.state[p] for p in params]
        slow = self._slow_directions(group, states, grads)
        fast = [entry(state, "momentum", g) for state, g in zip(states, grads, strict=True)]
        square = [entry(state, "square", g) for state, g in zip(states, grads, strict=True)]
        if exact:
            torch._foreach_add_(fast, grads, alpha=beta1)  # M₁ ← M₁ + β₁ g
            torch._foreach_addcmul_(square, grads, grads, value=beta2)  # V ← V + β₂ g²
        else:
            torch._foreach_lerp_(fast, grads, 1 - beta1)  # M₁ ← β₁ M₁ + (1 − β₁) g
            torch._foreach_mul_(square, beta2)
            torch._foreach_addcmul_(square, grads, grads, value=1 - beta2)  # V ← β₂ V + (1 − β₂) g²
        read = list(torch._foreach_lerp(grads, fast, beta1)) if group["nesterov"] else fast
        directions = self._orthogonalise(group, read)
        torch._foreach_add_(directions, slow, alpha=group["alpha"])  # NS(M₁) + α O₂
        denominators = torch._foreach_sqrt(square)
        if not exact:
            torch._foreach_div_(denominators, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
        torch._foreach_add_(denominators, divisible(group["eps"], square[0].dtype))  # √V + ε
        if exact:
            torch._foreach_div_(directions, denominators)
            return directions
        return [_keeping_norm(N, N / d) for N, d in zip(directions, denominators, strict=True)]

    def _slow_directions(
        self, group: Group, states: list[dict[str, Any]], grads: list[Tensor]
    ) -> list[Tensor]:
        """O₂ = NS(M₂) of each matrix, read anew at a block's end; then M₂ takes the gradient.

        Algorithm 1 adds the gradients of a block to M₂ at the block's end. Adding each as it comes gives the
        same M₂ there and needs no second sum. Counts the step.
        """
        beta3, exact = group["betas"][2], group["paper_exact"]
        for state, g in zip(states, grads, strict=True):
            state.setdefault("step", 0)
            entry(state, "slow", g)
            entry(state, "slow_direction", g)
        due = [s for s in states if s["step"] > 0 and s["step"] % group["frequency"] == 0]
        for state, direction in zip(due, self._orthogonalise(group, [s["slow"] for s in due]), strict=True):
            state["slow_direction"] = direction
            if not exact:
                state["slow"].mul_(beta3)
        # over a block M₂ ← M₂ + β₃ Σ g, or M₂ ← β₃ M₂ + (1 − β₃) Σ g
        torch._foreach_add_([s["slow"] for s in states], grads, alpha=beta3 if exact else 1 - beta3)
        for state in states:
            state["step"] += 1
        return [state["slow_direction"] for state in states]


def _keeping_norm(N: Tensor, U: Tensor) -> Tensor:
    """U ‖N‖_F/‖U‖_F, for numbers of any size; a zero matrix stays zero."""
    s, t = magnitude(N), magnitude(U)
    U = U.div_(t)
    return U.mul_(s * (N / s).norm() / U.norm().clamp(min=torch.finfo(U.dtype).tiny))
