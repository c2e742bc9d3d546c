"""Traces of what memory layers do while a model reads a text, and the hooks that note them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nested_learning.layers.memory import MemoryLayer
from nested_learning.layers.memory.signals_at import signals_at
from nested_learning.memory.running import MemoryState
from nested_learning.memory.state import Weights

Array = NDArray[np.floating]
PIECE = 64  # most tokens of a call, so that what is held does not grow with the text


def as_array(x: Tensor) -> Array:
    """A tensor's numbers in float64."""
    return x.detach().cpu().double().numpy()


@dataclass(frozen=True, eq=False)
class MemoryTrace:
    """Trace of one memory layer over T tokens: H heads, N memories, P probes, M moments.

    Attributes:
        name: the module's, such as "layers.0.mixer".
        kind: its class.
        layer: index of the block it belongs to.
        chunk_size: tokens between boundaries of the memory that is read out.
        memories: their names; the last is read out.
        surprise: [T] ‖M(k) − v̂‖ over all heads, at the anchor.
        eta, alpha: [T, H] learning rate and retention of each token.
        mu: [T, H] decay of the momentum, None without one.
        probes: [P] indices of the tokens whose keys are asked for again.
        recall: [M, P] 1 − ‖M(k) − v̂‖² / ‖v̂‖² over all heads, of the memory that is read out with its weights
            of the moment, k and v̂ those of the probe when it was read; NaN before that.
        cosine: [M, P] cosine of M(k) and v̂.
        singular_values: by matrix of the memory that is read out, [M, H, n], falling.
        distance: [M, N, H] Frobenius norm of weights − initial weights, over all matrices of a memory.
        initial_norm: [N, H] norm of the initial weights.
    """

    name: str
    kind: str
    layer: int
    chunk_size: int
    memories: tuple[str, ...]
    surprise: Array
    eta: Array
    alpha: Array
    mu: Array | None
    probes: NDArray[np.int64]
    recall: Array
    cosine: Array
    singular_values: dict[str, Array]
    distance: Array
    initial_norm: Array

    @property
    def rates(self) -> dict[str, Array]:
        """Rates of each token [T, H] by letter; μ where there is a momentum."""
        return {"η": self.eta, "α": self.alpha} | ({} if self.mu is None else {"μ": self.mu})


