"""Tokens of a call, [B, T, D] or one per row [B, D]: their checks, their norm, and documents in a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nested_learning.layers.initial_memories import InitialMemories
from nested_learning.memory import check
from nested_learning.memory.state import State
from nested_learning.ops.documents import Documents
from nested_learning.ops.heads import rms_norm

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the last dimension, which single tokens on a CPU pass in fewer kernels.

    Args:
        size: D, the width that is normalised over.
        eps: added to the mean square.
    """

    weight: nn.Parameter
    eps: float

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


_PLAIN = (nn.Linear, nn.Conv1d, RMSNorm, nn.ParameterList, InitialMemories)


def is_plain(module: nn.Module, kinds: Collection[type] | None = _PLAIN) -> bool:
    """Whether a module is what it was built as, so that its parameters may be read past its forward pass.

    It is not under an adapter or a parametrization (another class), a mask or another hook, offloaded by
    accelerate (a forward of its own), with quantised or sharded weights (tensor subclasses). Hooks that only
    look at what passes say so by an attribute `observes`. See `layers.effective` for what is read instead.
    Its class is one of `kinds`; None: it may be any.
    """
    if kinds is not None and type(module) not in kinds:
        return False
    if module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    for hook in module._forward_hooks.values():
        if not getattr(hook, "observes", False):
            return False
    for p in module._parameters.values():
        if type(p) is not nn.Parameter and p is not None and is_traceable_wrapper_subclass(p):
            return False
    return True


def as_sequence(
    x: Tensor, width: int, mask: Tensor | None, module: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """x as [B, T, width] and mask as [B, T]; padded tokens become zero vectors.

    Args:
        x: [B, T, width], or [B, width]: one token per row.
        mask: bool of x's shape without its last dimension, True = real token; None: all are real.
        module: one with a `weight`, whose device and dtype x must have (any floating dtype inside an autocast
            region), unless accelerate moves inputs and weights, or the weight is quantised.

    Raises:
        ValueError: where shape, dtype or device do not fit.
        FloatingPointError: for values that are not finite, with NESTED_LEARNING_CHECK=1.
    """
    check_sequence(x, width, mask, module, or_token=True)
    x = without_padding(x, mask)
    if x.dim() == 2:
        return x.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
    return x, mask


def check_sequence(
    x: Tensor, width: int, mask: Tensor | None, module: nn.Module, or_token: bool = False
) -> None:
    """Raise unless x is [B, T, width], or with `or_token` [B, width], and goes with mask and layer.

    Arguments and errors as in `as_sequence`.
    """
    if x.dim() not in ((2, 3) if or_token else (3,)) or x.shape[-1] != width or not x.shape[-2]:
        also = f", or [B, {width}] for one token per row; got" if or_token else ", got"
        raise ValueError(f"x must be [B, T >= 1, {width}]{also} {tuple(x.shape)}")
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        weight = x  # quantised by a module that keeps it to itself, and checks its inputs itself
    if x.device != weight.device and not hasattr(module, "_hf_hook"):
        raise ValueError(f"x is on {x.device}, the layer on {weight.device}; move one with .to(device)")
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast):
        raise ValueError(f"x must be {weight.dtype} as the layer's weights are, got {x.dtype}")
    if mask is not None and (
        mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device
    ):
        raise ValueError(
            f"mask must be bool {tuple(x.shape[:-1])} (True = real token) on {x.device}, got "
            f"{mask.dtype} {tuple(mask.shape)} on {mask.device}; an integer attention mask becomes "
            "one by mask.bool()"
        )
    if check.enabled():
        check.check_values("input", x=without_padding(x, mask))


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, T] or [B, T, D] with zeros where `mask` is False: padding may hold NaN, and 0 · NaN is NaN."""
    return x if mask is None else x.masked_fill(~mask.view(mask.shape + (1,) * (x.dim() - mask.dim())), 0)


def check_state(state: State, kind: type[State], x: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `state` is a `kind` on x's device whose tensors have these shapes, batch first."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state must be a {kind.__name__}, got {type(state).__name__}: it is another layer's"
        )
    for name, shape in shapes.items():
        tensor = getattr(state, name)
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f"state.{name} must be {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}: "
                "the state belongs to another batch or to a layer of other sizes"
            )


def check_count(name: str, value: object, least: Literal[0, 1] = 1) -> None:
    """ValueError unless `value` is a positive integer, or 0 where that is the least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least else "0 or a positive integer"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


# Documents in a row (spec section 8) ------------------------------------------------------------------


