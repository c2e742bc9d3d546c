"""States that the rows of a batch carry from block to block (truncated backpropagation through time)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from nested_learning.layers.attention.softmax import Attention
from nested_learning.memory.state import State
from nested_learning.models import HopeConfig
from nested_learning.models.hope.block_hope import HopeBlock
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.training.data.packing import Sample
from nested_learning.training.data.streams import CarriedDataset

FILES = "carried-{}.safetensors"  # by the first of its rows


def carried_rows(model: PreTrainedModel, data: Dataset[Sample]) -> CarriedRows | None:
    """Where the states of a model that reads `data` are kept; None where they are not carried.

    The model is made ready for it, see `let_all_take_part`.

    Raises:
        ValueError: the model's state grows with every token.
    """
    if not isinstance(data, CarriedDataset):
        return None
    check_carries(model)
    let_all_take_part(model)
    return CarriedRows(cast(HopeConfig, model.config), data.fingerprint(), data.rows)


def check_carries(model: nn.Module) -> None:
    """ValueError for a model whose state grows with every token, and with it the cost of each block."""
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.window is None:
            raise ValueError(
                f"carry_state needs a state of fixed size, but {name} is softmax attention without a window: "
                "its keys and values, and with them time and memory of a step, grow with every token of a "
                "document. Set --model.mixer sliding_window_attention and --model.mixer_options "
                '\'{"sliding_window_attention": {"window": 256}}\', or leave --data.carry_state false'
            )


class _TakesPart(torch.autograd.Function):
    """y, on which parameters have a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.like)


def let_all_take_part(model: nn.Module) -> None:
    """Give the parameters that a step does not come to a gradient of zero, in the place of none.

    Initial memories, and weights of levels that learn in context, count where a document begins, which need
    not be in every step of every process. Processes have to agree about which parameters have a gradient, and
    an optimizer counts steps of all its parameters.
    """

    def touch(block: nn.Module, _: Any, options: dict[str, Any], output: Any) -> Any:
        if options.get("within") is not None or not torch.is_grad_enabled():
            return output
        used = [p for p in block.parameters() if p.requires_grad]
        return _TakesPart.apply(output[0], *used), *output[1:]

    for module in model.modules():
        if isinstance(module, HopeBlock):
            module.register_forward_hook(touch, with_kwargs=True)


class CarriedRows:
    """The states of each row after the block that it read last, and after the one before it.

    Both, because a step whose loss or gradient is not finite is not taken: the checkpoint that is written
    then holds the states from before it. Batches come from a `CarriedDataset`; whichever rows a batch has,
    their states are found by the first of them, so micro-batches and processes each keep those of their own.

    Args:
        config: configuration of the model.
        stream: what the rows read, by its fingerprint.
        rows: rows of all micro-batches and processes.
    """

    def __init__(self, config: HopeConfig, stream: str = "", rows: int = 0) -> None:
        self.config, self.stream, self.rows = config, stream, rows
        self._after: dict[int, dict[int, HopeCache]] = {}  # number of blocks read -> first row -> states
        self._now: tuple[int, int, HopeCache]

    def enter(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the model takes it: with the states that its rows have come to.

        Raises:
            ValueError: it is not the next block of its rows.
        """
        row, block = batch["place"][0].tolist()
        self._after = {read: states for read, states in self._after.items() if read >= block}
        cache = self._after.get(block, {}).get(row) if block else HopeCache(self.config)
        if cache is None:
            raise ValueError(
                f"block {block} of row {row} came without the one before it: states are carried from block "
                "to block, so a CarriedDataset has to be read in its order"
            )
        cache = cache.clone()
        self._now = row, block, cache
        given = {name: value for name, value in batch.items() if name not in ("place", "labels")}
        return {**given, "past_key_values": cache}

    def leave(self) -> None:
        """Keep the states after the batch, detached. To be called after its backward pass."""
        row, block, cache = self._now
        self._after.setdefault(block + 1, {})[row] = _settled(cache)

    def save(self, folder: Path, step: int) -> None:
        """Write the states of this process's rows after `step` blocks, a file per micro-batch."""
        for row, cache in self._after.get(step, {}).items():
            notes = {"stream": self.stream, "row": str(row), "rows": str(self.rows), "blocks": str(step)}
            cache.save(folder / FILES.format(row), notes)

    def load(self, folder: Path, first_rows: Sequence[int], size: int, device: torch.device) -> None:
        """Go on from what `save` wrote, whichever micro-batches and processes it came from.

        Args:
            folder: the checkpoint; its name ends in its number of steps.
            first_rows: first row of each micro-batch of this process.
            size: rows of a micro-batch.
            device: where the states go.

        Raises:
            ValueError: the files are missing or damaged, or of rows that read something else.
        """
        step = int(folder.name.rpartition("-")[2])
        if not step:
            return
        files = {self._first_row(path, step): path for path in folder.glob(FILES.format("*"))}
        self._after = {step: {}}
        for first in first_rows:
            parts = [
                part
                for row, path in sorted(files.items())
                for part in _part(path, range(first - row, first - row + size), self.config)
            ]
            if sum(len(part.tokens_seen) for part in parts if part.tokens_seen is not None) != size:
                raise ValueError(
                    f"the checkpoint {folder} lacks carried states of rows {first} to {first + size - 1}; "
                    "remove that folder to resume from the one before it, or start anew with --overwrite"
                )
            self._after[step][first] = _joined(parts).to(device)

    def _first_row(self, path: Path, step: int) -> int:
        """The first row of a file whose states are those of this run's rows after `step` blocks."""
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        expected = {"rows": str(self.rows), "stream": self.stream, "blocks": str(step)}
        for name, value in expected.items():
            if notes.get(name) != value:
                got = {
                    "rows": f"another number of rows ({notes.get(name)}, this run has {value})",
                    "stream": "rows that read another text, or the same in another order",
                    "blocks": f"another step ({notes.get(name)}, the checkpoint is of {value})",
                }[name]
                raise ValueError(
                    f"{path} holds the carried states of {got}. Go on with the text, the batch_size and the "
                    "seeds that the run was started with, or start anew with --overwrite."
                )
        row = notes.get("row", "")
        if not (row.isascii() and row.isdecimal()):
            raise ValueError(f"{path} is damaged: its first row is {row[:20]!r}")
        return int(row)


def _part(path: Path, rows: range, config: HopeConfig) -> list[HopeCache]:
    """The states of those rows that a file has, in a cache, or none; `rows` count from the file's first."""
    if rows.stop <= 0:
        return []
    cache = HopeCache.load(path, config)
    index = [row for row in rows if 0 <= row < (cache.batch_size or 0)]
    return [cache.select_rows(torch.tensor(index))] if index else []


def _settled(cache: HopeCache) -> HopeCache:
    """A cache of equal values, detached, in memory of its own.

    In the layout that a file has, so that a resumed run computes with the same bits, and without the views
    that would keep a whole block's activations. What fields share stays shared.
    """
    copies: dict[int, Tensor] = {}

    def settled(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copies[id(t)] = t.detach().clone(memory_format=torch.contiguous_format)
        return copies[id(t)]

    return cache.map(settled)


def _joined(caches: Sequence[HopeCache]) -> HopeCache:
    """The rows of several caches that have read equally many columns, as one."""
    joined = caches[0].clone()
    if len(caches) > 1:
        names = joined.states
        joined.states = {name: State.join_rows([cache.states[name] for cache in caches]) for name in names}
        joined.tokens_seen = torch.cat([c.tokens_seen for c in caches if c.tokens_seen is not None])
        joined.prefix_hash = None
    return joined
