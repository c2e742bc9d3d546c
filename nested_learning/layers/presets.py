"""Titans and self-modifying Titans: rows of the table, each a `MemorySystem` and nothing else."""

from __future__ import annotations

from nested_learning.layers.memory_layer import MemoryLayer
from nested_learning.layers.registry import register_mixer
from nested_learning.memory.compose import compose
from nested_learning.memory.description import Read, RuleName


@register_mixer("self_modifying_titans")
class SelfModifyingTitans(MemoryLayer):
    """Self-modifying Titans (arXiv 2512.24695, eq 83-93): memories that generate their own keys, values,
    learning rate, retention and targets, and learn all of them in context.

    Departures from the paper, for stability over many chunks: generated k, v and targets are scaled down
    to norm 1 where they exceed it, hidden vectors are normalised, W2 is retained towards its initial value
    and not erased, its gradient is clipped per token.

    Args:
        hidden_size: D, the width of the input.
        num_heads: H; head width d = D / H.
        chunk_size: tokens between the boundaries at which the memory that is read out is re-anchored.
        projection_chunk_size: the same for the generating memories; None for `chunk_size`. One of the two
            must divide the other.
        expansion: hidden width of a memory as a multiple of d.
        rule: "dgd" (spec section 3, the stable form), "dgd_literal" (as printed) or "gd" (no erase).
        momentum: pass writes through a momentum with data-dependent decay.
        read: "token" reads the weights after each token's write, "chunk" the anchor (eq 90).
        adaptive_q: queries come from a memory too, instead of a static projection.
        conv_size: width of the causal convolution in front of the memories, 0 for none.
        momentum_scaled: a write enters the momentum scaled by 1 − μ; False is the printed form.
        eta_max: upper bound of the inner learning rate; None for the rule's stable bound.
        max_half_life: spread the heads' half-lives at the start of training from 38 tokens to this; None for
            38 tokens in all.

    Raises:
        ValueError: for an unknown rule or read, chunk lengths that do not divide each other, widths that
            do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        projection_chunk_size: int | None = None,
        expansion: float = 1.0,
        rule: RuleName = "dgd",
        momentum: bool = False,
        read: Read = "token",
        adaptive_q: bool = False,
        conv_size: int = 4,
        momentum_scaled: bool = True,
        eta_max: float | None = None,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(
            expansion=expansion,
            rule=rule,
            generated=("k", "v", "q", "eta", "alpha") if adaptive_q else ("k", "v", "eta", "alpha"),
            self_targets=True,
            momentum=momentum,
            momentum_scaled=momentum_scaled,
            chunk_size=chunk_size,
            projection_chunk_size=projection_chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)


@register_mixer("titans")
class Titans(MemoryLayer):
    """Titans' long-term memory as a sequence layer (arXiv 2501.00663, section 3): one MLP memory with static
    projections, L2 objective, gradient descent with momentum and data-dependent retention.

    Retention pulls the memory's input matrix towards its initial value rather than to zero, which is what
    keeps long sequences stable (spec section 3).

    Args: as in `SelfModifyingTitans`; `rule` "gd" is the paper's, "dgd" adds the erase.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        chunk_size: int = 64,
        expansion: float = 1.0,
        momentum: bool = True,
        read: Read = "token",
        conv_size: int = 4,
        rule: RuleName = "gd",
        momentum_scaled: bool = True,
        eta_max: float | None = None,
        max_half_life: float | None = None,
    ) -> None:
        system = compose(
            expansion=expansion,
            rule=rule,
            momentum=momentum,
            momentum_scaled=momentum_scaled,
            chunk_size=chunk_size,
            read=read,
            eta_max=eta_max,
        )
        super().__init__(hidden_size, num_heads, system, conv_size, max_half_life)
