"""A linear layer whose weight is a memory: it goes on learning along the sequence, by DGD (eq 56-57)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning._errors import unknown
from nested_learning.layers.effective import effective
from nested_learning.layers.token_inputs import as_sequence, check_count, check_state, find_documents
from nested_learning.memory import check
from nested_learning.memory.state import State
from nested_learning.ops import delta_rule
from nested_learning.ops.context import full_precision
from nested_learning.ops.documents import Documents
from nested_learning.ops.norm import unit

Mode = Literal["normalised", "literal"]
MODES = ("normalised", "literal")
# Biases of the gates at the start: eta in the middle of its range, alpha about 0.98.
_GATE_BIAS = (0.0, 4.0)


@dataclass(frozen=True)
class SelfModifyingLinearState(State):
    """The state of a `SelfModifyingLinear`.

    Attributes:
        delta: [B, out_features, in_features] float32 (float64 for float64 inputs), the change W_t − W_0 that
            each row's tokens have made.
    """

    delta: Tensor


class SelfModifyingLinear(nn.Module):
    """y_t = W_{t−1} x_t + b, an nn.Linear whose weight learns after every token, by delta gradient descent.

    Each row of the batch has weights W_t of its own that start from the parameter W_0, which is
    meta-learned through the writes. The layer makes its own learning signal: with z_t the input it learns
    from, it answers a learned value vector v_t, and that answer is the target for z_t,

        v_t = z_t + U V z_t,   v̂_t = W_0 v_t,
        η_t = η_max sigmoid(⟨w_η, z_t⟩ + b_η),   α_t = sigmoid(⟨w_α, z_t⟩ + b_α).

    Here α_t is the retention, the part that is kept, and 1 − α_t the decay.

    *normalised* (the default): DGD (arXiv 2512.24695, eq 56-57) with the dot-product objective, i.e. the
    delta rule, at the rate that solves eq 56 exactly; unit-norm inputs and retention towards W_0 **(ours)**:

        z_t = x_t / ‖x_t‖,   η′_t = η_t / (1 + η_t ‖z_t‖²),
        W_t = W_0 + α_t (W_{t−1} − W_0) − η′_t (W_{t−1} z_t − v̂_t) z_tᵀ.

    It contracts towards W z = v̂ at any η.

    *literal*: eq 57 and 88 as printed, with the L2 objective, whose fixed point is half the target, and
    retention towards zero:

        z_t = x_t,   W_t = W_{t−1} (α_t I − η_t x_t x_tᵀ) − η_t (W_{t−1} x_t − v̂_t) x_tᵀ.

    It diverges where η_t ‖x_t‖² stays above 1.

    **(ours)** The target comes from W_0, where eq 87 takes the running weights: so the recurrence is exact
    at every token, whatever the chunk length, and no memory learns from targets that its own writes have
    inflated. `SelfModifyingTitans` is the layer with the paper's targets.

    **At the start** the layer is exactly the nn.Linear with the same weight and bias, and can still learn.
    Normalised: U = 0, so that v̂_t = W_0 z_t and every write is zero; U receives a gradient at once, as W_0
    and η are not zero. Literal: its writes are never zero, so their effect is read through a learned scale s
    [out_features] that starts at zero, y_t = W_0 x_t + s ⊙ (W_{t−1} − W_0) x_t + b **(ours)**; s receives a
    gradient at once. With s = 1 the read is the paper's.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        chunk_size: number of tokens that are worked off together; it changes the cost, not the result.
        mode: "normalised" or "literal".
        value_rank: rank of U V.
        eta_max: upper bound of η_t; None for 1 (normalised), or 0.5 / in_features (literal: stable for inputs
            with entries of mean square below 2).

    Raises:
        ValueError: for an unknown mode, sizes below 1, or an eta_max that is not positive.
    """

    weight: Tensor  # W_0
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        chunk_size: int = 64,
        mode: Mode = "normalised",
        value_rank: int = 8,
        eta_max: float | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features}
        for name, value in {**sizes, "chunk_size": chunk_size, "value_rank": value_rank}.items():
            check_count(name, value)
        if mode not in MODES:
            raise unknown("mode", str(mode), MODES)
        if eta_max is None:
            eta_max = 1.0 if mode == "normalised" else 0.5 / in_features
        if not 0 < eta_max < math.inf:
            raise ValueError(f"eta_max must be a positive number, got {eta_max!r}")
        self.in_features, self.out_features, self.chunk_size = in_features, out_features, chunk_size
        self.mode, self.value_rank, self.eta_max = mode, value_rank, eta_max

        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.value_down = nn.Parameter(torch.empty(value_rank, in_features))  # V
        self.value_up = nn.Parameter(torch.empty(in_features, value_rank))  # U
        self.gates = nn.Linear(in_features, 2)  # logits of eta and alpha
        self.read_scale = nn.Parameter(torch.empty(out_features)) if mode == "literal" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, and the rest so that the layer starts as that nn.Linear."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_memory()

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Initialise the parameters that an nn.Linear does not have; leave weight and bias alone."""
        nn.init.normal_(self.value_down, std=self.value_rank**-0.5)  # ‖V z‖ is about ‖z‖
        nn.init.zeros_(self.value_up)
        nn.init.zeros_(self.gates.weight)
        self.gates.bias.copy_(torch.tensor(_GATE_BIAS))
        if self.read_scale is not None:
            nn.init.zeros_(self.read_scale)

    def part_names(self) -> dict[str, str]:
        """Handles of the parts; see `nested_learning.parts`."""
        return {"": "projections", "weight": "initial", "gates": "gates"}

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, mode={self.mode!r}, "
            f"chunk_size={self.chunk_size}, value_rank={self.value_rank}, eta_max={self.eta_max:g}"
        )

    def forward(
        self,
        x: Tensor,
        state: SelfModifyingLinearState | None = None,
        mask: Tensor | None = None,
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, SelfModifyingLinearState | None]:
        """Apply the layer to each token and learn from it afterwards.

        Args:
            x: [B, T, in_features], or [B, in_features]: one token per row. The memory runs in float32
                (float64 for float64).
            state: from an earlier call on the same rows; None starts from W_0.
            mask: [B, T] (or [B]) bool, True = real token. A padded token changes nothing, its output is zero.
            documents, position_ids: where documents in a row begin, see `find_documents`.

        Returns: y of x's leading shape and out_features, in x's dtype (that of the autocast region, if one is
            active), and the state after the last token of the row, None with a `Documents` that keeps none.

        Raises:
            ValueError: when x, mask, state, documents or position_ids do not fit.
        """
        tokens, real = as_sequence(x, self.in_features, mask, self)
        dtype = torch.promote_types(x.dtype, torch.float32)
        delta = None
        if state is not None:
            shape = (tokens.shape[0], self.out_features, self.in_features)
            check_state(state, SelfModifyingLinearState, x, {"delta": shape})
            delta = state.recordable().delta.to(dtype)
        packed = find_documents(tokens, real, state is not None, documents, position_ids)
        y = F.linear(tokens, self.weight, self.bias)
        with full_precision(x.device):
            if packed is None:
                change, delta = self._learn(tokens.to(dtype), delta, real)
            else:
                change, delta = packed.read(
                    lambda x, delta, real, _: self._learn(x, delta, real),
                    tokens.to(dtype),
                    delta,
                    self.chunk_size,
                )
        if check.enabled():
            check.check_values("memory", read=change, delta=delta)
        y = y + change.to(y.dtype)
        if real is not None:
            y = y.masked_fill(~real.unsqueeze(-1), 0)
        after = None if delta is None else SelfModifyingLinearState(delta)
        return y.view(*x.shape[:-1], self.out_features), after

    def _learn(self, x: Tensor, delta: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(W_{t−1} − W_0) x_t at every token [B, T, out], and W_T − W_0 [B, out, in].

        Runs on D = W − W_0, which starts at an exact zero. W = W_0 + D put into the class's equations moves
        W_0 from the erase term to the write:

            normalised:  D_t = α_t D_{t−1} − η′_t (D_{t−1} z_t) z_tᵀ + η′_t (v̂_t − W_0 z_t) z_tᵀ
            literal:     D_t = −W_0 + α_t (D_{t−1} + W_0) − 2 η_t (D_{t−1} x_t) x_tᵀ
                               + η_t (v̂_t − 2 W_0 x_t) x_tᵀ
        """
        if delta is None:
            delta = x.new_zeros(len(x), self.out_features, self.in_features)
        W0, V, U = (p.to(x.dtype) for p in (self.weight, self.value_down, self.value_up))
        z = unit(x) if self.mode == "normalised" else x
        weight, bias = effective(self.gates, x)
        assert bias is not None  # __init__
        logits = F.linear(z, weight.to(x.dtype), bias.to(x.dtype))
        eta = self.eta_max * torch.sigmoid(logits[..., 0])  # [B, T]
        log_alpha = F.logsigmoid(logits[..., 1])
        if real is not None:
            log_alpha = log_alpha.masked_fill(~real, 0)  # the other terms vanish with z = 0
        target = (z @ V.mT) @ (W0 @ U).mT  # v̂ − W_0 z = W_0 U V z
        if self.mode == "normalised":
            rate = eta / (1 + eta * z.square().sum(-1))  # η′, which solves eq 56 for any ‖z‖
            erase, kept = rate, None  # D decays to zero
        else:
            rate, erase = eta, 2 * eta  # eq 57 erases once, and the gradient of the L2 objective once more
            kept = -W0  # D decays to −W_0, i.e. W to zero
            target = target - F.linear(z, W0)
        # One column more than tokens: column t writes token t − 1 and reads token t.
        out, delta, _ = delta_rule.chunked(
            delta,
            F.pad(z, (0, 0, 1, 0)),
            F.pad(rate.unsqueeze(-1) * target, (0, 0, 1, 0)),
            F.pad(log_alpha, (1, 0)),
            erase=F.pad(erase, (1, 0)),
            q=F.pad(x, (0, 0, 0, 1)),
            W_init=kept,
            chunk_size=self.chunk_size,
        )
        assert out is not None  # queries were given
        change = out[:, :-1]
        return change if self.read_scale is None else change * self.read_scale.to(x.dtype), delta
