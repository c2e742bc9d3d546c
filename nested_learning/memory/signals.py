"""The signals that drive a step of the scan: keys, values, queries and gates.

Shapes: B batch, N memories, H heads, C tokens of one step, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.memory.description import MemorySystem
from nested_learning.memory.retention import constant_log_decay
from nested_learning.ops.norm import clip_norm

# The input path that each generating memory reads (spec section 3, "Paths").
PATH_OF = {"k": "k", "v": "v", "q": "q", "eta": "k", "alpha": "k"}
# The generating memory whose output each gate is read from.
SOURCE_OF_GATE = {"eta": "eta", "alpha": "alpha", "mu": "eta", "width": "eta"}


class Signals(NamedTuple):
    """What drives the writes and reads of one step; [B, H, C, d] or [B, H, C]."""

    k: Tensor
    v: Tensor
    q: Tensor
    eta: Tensor
    log_alpha: Tensor
    log_mu: Tensor | None
    width: Tensor | None  # of Huber's objective


class Readouts(NamedTuple):
    """Vectors that turn a generating memory's output into a gate: [gates, H, d] and [gates, H]."""

    weight: Tensor
    bias: Tensor


class StepInputs(NamedTuple):
    """The inputs of one step."""

    paths: Mapping[str, Tensor]  # "k", "v", "q": [B, H, C, d]
    gates: Tensor | None  # [gates, B, H, C] logits where gates are static projections
    write: Tensor | None  # [B, C] True = real token; None: all are


def generate_signals(
    system: MemorySystem, anchor: Mapping[str, Tensor], inputs: StepInputs, readouts: Readouts | None
) -> Signals:
    """k, v, q and the gates of one step: outputs of the generating memories, or static projections.

    A generated vector, like a generated target, is bounded to norm 1, not normalised to it. A memory that
    makes its own keys feeds back on itself from chunk to chunk: what it learned moves the key, which moves
    what it learns. Normalising a short M(x) amplifies that by 1/‖M(x)‖, enough for the outer gradient to grow
    a hundredfold within a few chunks; scaling down only never amplifies (docs/log.md, 2026-11-23).
    """
    vectors, logits = dict(inputs.paths), inputs.gates
    if system.generated:
        generated = dict(zip(system.generated, _generate(system, anchor, inputs.paths), strict=True))
        for name in ("k", "v", "q"):
            if name in generated:
                vectors[name] = clip_norm(generated[name])
        if readouts is not None:
            sources = [generated[SOURCE_OF_GATE[gate]] for gate in system.gates]
            per_gate = [(s * w.unsqueeze(1)).sum(-1) for s, w in zip(sources, readouts.weight, strict=True)]
            logits = torch.stack(per_gate) + readouts.bias[:, None, :, None]
    by_name = {} if logits is None else dict(zip(system.gates, logits.unbind(0), strict=True))
    eta, log_alpha = _rate(system, by_name, vectors["k"]), _log_retention(system, by_name, vectors["k"])
    # in log space from end to end: log(sigmoid) underflows to -inf
    log_mu = F.logsigmoid(by_name["mu"]) if system.momentum else None
    if inputs.write is not None:
        # a padded token neither erases, nor writes, nor decays anything
        real = inputs.write.unsqueeze(1).to(eta.dtype)
        eta, log_alpha = eta * real, log_alpha * real
        log_mu = None if log_mu is None else log_mu * real
    width = F.softplus(by_name["width"]) if "width" in by_name else None
    return Signals(vectors["k"], vectors["v"], vectors["q"], eta, log_alpha, log_mu, width)


def _rate(system: MemorySystem, logits: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """η_t [B, H, C]."""
    if "eta" in logits:
        return system.eta_max * torch.sigmoid(logits["eta"])
    return like.new_ones(like.shape[:-1])


def _log_retention(system: MemorySystem, logits: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """log α_t [B, H, C]."""
    if "alpha" in logits:
        return F.logsigmoid(logits["alpha"])
    if system.retention.decay == "none":
        return like.new_zeros(like.shape[:-1])
    return constant_log_decay(like.shape[1], like).unsqueeze(-1).expand(like.shape[:-1])


def _generate(
    system: MemorySystem, anchor: Mapping[str, Tensor], paths: Mapping[str, Tensor]
) -> Sequence[Tensor]:
    """The generating memories' outputs, each [B, H, C, d].

    The memory that is read out runs along and its answer is dropped: leaving it out would cut the stacked
    weights, and copying those costs more than the product.
    """
    x = torch.stack([paths[PATH_OF[name]] for name in (*system.generated, "q")], dim=1)
    return system.architecture.read(x, lambda name, x: x @ anchor[name].mT).unbind(1)[:-1]
