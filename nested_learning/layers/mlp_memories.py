"""MLP memories of the table with static projections: TTT-MLP, DLA and the MIRAS family.

Each is a `MemoryLayer` with one MLP memory per head, k, v, q = unit(SiLU(conv(x W))) and gradients taken at
the chunk's anchor. What holds for all, for stability over many chunks (ours): the hidden matrices, and with
`norm="output"` the output matrix too, are retained towards their initial values, and their gradients are
clipped to norm 1 per token.
"""

from __future__ import annotations

from typing import Literal

from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.registry import register_mixer
from nested_learning.memory.compose import compose
from nested_learning.memory.description import Read

Norm = Literal["hidden", "output"]


@register_mixer("ttt_mlp")
class TTTMLP(MemoryLayer):
    """TTT-MLP (arXiv 2407.04620): an MLP memory, gradient descent on ½‖M(k) − v‖² per chunk,
    nothing is forgotten.

    Args:
        hidden_size: D, the width of the input.
        num_heads: H; head width d = D / H.
        chunk_size: tokens between the boundaries at which the memory is re-anchored.
        expansion: hidden width of the memory as a multiple of d; None for 1.
        depth: matrices of the memory, 1 to 4; 1 has no hidden layer and takes no expansion.
        momentum: pass writes through a momentum with data-dependent decay.
        read: "token" reads the weights after each token's write, "chunk" the anchor.
        conv_size: width of the causal convolution in front of the memory, 0 for none.
        eta_max: upper bound of the inner learning rate; None for min(0.5, 4 / chunk_size), at which a chunk
            cannot overshoot.

    Raises:
        ValueError: as in `MemoryLayer` and `compose`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        expansion: float | None = None,
        depth: int = 2,
        momentum: bool = False,
        read: Read = "token",
        conv_size: int = 4,
        eta_max: float | None = None,
    ) -> None:
        system = compose(
            expansion=expansion,
            depth=depth,
            decay="none",
            momentum=momentum,
            chunk_size=chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size)


@register_mixer("dla")
class DLA(MemoryLayer):
    """Deep linear attention (arXiv 2505.23735): an MLP memory with the dot-product objective −⟨M(k), v⟩,
    gradient descent with momentum, data-dependent retention.

    Args: as in `TTTMLP`, and
        max_half_life: spread the heads' half-lives at the start of training from 38 tokens to this; None for
            38 tokens in all.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        expansion: float | None = None,
        depth: int = 2,
        momentum: bool = True,
        read: Read = "token",
        conv_size: int = 4,
        eta_max: float | None = None,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(
            objective="dot",
            expansion=expansion,
            depth=depth,
            momentum=momentum,
            chunk_size=chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)


@register_mixer("moneta")
class Moneta(MemoryLayer):
    """Moneta (MIRAS, arXiv 2504.13173): objective ‖M(k) − v‖_p^p, L_q retention. A_t = α_t A_{t−1} − η_t ∇,
    W_t = A_t / ‖A_t‖_q^(q−2), the norm over each head's matrix.

    Within a chunk, reads follow A_t token by token while its norm stays that of the anchor (ours). A is
    retained towards its initial value, as A / ‖A‖^(q−2) grows without bound where A fades (ours).

    Args: as in `DLA`, and
        p: exponent of the objective, at least 1.
        q: exponent of the retention, at least 2.
        norm: "output" is MIRAS' x + LN(W1 gelu(W2 x)), "hidden" normalises the hidden vector instead.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        expansion: float = 4.0,
        p: float = 3.0,
        q: float = 4.0,
        norm: Norm = "output",
        momentum: bool = False,
        read: Read = "token",
        conv_size: int = 4,
        eta_max: float | None = None,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(
            objective="lp",
            p=p,
            form="lq",
            q=q,
            expansion=expansion,
            activation="gelu",
            norm=norm,
            momentum=momentum,
            chunk_size=chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)


@register_mixer("yaad")
class Yaad(MemoryLayer):
    """Yaad (MIRAS, arXiv 2504.13173): Huber's objective with a data-dependent width δ_t, gradient e where
    ‖e‖ ≤ δ_t, else δ_t e/‖e‖; data-dependent retention.

    Args: as in `Moneta`, without the exponents.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        expansion: float = 4.0,
        norm: Norm = "output",
        momentum: bool = False,
        read: Read = "token",
        conv_size: int = 4,
        eta_max: float | None = None,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(
            objective="huber",
            expansion=expansion,
            activation="gelu",
            norm=norm,
            momentum=momentum,
            chunk_size=chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)


@register_mixer("memora")
class Memora(MemoryLayer):
    """Memora (MIRAS, arXiv 2504.13173): L2 objective, KL retention. The logits A_t = α_t A_{t−1} − η_t ∇½‖e‖²
    evolve, and the weights are W = c softmax(A) along each matrix's input dimension, taken at the chunk's
    boundary.

    Reads are those of the anchor: one within the chunk would need a softmax over a matrix of its own.

    Args: as in `Yaad`, without `read`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        expansion: float = 4.0,
        norm: Norm = "output",
        momentum: bool = False,
        conv_size: int = 4,
        eta_max: float | None = None,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(
            form="kl",
            expansion=expansion,
            activation="gelu",
            norm=norm,
            momentum=momentum,
            chunk_size=chunk_size,
            read="chunk",
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)
