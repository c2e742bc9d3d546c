"""Hidden states of a model as features of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nested_learning._progress import progress
from nested_learning.continual.averages import answering
from nested_learning.continual.context import evaluating
from nested_learning.continual.inputs import most_positions
from nested_learning.continual.memory import Memory
from nested_learning.continual.reader import Reader

BATCH = 16  # texts of one pass
POOLINGS = ("mean", "last")


@torch.no_grad()
def pooled_states(
    model: Any, texts: Sequence[Sequence[int] | Tensor], layers: Sequence[int]
) -> list[dict[tuple[int, str], Tensor]]:
    """Hidden states of each text, pooled: the "mean" over its tokens and its "last" one.

    Args:
        model: a causal language model, in evaluation mode.
        texts: ids of each, read in one pass.
        layers: numbers of the layers behind which states are taken; 0 is the embedding.

    Returns:
        for each text states [D] by (layer, pooling), float32 (float64 of a float64 model), on the CPU.
    """
    rows = [torch.as_tensor(text, device=model.device) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # a text does not see what fills it up behind
    states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    found: list[dict[tuple[int, str], Tensor]] = [{} for _ in texts]
    for layer in dict.fromkeys(layers):
        for row, text in enumerate(texts):
            x = states[layer][row, : len(text)]
            x = x.to("cpu", torch.promote_types(x.dtype, torch.float32))
            found[row][layer, "mean"], found[row][layer, "last"] = x.mean(0), x[-1].clone()
    return found


@contextmanager
def leaving_nothing(model: nn.Module) -> Iterator[None]:
    """The modules of a model have no other hooks and attributes after the scope than before.

    transformers leaves the hooks that it takes hidden states with, and they cannot be pickled.
    """
    before = {module: (set(vars(module)), set(module._forward_hooks)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (names, hooks) in before.items():
            for key in set(module._forward_hooks) - hooks:
                for table in (
                    module._forward_hooks,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    table.pop(key, None)
            for name in set(vars(module)) - names:
                delattr(module, name)


class HiddenFeatures:
    """Features of texts: the hidden states of a reader's model behind one layer, pooled.

    Args:
        reader: reader of the learner.
        memory: its memory.
        depth: relative depth of the layer, from 0 (the embedding) to 1 (the last layer).
        pooling: "mean" over the tokens of a text, or its "last" one.
        row: row whose deltas are in force; None: the base model.

    Raises:
        ValueError: there is no such row, or a value is out of its range.
    """

    def __init__(self, reader: Reader, memory: Memory, depth: float, pooling: str, row: int | None) -> None:
        if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
            raise ValueError(f"depth must be a number from 0 (embedding) to 1 (last layer), got {depth!r}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if row is not None:
            memory.row(row)
        self.model = reader.model
        self._reader, self._memory, self._row = reader, memory, row
        self._depth, self._pooling = depth, pooling
        self._layer = round(depth * self.model.config.num_hidden_layers)

    def of(self, texts: Sequence[Tensor]) -> Tensor:
        """Features [B, D] of texts of ids [T], float64, on the CPU. ValueError for one that is too long."""
        limit, longest = most_positions(self.model), max(map(len, texts))
        if longest > limit:
            raise ValueError(f"a text has {longest} tokens, the model {limit} positions; give a part of it")
        found = []
        running, bars = self._running(), progress("reading", len(texts), "text")
        with running, evaluating(self.model), leaving_nothing(self.model), bars as bar:
            for start in range(0, len(texts), BATCH):
                states = pooled_states(self.model, texts[start : start + BATCH], [self._layer])
                found += [each[self._layer, self._pooling] for each in states]
                bar.advance(len(states))
        return torch.stack(found).double()

    def _running(self) -> AbstractContextManager[Any]:
        workspace = self._reader.workspace
        if self._row is None:
            return workspace.bare()
        writers = self._reader.writers
        chosen = self._memory.row(self._row).only(answering([writer.level for writer in writers]))
        return workspace.installed(writers, chosen)

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"depth": self._depth, "pooling": self._pooling, "deltas": self._row is not None}
