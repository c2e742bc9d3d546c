"""Matrix memories of the table: linear attention and its relatives, one d × d matrix W per head.

Each is a `MemoryLayer` with static projections: k, v, q = SiLU(conv(x W)), k and q L2-normalised. The rate
β_t and the retention α_t are scalars per head and token, linear in the layer's input before their sigmoid.
The initial W₀ is zero at the start of training and learned (ours; the originals leave it at zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.registry import register_mixer
from nested_learning.memory.compose import compose
from nested_learning.memory.description import Read
from nested_learning.memory.kernels import Backend


class _FixedRetention(MemoryLayer):
    """A matrix memory whose parts no option changes."""

    parts: ClassVar[Mapping[str, Any]]  # of `compose`

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        conv_size: int = 4,
        backend: Backend = "auto",
    ) -> None:
        system = compose(
            architecture="matrix", gradient="token", unit=("k", "q"), chunk_size=chunk_size, **self.parts
        )
        super().__init__(hidden_size, num_heads, system, conv_size, backend=backend)


@register_mixer("linear_attention")
class LinearAttention(_FixedRetention):
    """Linear attention (eq 64): W_t = W_{t−1} + v_t k_tᵀ, y_t = W_t q_t. Dot-product objective, gradient
    descent with rate 1, nothing is forgotten.

    Args:
        hidden_size: D, the width of the input.
        num_heads: H; head width d = D / H.
        chunk_size: tokens computed at once; it changes the cost, not the result.
        conv_size: width of the causal convolution in front of the memory, 0 for none.
        backend: "torch", "fla" (flash-linear-attention's kernels, on a GPU) or "auto", see `MemoryLayer`.

    Raises:
        ValueError: as in `MemoryLayer`.
    """

    parts: ClassVar = {"objective": "dot", "rate": "one", "decay": "none"}


@register_mixer("retnet")
class RetNet(_FixedRetention):
    """RetNet's retention (arXiv 2307.08621): W_t = α_h W_{t−1} + v_t k_tᵀ with
    α_h = 1 − 2^(−5−h) for head h = 0, 1, …

    Args: as in `LinearAttention`.
    """

    parts: ClassVar = {"objective": "dot", "rate": "one", "decay": "constant"}


@register_mixer("deltanet")
class DeltaNet(_FixedRetention):
    """DeltaNet (eq 65): W_t = W_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, one step of gradient descent on
    ½‖W k − v‖² at every token.

    Args: as in `LinearAttention`.
    """

    parts: ClassVar = {"objective": "l2", "decay": "none"}


@register_mixer("gated_deltanet")
class GatedDeltaNet(MemoryLayer):
    """Gated DeltaNet (arXiv 2412.06464): W_t = α_t W_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ.

    Args: as in `LinearAttention`, and
        max_half_life: spread the heads' half-lives at the start of training from 38 tokens to this; None for
            38 tokens in all.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        conv_size: int = 4,
        max_half_life: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        system = compose(
            architecture="matrix", objective="l2", gradient="token", unit=("k", "q"), chunk_size=chunk_size
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life, backend)


@register_mixer("oja")
class OjaNet(MemoryLayer):
    """OjaNet (eq 66-67): M_t = α_t M_{t−1} + η_t v_t (k_t − M_{t−1}ᵀ v_t)ᵀ with the decayed M in the bracket,
    as in Gated DeltaNet, and unit-norm v; y_t = M_t q_t.

    Args: as in `GatedDeltaNet`, without `backend`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        conv_size: int = 4,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(architecture="matrix", objective="oja", gradient="token", chunk_size=chunk_size)
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)


@register_mixer("ttt_linear")
class TTTLinear(MemoryLayer):
    """TTT-Linear (arXiv 2407.04620): gradient descent on ½‖W k − v‖² with the gradients of a chunk all taken
    at its anchor W_a, W_t = W_{t−1} − η_t (W_a k_t − v_t) k_tᵀ; nothing is forgotten.

    Args: as in `LinearAttention`, without `backend`; here chunk_size is part of the model, and
        read: "token" reads the weights after each token's write, "chunk" the anchor.
        eta_max: upper bound of η_t; None for min(0.5, 4 / chunk_size), at which a chunk cannot overshoot.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        conv_size: int = 4,
        read: Read = "token",
        eta_max: float | None = None,
    ) -> None:
        system = compose(
            architecture="matrix",
            objective="l2",
            decay="none",
            unit=("k", "q"),
            chunk_size=chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size)
