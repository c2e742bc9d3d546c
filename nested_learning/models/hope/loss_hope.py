"""The language-modelling loss, in the precision of the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.ops.context import has_values

IGNORED = -100


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of label t + 1 under the logits at t.

    transformers' own loss casts to float32; this one runs in float64 for a float64 model. Without any label
    that counts (all −100, or T = 1) it is 0, with gradients of zero, not the NaN of an empty mean: a batch
    that is masked throughout must not end a run.

    Args:
        logits: [B, T, vocab_size], computed with in float32 at least.
        labels: [B, T] int, unshifted; −100 is not counted; None where `shift_labels` are given.
        vocab_size: number of tokens.
        num_items_in_batch: divide the sum by this instead of by the number of labels that count.
        shift_labels: [B, T] int, labels that are shifted already and take the place of `labels`.

    Raises:
        ValueError: for labels of another shape, not integer, or, checked on the CPU only (elsewhere it would
            wait for the device), out of range.
    """
    if shift_labels is None:
        assert labels is not None
        _check(logits, labels, vocab_size)
        # Shift the labels rather than cut the logits, which would copy them.
        targets = F.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
    else:
        _check(logits, shift_labels, vocab_size)
        targets = shift_labels.long()
    targets = targets.to(logits.device).flatten()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(
        logits.reshape(-1, vocab_size).to(dtype), targets, ignore_index=IGNORED, reduction="sum"
    )
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device).clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _check(logits: Tensor, labels: Tensor, vocab_size: int) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be an integer tensor [batch, tokens], got {type(labels).__name__}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must be [batch, tokens] = {list(logits.shape[:2])}, as the input, "
            f"got {list(labels.shape)}; the loss shifts `labels` itself, and `shift_labels` not at all"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integer token ids, got {labels.dtype}")
    if not has_values(labels):
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"labels must lie in 0..{vocab_size - 1}, or be {IGNORED} where nothing is to be predicted, "
            f"got {int(wrong[0])}"
        )
