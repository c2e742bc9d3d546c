"""Chunk-parallel form of the delta-rule recurrence: exact, in matrix products and one triangular solve.

Notation as in README.md: rows of X are the inputs of a chunk, gamma_t = prod_{s<=t} alpha_s,
Gamma_ts = gamma_t / gamma_s for s <= t, and likewise for mu. `log_*` arguments are natural logarithms.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.delta_rule.triangular import solve_unit_lower

# exp(-80) is zero beside 1 in float64 too; the bound keeps differences of cumulative sums finite when a
# decay underflows to log 0 = -inf.
LOG_FLOOR = -80.0


class Decay:
    """Products of decays within a chunk, from their logarithms [..., C].

    Attributes (gamma_t = prod_{s<=t} of the decays):
        since_start: [..., C] gamma_t.
        between: [..., C, C] Gamma_ts = gamma_t / gamma_s for s <= t, else 0.

    Differences of the cumulative logs are masked before the exponential: above the diagonal they are
    positive and may overflow, and inf * 0 is NaN in the backward pass.
    """

    def __init__(self, log_decay: Tensor) -> None:
        total = log_decay.clamp_min(LOG_FLOOR).cumsum(-1)  # [..., C]
        C = log_decay.shape[-1]
        future = torch.ones(C, C, dtype=torch.bool, device=log_decay.device).triu(1)
        difference = total.unsqueeze(-1) - total.unsqueeze(-2)
        self.since_start = total.exp()
        self.between = difference.masked_fill(future, float("-inf")).exp()

    @property
    def before_start(self) -> Tensor:
        """[..., C] gamma_{t-1}, 1 at the first token: what is left of W0 when t arrives."""
        return F.pad(self.since_start[..., :-1], (1, 0), value=1.0)


def _shift_rows(P: Tensor) -> Tensor:
    """Rows one down, zeros in the first: what holds before the token of that row. P [..., C, C]."""
    return F.pad(P[..., :-1, :], (0, 0, 1, 0))


def _last_of(tensor: Tensor, dim: int) -> Tensor:
    """The last index along a dimension, which stays with size 1."""
    return tensor.narrow(dim, tensor.shape[dim] - 1, 1)


class Chunk:
    """One chunk of the recurrence: solve once, then read at any queries and take the final state.

    Args:
        W: [..., d_out, d_in] weights before the chunk.
        x: [..., C, d_in] inputs;  a: [..., C, d_out] writes.
        alpha: the retention, as a `Decay`: chunks of equal decays share one.
        erase, write: [..., C] erase rate and write factor, None for zeros and ones.
        S: [..., d_out, d_in] momentum before the chunk, None for zero; only with `mu`.
        mu: the momentum decay, None for no momentum.
        W_init: [..., d_out, d_in] the weights that retention pulls towards, None for zero.
        Wx: [..., C, d_out] the product W x if the caller has it already (the layer's own forward pass).
    """

    def __init__(
        self,
        W: Tensor,
        x: Tensor,
        a: Tensor,
        alpha: Decay,
        erase: Tensor | None = None,
        S: Tensor | None = None,
        mu: Decay | None = None,
        write: Tensor | None = None,
        W_init: Tensor | None = None,
        Wx: Tensor | None = None,
    ) -> None:
        self.W, self.x, self.a, self.S, self.W_init = W, x, a, S, W_init
        self.alpha, self.mu = alpha, mu
        self.P: Tensor  # [..., C, C] with momentum: sum_r Gamma_tr w_r M_rs, what W_t holds of the write at s
        self.c: Tensor  # [..., C] with momentum: the same for S0
        if self.mu is not None:
            gated = self.alpha.between if write is None else self.alpha.between * write.unsqueeze(-2)
            self.P = gated @ self.mu.between
            self.c = (gated @ self.mu.since_start.unsqueeze(-1)).squeeze(-1)
        elif write is not None:
            self.a = a = a * write.unsqueeze(-1)
        self.B = None if erase is None else self._erased(erase, Wx)

    def _erased(self, erase: Tensor, Wx: Tensor | None) -> Tensor:
        """B_t = -erase_t W_{t-1} x_t [..., C, d_out]; without momentum the write is merged in, B_t + a_t."""
        x, alpha = self.x, self.alpha
        rate = erase.unsqueeze(-1)  # [..., C, 1]
        gram = x @ x.mT  # [..., C, C]
        if Wx is None:
            Wx = x @ self.W.mT
        left = alpha.before_start.unsqueeze(-1)  # left of W when the token arrives
        # strictly lower triangular, as the shifted Gamma is
        system = gram * (rate * _shift_rows(alpha.between))
        if self.mu is None and self.W_init is None:
            return solve_unit_lower(system, torch.addcmul(self.a, rate * left, Wx, value=-1))
        held = self._held(gram, Wx)
        right = self.a - rate * held if self.mu is None else -rate * held
        return solve_unit_lower(system, right)

    def select_last(self, dim: int) -> Chunk:
        """The chunk of the last index along `dim` (counted in x, a and W alike, so negative), size 1 kept.

        Reads only: `final` needs the whole.
        """
        part = copy.copy(self)
        for name in ("W", "x", "a", "S", "B", "W_init"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.dim() >= -dim:
                setattr(part, name, _last_of(tensor, dim))
        decays = self.alpha.since_start  # [..., C], so the dimension is one nearer to the end
        if decays.dim() >= -dim - 1 and decays.shape[dim + 1] > 1:  # they are not the same along it
            part.alpha = copy.copy(self.alpha)
            part.alpha.since_start = _last_of(decays, dim + 1)
            part.alpha.between = _last_of(self.alpha.between, dim)
            if self.mu is not None:
                part.P, part.c = _last_of(self.P, dim), _last_of(self.c, dim + 1)
        return part

    def read(self, q: Tensor) -> Tensor:
        """o_t = W_t q_t, after the write of token t. q [..., C, d_in] -> [..., C, d_out]."""
        scores = q @ self.x.mT  # [..., C, C]
        left = self.alpha.since_start.unsqueeze(-1)
        out = q @ self.W.mT
        out = left * out if self.W_init is None else torch.lerp(q @ self.W_init.mT, out, left)
        if self.mu is None:
            return out + (scores * self.alpha.between) @ (self.a if self.B is None else self.B)
        out = out + (scores * self.P) @ self.a
        if self.S is not None:
            out = out + self.c.unsqueeze(-1) * (q @ self.S.mT)
        if self.B is not None:
            out = out + (scores * self.alpha.between) @ self.B
        return out

    def read_transposed(self, q: Tensor) -> Tensor:
        """o_t = W_tᵀ q_t, after the write of token t; q [..., C, d_out] -> [..., C, d_in].

        Only without momentum and with retention to zero.
        """
        assert self.mu is None and self.W_init is None  # noqa: PT018
        written = self.a if self.B is None else self.B
        left = self.alpha.since_start.unsqueeze(-1)
        return left * (q @ self.W) + ((q @ written.mT) * self.alpha.between) @ self.x

    def answer_before(self) -> Tensor:
        """W_{t-1} x_t [..., C, d_out]: the answer of the weights as token t arrives."""
        gram = self.x @ self.x.mT
        held = self._held(gram, self.x @ self.W.mT)
        if self.mu is None:
            return held + (gram * _shift_rows(self.alpha.between)) @ (self.a if self.B is None else self.B)
        return held if self.B is None else held + (gram * _shift_rows(self.alpha.between)) @ self.B

    def _held(self, gram: Tensor, Wx: Tensor) -> Tensor:
        """Part of W_{t-1} x_t that depends neither on the erases within the chunk nor on plain writes."""
        x, left = self.x, self.alpha.before_start.unsqueeze(-1)  # left of W when the token arrives
        held = left * Wx if self.W_init is None else torch.lerp(x @ self.W_init.mT, Wx, left)
        if self.mu is None:
            return held
        held = held + (gram * _shift_rows(self.P)) @ self.a
        if self.S is not None:
            c_before = F.pad(self.c[..., :-1], (1, 0)).unsqueeze(-1)
            held = held + c_before * (x @ self.S.mT)
        return held

    def final(self) -> tuple[Tensor, Tensor | None]:
        """(W_C, S_C) after the last token; S_C is None without momentum."""
        last = self.alpha.between[..., -1, :].unsqueeze(-1)  # Gamma_Cs [..., C, 1]
        left = self.alpha.since_start[..., -1, None, None]
        W = left * self.W if self.W_init is None else torch.lerp(self.W_init, self.W, left)
        if self.mu is None:
            written = last * (self.a if self.B is None else self.B)
            return _add_product(W, written.mT, self.x), None
        written = self.P[..., -1, :].unsqueeze(-1) * self.a
        if self.B is not None:
            written = written + last * self.B
        S = (self.mu.between[..., -1, :].unsqueeze(-1) * self.a).mT @ self.x
        if self.S is not None:
            W = W + self.c[..., -1, None, None] * self.S
            S = S + self.mu.since_start[..., -1, None, None] * self.S
        return _add_product(W, written.mT, self.x), S


def _add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right, the sum taken inside the product; leading dims broadcast."""
    batch = torch.broadcast_shapes(base.shape[:-2], left.shape[:-2], right.shape[:-2])
    flat = [t.expand(batch + t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (base, left, right)]
    return torch.baddbmm(*flat).view(batch + base.shape[-2:])


def chunked(
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
    chunk_size: int = 64,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The recurrence of this package (spec section 4), exact, `chunk_size` tokens at a time.

    Leading dimensions are free and broadcast against each other; T need not be a multiple of `chunk_size`.
    Differentiable in every tensor argument. Computes in the dtype it is given: pass float32 or float64.
    Long: it describes eleven arguments.

    Args:
        W0: [..., d_out, d_in] initial weights.
        x: [..., T, d_in] inputs of the linear map (keys).
        a: [..., T, d_out] writes, minus learning rate times output gradient.
        log_alpha: [..., T] log of the retention, <= 0.
        erase: [..., T] erase rate; None for none.
        q: [..., T, d_in] queries, read after the write of their token; None for no output.
        S0: [..., d_out, d_in] initial momentum; None for zero. Needs `log_mu`.
        log_mu: [..., T] log of the momentum decay; None for no momentum.
        write: [..., T] factor of the write, 0 for a token that must not write; None for ones.
        W_init: [..., d_out, d_in] what retention pulls towards; None for zero.
        chunk_size: tokens per chunk, any positive number: it changes the cost, not the result.

    Returns:
        o [..., T, d_out] (None without q), W_T [..., d_out, d_in], S_T (None without momentum).

    Raises:
        ValueError: for a chunk_size below 1, an empty sequence, shapes that do not fit, or S0 without log_mu.
    """
    _check(
        {
            "W0": W0,
            "x": x,
            "a": a,
            "log_alpha": log_alpha,
            "erase": erase,
            "q": q,
            "S0": S0,
            "log_mu": log_mu,
            "write": write,
            "W_init": W_init,
        },
        chunk_size,
    )
    W, S, outputs = W0, S0, []
    for start in range(0, x.shape[-2], chunk_size):
        now = slice(start, start + chunk_size)
        chunk = Chunk(
            W,
            x[..., now, :],
            a[..., now, :],
            Decay(log_alpha[..., now]),
            None if erase is None else erase[..., now],
            S,
            None if log_mu is None else Decay(log_mu[..., now]),
            None if write is None else write[..., now],
            W_init,
        )
        if q is not None:
            outputs.append(chunk.read(q[..., now, :]))
        W, S = chunk.final()
    return torch.cat(outputs, dim=-2) if q is not None else None, W, S


def _check(arguments: Mapping[str, Tensor | None], chunk_size: object) -> None:
    """ValueError unless the arguments of `chunked` fit together."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    W0, x = arguments["W0"], arguments["x"]
    assert W0 is not None and x is not None  # noqa: PT018
    T, (d_out, d_in) = x.shape[-2], W0.shape[-2:]
    if T < 1:
        raise ValueError(f"x has no tokens: shape {tuple(x.shape)}, expected [..., T, d_in] with T >= 1")
    endings: dict[str, tuple[int, ...]] = {
        "x": (T, d_in),
        "a": (T, d_out),
        "q": (T, d_in),
        **dict.fromkeys(("log_alpha", "erase", "log_mu", "write"), (T,)),
        **dict.fromkeys(("S0", "W_init"), (d_out, d_in)),
    }
    for name, ending in endings.items():
        tensor = arguments[name]
        if tensor is not None and tensor.shape[-len(ending) :] != ending:
            raise ValueError(
                f"{name} must end in {list(ending)}, got {list(tensor.shape)}: W0 {list(W0.shape)} maps "
                f"{d_in} to {d_out}, and x {list(x.shape)} has {T} tokens"
            )
    if arguments["S0"] is not None and arguments["log_mu"] is None:
        raise ValueError("S0 is given without log_mu: a momentum needs its decay; pass log_mu or drop S0")
