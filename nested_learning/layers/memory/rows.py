"""The table of memories: every row that is a `MemoryRow`, docs/models.md in code.

Matrix memories: one d × d matrix W per head; k, v, q = SiLU(conv(x W)), k and q L2-normalised. The rate β_t
and the retention α_t are scalars per head and token, linear in the layer's input before their sigmoid. The
initial W₀ is zero at the start of training and learned (ours; the originals leave it at zero).

MLP memories: one MLP per head with k, v, q = unit(SiLU(conv(x W))) and gradients taken at the chunk's anchor.
For stability over many chunks (ours) the hidden matrices, and with `norm="output"` the output matrix too, are
retained towards their initial values, and their gradients are clipped to norm 1 per token.
"""

from __future__ import annotations

from typing import Any

from nested_learning.layers.memory.row import MemoryRow

# Matrix memories whose gradient is taken at every token, and their options.
_MATRIX: dict[str, Any] = {"architecture": "matrix", "gradient": "token", "unit": ("k", "q")}
_MATRIX_OPTIONS: dict[str, Any] = {"chunk_size": ..., "conv_size": ..., "backend": ...}
_GATED_OPTIONS: dict[str, Any] = {"chunk_size": ..., "conv_size": ..., "max_half_life": ...}
# MIRAS' memories: M(x) = x + LN(W1 gelu(W2 x)).
_MIRAS: dict[str, Any] = {"activation": "gelu"}
_MIRAS_END: dict[str, Any] = {"conv_size": ..., "eta_max": ..., "max_half_life": ...}


# Matrix memories ------------------------------------------------------------------------------------------


class LinearAttention(
    MemoryRow,
    name="linear_attention",
    options=_MATRIX_OPTIONS,
    objective="dot",
    rate="one",
    decay="none",
    **_MATRIX,
):
    """Linear attention (eq 64): W_t = W_{t−1} + v_t k_tᵀ, y_t = W_t q_t. Dot-product objective, gradient
    descent with rate 1, nothing is forgotten."""


class RetNet(
    MemoryRow,
    name="retnet",
    options=_MATRIX_OPTIONS,
    objective="dot",
    rate="one",
    decay="constant",
    **_MATRIX,
):
    """RetNet's retention (arXiv 2307.08621): W_t = α_h W_{t−1} + v_t k_tᵀ with
    α_h = 1 − 2^(−5−h) for head h = 0, 1, …"""


class DeltaNet(
    MemoryRow,
    name="deltanet",
    options={**_MATRIX_OPTIONS, "eta_max": ...},
    objective="l2",
    decay="none",
    **_MATRIX,
):
    """DeltaNet (eq 65): W_t = W_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, one step of gradient descent on
    ½‖W k − v‖² at every token."""


class GatedDeltaNet(
    MemoryRow,
    name="gated_deltanet",
    options={**_GATED_OPTIONS, "backend": ..., "eta_max": ...},
    objective="l2",
    **_MATRIX,
):
    """Gated DeltaNet (arXiv 2412.06464): W_t = α_t W_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ."""


class OjaNet(
    MemoryRow,
    name="oja",
    options={**_GATED_OPTIONS, "eta_max": ...},
    architecture="matrix",
    objective="oja",
    gradient="token",
):
    """OjaNet (eq 66-67): M_t = α_t M_{t−1} + η_t v_t (k_t − M_{t−1}ᵀ v_t)ᵀ with the decayed M in the bracket,
    as in Gated DeltaNet, and unit-norm v; y_t = M_t q_t."""


class TTTLinear(
    MemoryRow,
    name="ttt_linear",
    options={"chunk_size": ..., "conv_size": ..., "read": ..., "eta_max": ...},
    architecture="matrix",
    objective="l2",
    decay="none",
    unit=("k", "q"),
):
    """TTT-Linear (arXiv 2407.04620): gradient descent on ½‖W k − v‖² with the gradients of a chunk all taken
    at its anchor W_a, W_t = W_{t−1} − η_t (W_a k_t − v_t) k_tᵀ; nothing is forgotten. Here chunk_size is part
    of the model."""


# MLP memories ------------------------------------------------------------------------------------------


class TTTMLP(
    MemoryRow,
    name="ttt_mlp",
    options={
        "chunk_size": ...,
        "expansion": None,
        "depth": ...,
        "momentum": ...,
        "read": ...,
        "conv_size": ...,
        "eta_max": ...,
    },
    decay="none",
):
    """TTT-MLP (arXiv 2407.04620): an MLP memory, gradient descent on ½‖M(k) − v‖² per chunk,
    nothing is forgotten."""


class DLA(
    MemoryRow,
    name="dla",
    options={
        "chunk_size": ...,
        "expansion": None,
        "depth": ...,
        "momentum": True,
        "read": ...,
        "conv_size": ...,
        "eta_max": ...,
        "max_half_life": ...,
    },
    objective="dot",
):
    """Deep linear attention (arXiv 2505.23735): an MLP memory with the dot-product objective −⟨M(k), v⟩,
    gradient descent with momentum, data-dependent retention."""


class Titans(
    MemoryRow,
    name="titans",
    options={
        "chunk_size": ...,
        "expansion": ...,
        "momentum": True,
        "read": ...,
        "conv_size": ...,
        "rule": ...,
        "momentum_scaled": ...,
        "eta_max": ...,
        "max_half_life": ...,
    },
):
    """Titans' long-term memory as a sequence layer (arXiv 2501.00663, section 3): one MLP memory with static
    projections, L2 objective, gradient descent with momentum and data-dependent retention.

    Retention pulls the memory's input matrix towards its initial value rather than to zero, which is what
    keeps long sequences stable (spec section 3). `rule` "gd" is the paper's, "dgd" adds the erase."""


class Moneta(
    MemoryRow,
    name="moneta",
    options={
        "chunk_size": ...,
        "expansion": 4.0,
        "p": ...,
        "q": ...,
        "norm": ...,
        "momentum": ...,
        "read": ...,
        **_MIRAS_END,
    },
    objective="lp",
    form="lq",
    **_MIRAS,
):
    """Moneta (MIRAS, arXiv 2504.13173): objective ‖M(k) − v‖_p^p, L_q retention. A_t = α_t A_{t−1} − η_t ∇,
    W_t = A_t / ‖A_t‖_q^(q−2), the norm over each head's matrix.

    Within a chunk, reads follow A_t token by token while its norm stays that of the anchor (ours). A is
    retained towards its initial value, as A / ‖A‖^(q−2) grows without bound where A fades (ours)."""


class Yaad(
    MemoryRow,
    name="yaad",
    options={
        "chunk_size": ...,
        "expansion": 4.0,
        "norm": ...,
        "momentum": ...,
        "read": ...,
        **_MIRAS_END,
    },
    objective="huber",
    **_MIRAS,
):
    """Yaad (MIRAS, arXiv 2504.13173): Huber's objective with a data-dependent width δ_t, gradient e where
    ‖e‖ ≤ δ_t, else δ_t e/‖e‖; data-dependent retention."""


class Memora(
    MemoryRow,
    name="memora",
    options={"chunk_size": ..., "expansion": 4.0, "norm": ..., "momentum": ..., **_MIRAS_END},
    form="kl",
    read="chunk",
    **_MIRAS,
):
    """Memora (MIRAS, arXiv 2504.13173): L2 objective, KL retention. The logits A_t = α_t A_{t−1} − η_t ∇½‖e‖²
    evolve, and the weights are W = c softmax(A) along each matrix's input dimension, taken at the chunk's
    boundary.

    Reads are those of the anchor: one within the chunk would need a softmax over a matrix of its own."""
