"""Token-by-token reference of the delta-rule recurrence: reads like the equation."""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    W: Tensor,  # [..., d_out, d_in]
    x: Tensor,  # [..., d_in]
    a: Tensor,  # [..., d_out]
    log_alpha: Tensor,  # [...]
    erase: Tensor | None = None,  # [...]
    S: Tensor | None = None,  # [..., d_out, d_in]
    log_mu: Tensor | None = None,  # [...]
    write: Tensor | None = None,  # [...]
    W_init: Tensor | None = None,  # [..., d_out, d_in]
) -> tuple[Tensor, Tensor | None]:
    """One token of the recurrence. Returns (W_t, S_t); S_t is None without `log_mu`."""
    update = a.unsqueeze(-1) * x.unsqueeze(-2)
    if log_mu is not None:
        update = update if S is None else log_mu.exp()[..., None, None] * S + update
        S = update
    alpha = log_alpha.exp()[..., None, None]
    W_next = alpha * W if W_init is None else W_init + alpha * (W - W_init)
    if erase is not None:
        answer = W @ x.unsqueeze(-1)  # [..., d_out, 1]
        W_next = W_next - erase[..., None, None] * answer * x.unsqueeze(-2)
    W_next = W_next + (update if write is None else write[..., None, None] * update)
    return W_next, S if log_mu is not None else None


def naive(
    W0: Tensor,
    x: Tensor,
    a: Tensor,
    log_alpha: Tensor,
    erase: Tensor | None = None,
    q: Tensor | None = None,
    S0: Tensor | None = None,
    log_mu: Tensor | None = None,
    write: Tensor | None = None,
    W_init: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The recurrence as a loop over tokens. Arguments and results as in `chunked`."""
    if S0 is not None and log_mu is None:
        raise ValueError("S0 is given without log_mu: a momentum needs its decay; pass log_mu or drop S0")
    W, S, outputs = W0, S0, []
    for t in range(x.shape[-2]):
        W, S = step(
            W,
            x[..., t, :],
            a[..., t, :],
            log_alpha[..., t],
            None if erase is None else erase[..., t],
            S,
            None if log_mu is None else log_mu[..., t],
            None if write is None else write[..., t],
            W_init,
        )
        if q is not None:
            outputs.append((W @ q[..., t, :].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=-2) if q is not None else None, W, S
