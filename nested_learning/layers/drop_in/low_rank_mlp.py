"""An MLP that rewrites itself: a low-rank change of its output weights, generated from what it has read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.effective import effective, effective_matrix, input_dtype
from nested_learning.layers.token_inputs import as_sequence, check_count, check_state, find_documents
from nested_learning.memory import check
from nested_learning.memory.state import State
from nested_learning.ops import delta_rule
from nested_learning.ops.context import full_precision
from nested_learning.ops.documents import Documents
from nested_learning.ops.norm import unit

_RETENTION_BIAS = 4.0  # α about 0.98: an average over some fifty tokens


@dataclass(frozen=True)
class LowRankMLPState(State):
    """The state of a `LowRankSelfModifyingMLP`.

    Attributes:
        context: [B, context_size] float32 (float64 for float64 inputs), the running summary c_t of each row.
    """

    context: Tensor


class LowRankSelfModifyingMLP(nn.Module):
    """y_t = (W + ΔW_t) σ(W_up x_t + b_up) + b with ΔW_t = Σ_{i ≤ rank} u_i v_iᵀ of each row's own context.

    The layer keeps a decaying average c of what it has read and generates the factors from its direction
    ĉ = c/‖c‖ **(ours)**. σ is the GELU; α_t is the retention, the part that is kept, and 1 − α_t the decay:

        α_t = sigmoid(⟨w, x_t⟩ + b_α),   c_t = α_t c_{t−1} + (1 − α_t) P x_t,   c_0 = 0,
        u_{i,t} = U_i ĉ_t  [dim],   v_{i,t} = V_i ĉ_t  [hidden_size].

    ΔW_t includes token t and is never formed: it is applied as Σ u_i ⟨v_i, h⟩, at rank · (dim + hidden_size)
    products a token. The context depends on inputs alone, so nothing feeds back on itself. U starts at
    zero: the layer is exactly the MLP without ΔW and, as V does not, U receives a gradient at once.

    Args:
        dim: width of input and output.
        rank: largest rank of ΔW.
        hidden_size: hidden width; None for 4 · dim.
        context_size: width of c; None for dim / 4, rounded up.
        chunk_size: number of tokens that are worked off together; it changes the cost, not the result.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 1,
        hidden_size: int | None = None,
        context_size: int | None = None,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        self.hidden_size = 4 * dim if hidden_size is None else hidden_size
        self.context_size = -(-dim // 4) if context_size is None else context_size
        self.dim, self.rank, self.chunk_size = dim, rank, chunk_size
        for name in ("rank", "hidden_size", "context_size", "chunk_size"):
            check_count(name, getattr(self, name))
        self.up = nn.Linear(dim, self.hidden_size)
        self.down = nn.Linear(self.hidden_size, dim)
        self.context_proj = nn.Linear(dim, self.context_size, bias=False)  # P
        self.retention = nn.Linear(dim, 1)
        self.left = nn.Linear(self.context_size, rank * dim, bias=False)  # U
        self.right = nn.Linear(self.context_size, rank * self.hidden_size, bias=False)  # V
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter; ΔW starts at zero."""
        for linear in (self.up, self.down, self.context_proj):
            linear.reset_parameters()
        nn.init.zeros_(self.retention.weight)
        nn.init.constant_(self.retention.bias, _RETENTION_BIAS)
        nn.init.zeros_(self.left.weight)
        nn.init.normal_(self.right.weight, std=self.hidden_size**-0.5)  # ‖v_i‖ is about 1

    def part_names(self) -> dict[str, str]:
        """Handles of the parts; see `nested_learning.parts`."""
        return {"": "projections", "up": "mlp", "down": "mlp", "retention": "gates"}

    def extra_repr(self) -> str:
        return f"{self.dim}, rank={self.rank}, context_size={self.context_size}, chunk_size={self.chunk_size}"

    def forward(
        self,
        x: Tensor,
        state: LowRankMLPState | None = None,
        mask: Tensor | None = None,
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, LowRankMLPState | None]:
        """Read the tokens into the context and apply the MLP as each token's context changes it.

        Args:
            x: [B, T, dim], or [B, dim]: one token per row.
            state: from an earlier call on the same rows; None starts from an empty context.
            mask: [B, T] (or [B]) bool, True = real token. A padded token changes nothing, its output is zero.
            documents, position_ids: where documents in a row begin, see `find_documents`.

        Returns: y of x's shape, in x's dtype (that of the autocast region, if one is active), and the state
            after the last token of the row, None with a `Documents` that keeps none.

        Raises:
            ValueError: when x, mask, state, documents or position_ids do not fit.
        """
        tokens, real = as_sequence(x, self.dim, mask, self.up)
        if state is not None:
            check_state(state, LowRankMLPState, x, {"context": (tokens.shape[0], self.context_size)})
        before = None if state is None else state.recordable().context
        packed = find_documents(tokens, real, state is not None, documents, position_ids)
        if packed is None:
            context, last = self._read(tokens, before, real)
        else:
            context, last = packed.read(
                lambda x, before, real, _: self._read(x, before, real), tokens, before, self.chunk_size
            )
        if check.enabled():
            check.check_values("memory", context=context)
        h = F.gelu(self.up(tokens))  # [B, T, hidden]
        u, v = self._factors(context, h.dtype)  # [B, T, rank, dim], [B, T, rank, hidden]
        along = v @ h.unsqueeze(-1)  # ⟨v_i, h⟩ [B, T, rank, 1]
        y = self.down(h) + (u.mT @ along).squeeze(-1)
        if real is not None:
            y = y.masked_fill(~real.unsqueeze(-1), 0)
        return y.view(x.shape), None if last is None else LowRankMLPState(last)

    def weight_change(self, state: LowRankMLPState) -> Tensor:
        """ΔW of each row [B, dim, hidden_size], as the state's context generates it."""
        u, v = self._factors(state.context, input_dtype(self.left))
        return u.mT @ v

    def _read(self, x: Tensor, before: Tensor | None, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """c_t at every token [B, T, context_size], and c_T [B, context_size]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with full_precision(x.device):
            x = x.to(dtype)
            weight, bias = effective(self.retention, x)
            assert bias is not None  # __init__
            retention = F.linear(x, weight.to(dtype), bias.to(dtype))
            log_alpha = F.logsigmoid(retention.squeeze(-1))  # [B, T]
            write = -torch.expm1(log_alpha).unsqueeze(-1) * F.linear(
                x, effective_matrix(self.context_proj, x).to(dtype)
            )
            if real is not None:
                log_alpha = log_alpha.masked_fill(~real, 0)  # x = 0 there, so the write vanishes too
            if before is None:
                before = x.new_zeros(x.shape[0], self.context_size)
            start = before.to(dtype).unsqueeze(-1)
            # The context is a matrix memory [context_size, 1] whose one input is always 1, without erase.
            ones = x.new_ones(x.shape[1], 1)
            context, last, _ = delta_rule.chunked(
                start, ones, write, log_alpha, q=ones, chunk_size=self.chunk_size
            )
        assert context is not None  # queries were given
        return context, last.squeeze(-1)

    def _factors(self, context: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """u [..., rank, dim] and v [..., rank, hidden_size] from c [..., context_size]."""
        direction = unit(context).to(dtype)
        return (
            self.left(direction).unflatten(-1, (self.rank, self.dim)),
            self.right(direction).unflatten(-1, (self.rank, self.hidden_size)),
        )
