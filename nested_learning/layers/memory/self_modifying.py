"""Self-modifying Titans: the row whose memories generate their own signals and targets (eq 83-93)."""

from __future__ import annotations

from typing import Any

from nested_learning.layers.memory.row import MemoryRow
from nested_learning.memory.compose import compose
from nested_learning.memory.system import MemorySystem


class SelfModifyingTitans(
    MemoryRow,
    name="self_modifying_titans",
    options={
        "chunk_size": ...,
        "projection_chunk_size": ...,
        "expansion": ...,
        "rule": "dgd",
        "momentum": ...,
        "read": ...,
        "adaptive_q": ...,
        "conv_size": ...,
        "momentum_scaled": ...,
        "eta_max": ...,
        "max_half_life": ...,
        "projection_eta_max": ...,
    },
    self_targets=True,
):
    """Self-modifying Titans (arXiv 2512.24695, eq 83-93): memories that generate their own keys, values,
    learning rate, retention and targets, and learn all of them in context.

    All memories share one η and one α. What the generating ones learn shifts the signals of all later tokens,
    further with each chunk; with `projection_eta_max` they learn and forget more slowly, or, with 0, keep
    what training gave them, so that sequences longer than those of training meet the same signals (ours).

    Departures from the paper, for stability over many chunks: generated k, v and targets are scaled down
    to norm 1 where they exceed it, hidden vectors are normalised, W2 is retained towards its initial value
    and not erased, its gradient is clipped per token.
    """

    @classmethod
    def build_system(cls, **chosen: Any) -> MemorySystem:
        # eq 86; q is a projection unless asked for (the paper's default, and better in its Table 6)
        adaptive_q = chosen.pop("adaptive_q")
        generated = ("k", "v", "q", "eta", "alpha") if adaptive_q else ("k", "v", "eta", "alpha")
        return compose(generated=generated, **cls.parts, **chosen)