class MemoryWatch:
    """Notes what a memory layer does with one row.

    Args:
        name: the layer's name in the model, without "model.".
        index: index of its block.
        layer: the layer.
        probes: [P] indices of tokens whose keys are asked for again, rising.

    Attributes:
        counts: whether calls of the layer are readings of the text, which ask for the surprise: a CMS that
            learns from the loss runs the layers again, and does not.
    """

    def __init__(self, name: str, index: int, layer: MemoryLayer, probes: Tensor) -> None:
        self.name, self.index, self.layer, self.probes = name, index, layer, probes
        self.counts = False
        self.state: MemoryState | None = None
        self.tokens = 0  # read and noted
        self._now: list[dict[str, Tensor]] = []  # of the calls of the present piece
        self._noted: dict[str, list[Array]] = {"surprise": [], "eta": [], "alpha": [], "mu": []}
        self._key: list[Tensor] = []  # [H, P', d] of the probes so far
        self._target: list[Tensor] = []
        self._looks: dict[str, list[Array]] = {"recall": [], "cosine": [], "distance": []}
        self._singular: dict[str, list[Array]] = {name: [] for name in layer.system.architecture.matrices}
        dtype = torch.promote_types(layer.in_proj.weight.dtype, torch.float32)
        self._initial = self._weights(layer.initial_weights(1, dtype))

    def __call__(self, module: Any, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        """Forward hook of the layer; tokens in front of the text, such as persistent ones, come with it."""
        if not self.counts:
            return
        given = dict(zip(("x", "state", "mask"), args, strict=False)) | options
        x, real, surprise = given["x"], given.get("mask"), output[2]
        if real is not None:
            x, surprise = x[:, real[0]], surprise[:, real[0]]
        if not x.shape[1]:
            return
        self.state = output[1]
        s, target = signals_at(self.layer, x, given.get("state"))
        found = {"surprise": surprise[0], "eta": s.gates.eta[0].T, "alpha": s.gates.log_alpha[0].exp().T}
        if s.gates.log_mu is not None:
            found["mu"] = s.gates.log_mu[0].exp().T
        self._now.append({**found, "key": s.k[0].transpose(0, 1), "target": target[0].transpose(0, 1)})

    def end_piece(self, count: int, look: bool) -> None:
        """Note the last `count` tokens of the calls since the last piece; `look` at the memory after them."""
        joined = {
            name: torch.cat([call[name] for call in self._now])[-count:] for name in self._now[0]
        }  # [count, …]
        self._now = []
        for name, parts in self._noted.items():
            if name in joined:
                parts.append(as_array(joined[name]))
        inside = (self.probes >= self.tokens) & (self.probes < self.tokens + count)
        chosen = (self.probes[inside] - self.tokens).to(joined["key"].device)
        self._key.append(joined["key"][chosen].transpose(0, 1))
        self._target.append(joined["target"][chosen].transpose(0, 1))
        self.tokens += count
        if look:
            self.look()

    def trace(self) -> MemoryTrace:
        """Everything that was noted."""
        system, noted = self.layer.system, {n: np.concatenate(p) for n, p in self._noted.items() if p}
        looks = {name: np.stack(found) for name, found in self._looks.items()}
        return MemoryTrace(
            name=self.name,
            kind=type(self.layer).__name__,
            layer=self.index,
            chunk_size=system.chunk_size,
            memories=system.memories,
            surprise=noted["surprise"],
            eta=noted["eta"],
            alpha=noted["alpha"],
            mu=noted.get("mu"),
            probes=self.probes.numpy(),
            singular_values={name: np.stack(found) for name, found in self._singular.items()},
            initial_norm=_norms(self._initial),
            **looks,
        )

    def look(self) -> None:
        """Note recall of the probes so far, distance from the start, and singular values, as they are now."""
        weights = self._initial if self.state is None else self._weights(self.state.current)
        moved = {name: W - self._initial[name] for name, W in weights.items()}
        self._looks["distance"].append(_norms(moved))
        for name, W in weights.items():
            last = W[-1].cpu()
            known = bool(last.isfinite().all())
            values = torch.linalg.svdvals(last) if known else last.new_full(_ranks(last), torch.nan)
            self._singular[name].append(as_array(values))
        recall, cosine = self._answers()
        for name, values in (("recall", recall), ("cosine", cosine)):
            whole = np.full(len(self.probes), np.nan, dtype=np.float64)
            whole[: len(values)] = values
            self._looks[name].append(whole)

    def _answers(self) -> tuple[Array, Array]:
        """Recall and cosine of the probes so far."""
        if self.state is None:
            return np.zeros(0), np.zeros(0)
        key, target = torch.cat(self._key, 1), torch.cat(self._target, 1)
        now = dataclasses.replace(self.state, anchor=self.state.current)  # what `recall` reads
        answer = self.layer.recall(key.unsqueeze(0), now)[0]
        size, length = target.square().sum((0, 2)), answer.square().sum((0, 2))
        recall = 1 - (answer - target).square().sum((0, 2)) / size
        return as_array(recall), as_array((answer * target).sum((0, 2)) * (length * size).rsqrt())

    def _weights(self, stored: Weights) -> Weights:
        """The weights [N, H, out, in] of the one row."""
        return {name: self.layer.system.retention.weights(A)[0] for name, A in stored.items()}


def cuts(count: int, sizes: Iterable[int]) -> list[int]:
    """Ends of the pieces of so many tokens, 0 in front: all multiples of the sizes, and of `PIECE`."""
    inside = {stop for size in {*sizes, PIECE} for stop in range(size, count, size)}
    return [0, *sorted(inside), count]


@contextmanager
def watching(blocks: Any, probes: Tensor) -> Iterator[list[MemoryWatch]]:
    """Watches on all memory layers of Hope's blocks, inside the scope."""
    watches: list[MemoryWatch] = []
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            inside = [
                MemoryWatch(f"layers.{index}.{name}", index, module, probes)
                for name, module in block.named_modules()
                if isinstance(module, MemoryLayer)
            ]
            if not inside or not getattr(block.mixer, "has_surprise", False):
                continue
            for watch in inside:
                hook = watch.layer.register_forward_hook(watch, with_kwargs=True)
                stack.callback(hook.remove)
            switch = _Switch(inside)
            stack.callback(block.register_forward_pre_hook(switch.on, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(switch.off).remove)
            watches += inside
        yield watches


class _Switch:
    """Hooks of a block: its forward passes count that are asked for the surprise."""

    def __init__(self, watches: list[MemoryWatch]) -> None:
        self.watches = watches

    def on(self, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        for watch in self.watches:
            watch.counts = options.get("return_surprise", False)

    def off(self, module: Any, args: Any, output: Any) -> None:
        for watch in self.watches:
            watch.counts = False


def _norms(weights: Weights) -> Array:
    """[N, H] Frobenius norms over all matrices [N, H, out, in]."""
    return as_array(torch.stack([W.square().sum((-2, -1)) for W in weights.values()]).sum(0).sqrt())


def _ranks(W: Tensor) -> tuple[int, int]:
    return W.shape[0], min(W.shape[-2:])
