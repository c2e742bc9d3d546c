"""The step of a matrix memory whose gradients are taken at every token: the delta rule, in closed form.

Linear attention, RetNet, DeltaNet, Gated DeltaNet and OjaNet. Chunks are only a way of computing here: no
anchor enters the result. One memory, so without the memory axis: W is [B, H, d, d].
"""

from __future__ import annotations

from torch import Tensor

from nested_learning.memory.running import Inputs, MemoryState
from nested_learning.memory.signals import gates
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.delta_rule.one_token import ONE, SEVERAL


def step(
    system: MemorySystem, initial: Weights, state: MemoryState, inputs: Inputs, want_surprise: bool
) -> tuple[Tensor, Weights, Weights | None, Tensor | None]:
    """C tokens: y [B, H, C, d], weights and momentum after them, and the surprise [B, C] if wanted.

    The gradient of an objective that sees the answer is M(k) − v at the decayed weights (eq 65-66); its
    −M(k) is an erase at the rate α_t η_t, its v the write η_t v kᵀ.
    """
    name = system.architecture.output
    k, v, q = (inputs.paths[name] for name in ("k", "v", "q"))  # projections: no memory generates them
    gate = gates(system, inputs.gates, k, inputs.real)
    x, target = (v, k) if system.objective.transposed else (k, v)
    erase = write = None
    if system.objective.sees_answer:
        erase = gate.eta * gate.log_alpha.exp()
    elif system.rule[name].erase:
        erase = gate.eta
    if inputs.real is not None and system.momentum:  # a padded token takes nothing from the momentum either
        write = inputs.real.unsqueeze(1).to(gate.eta.dtype)
    kind, decay = ONE if k.shape[2] == 1 else SEVERAL
    chunk = kind(
        state.current[name].squeeze(1),
        x,
        gate.rate.unsqueeze(-1) * target,
        decay(gate.log_alpha),
        erase=erase,
        S=None if state.momentum is None else state.momentum[name].squeeze(1),
        mu=None if gate.log_mu is None else decay(gate.log_mu),
        write=write,
        W_init=initial[name].squeeze(0) if system.rule[name].retain == "initial" else None,
    )
    y = chunk.read_transposed(q) if system.objective.transposed else chunk.read(q)
    surprise = None
    if want_surprise:  # at the weights as the token meets them
        error = chunk.answer_before() - target
        surprise = error.detach().square().sum((1, 3)).sqrt()
    W, S = chunk.final()
    return y, {name: W.unsqueeze(1)}, None if S is None else {name: S.unsqueeze(1)}, surprise