def find_documents(
    x: Tensor,
    real: Tensor | None,
    given: bool,
    documents: Tensor | Documents | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    keep: bool = True,
) -> Documents | None:
    """The documents of a call, None where each row is at most one that needs no treatment of its own.

    Waits for the device once where something is said.

    Args:
        x: [B, T, ...], the call's tokens.
        real: [B, T] bool, False = padding; None: there is none.
        given: whether there is a state that the rows go on with.
        documents: [B, T] or [1, T] int, constant within a document and another in the next one; a row's first
            document goes on with its state. Or what this function returned before.
        position_ids: [B, T] or [1, T] int; a real token at 0 begins a document, also where it is its row's
            first and there is a state. Those of padding are ignored.
        seq_idx: as `documents`.
        cu_seq_lens_q, cu_seq_lens_k: [documents + 1] int, the first column of each document and T, where
            B = 1.
        keep: whether the states after the call are wanted.

    Raises:
        ValueError: for values that do not fit x, and where two of them disagree about a boundary.
    """
    if isinstance(documents, Documents):
        check_documents(x, documents)
        return documents if len(documents) else None
    if documents is position_ids is seq_idx is cu_seq_lens_q is cu_seq_lens_k is None:
        return None
    if isinstance(x, FakeTensor):
        raise ValueError(
            "where documents begin decides what is computed, which a program of torch.export cannot follow: "
            "leave position_ids and the like away"
        )
    begins = _begins(x, real, documents, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
    found = Documents(begins, real, keep)
    plain = len(found) == len(found.rows.unique()) and (not given or bool(found.goes_on(True).all()))
    return None if plain or not len(found) else found


def document_positions(
    x: Tensor,
    real: Tensor,
    seen: int,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Tensor:
    """[B, T] int64, position_ids that say what the given words say of documents; they themselves, if given.

    Args:
        x, real, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k: as in `find_documents`.
        seen: columns of the state that each row's first document goes on with, 0 without one.

    Raises:
        ValueError: as in `find_documents`.
    """
    begins = _begins(x, real, None, position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k)
    if position_ids is not None:
        return position_ids
    count = real.cumsum(1) - 1  # place among the row's real tokens
    start = torch.where(begins, count, -seen).cummax(1).values
    return count - start


def _begins(
    x: Tensor,
    real: Tensor | None,
    documents: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Tensor:
    """[B, T] bool, tokens that begin a document; arguments and errors as in `find_documents`.

    A row's first real token is among them only where its position says so.
    """
    said: dict[str, Tensor] = {}
    begins = None
    if documents is not None:
        said["documents"] = _changes(_checked("documents", documents, x), real)
    if seq_idx is not None:
        said["seq_idx"] = _changes(_checked("seq_idx", seq_idx, x), real)
    for name, ends in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if ends is not None:
            said[name] = _changes(_numbers(ends, x), real)
    if position_ids is not None:
        begins = _checked("position_ids", position_ids, x) == 0
        begins = begins if real is None else begins & real
        said["position_ids"] = begins & ~_first(begins, real)
    inside = next(iter(said.values()))
    for name, other in said.items():
        if not torch.equal(other, inside):
            raise ValueError(
                f"{next(iter(said))} and {name} disagree about where documents begin; give one of them"
            )
    return inside if begins is None else begins


def check_documents(
    x: Tensor, documents: Tensor | Documents | None = None, position_ids: Tensor | None = None
) -> None:
    """ValueError for what does not fit x [B, T, ...]. Does not wait for the device."""
    if isinstance(documents, Documents):
        if documents.shape != x.shape[:2]:
            raise ValueError(f"documents are those of {[*documents.shape]} tokens, x has {[*x.shape[:2]]}")
    elif documents is not None:
        _checked("documents", documents, x)
    if position_ids is not None:
        _checked("position_ids", position_ids, x)


def _checked(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`value` as [B, T] on x's device; [B] will do for one token per row."""
    B, T = x.shape[:2]
    if T == 1 and isinstance(value, Tensor) and value.dim() == 1:
        value = value.unsqueeze(1)
    shapes = ([B, T], [1, T])
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS or list(value.shape) not in shapes:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be an integer tensor [batch, tokens] = {[B, T]}, or {[1, T]} for all, got {got}"
        )
    return value.to(x.device).expand(B, T)


def _numbers(cu_seq_lens: Tensor, x: Tensor) -> Tensor:
    """[1, T], the number of each token's document."""
    B, T = x.shape[:2]
    if B != 1:
        raise ValueError(
            f"cu_seq_lens cut one row into documents, but there are {B}: put all tokens into one, or give "
            "position_ids"
        )
    bounds = cu_seq_lens.tolist() if isinstance(cu_seq_lens, Tensor) and cu_seq_lens.dim() == 1 else []
    if not bounds or bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        got = bounds or cu_seq_lens
        raise ValueError(f"cu_seq_lens must rise from 0 to the number of tokens {T}, got {got}")
    columns = torch.arange(T, device=x.device)
    return torch.bucketize(columns, cu_seq_lens.to(x.device, torch.long), right=True).unsqueeze(0)


def _changes(number: Tensor, real: Tensor | None) -> Tensor:
    """[B, T] bool, real tokens whose number is not that of the real token before them in the row."""
    if real is None:
        changes = torch.zeros_like(number, dtype=torch.bool)
        changes[:, 1:] = number[:, 1:] != number[:, :-1]
        return changes
    columns = torch.arange(number.shape[1], device=number.device)
    latest = torch.where(real, columns, -1).cummax(1).values  # the last real token up to each column
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    return real & (before >= 0) & (number != number.gather(1, before.clamp_min(0)))


def _first(like: Tensor, real: Tensor | None) -> Tensor:
    """[B, T] bool, each row's first real token."""
    if real is None:
        first = torch.zeros_like(like)
        first[:, :1] = True
        return first
    return real & (real.cumsum(1) == 1)
