"""The rows of a memory file, each field checked against levels, model and plan before a row is made of it.

A file with the right checksum is what was written; this says whether what was written can be a memory of this
learner. It knows what a row looks like at its place in the text: where its segment begins, which chunks are
unfinished, how much of the window was read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nested_learning.continual.context import GROWING, Context, ContextReader, evaluating
from nested_learning.continual.deltas import DOWN, UP, DeltaState, Row
from nested_learning.continual.find import memory_dtype
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.weights import Workspace
from nested_learning.continual.writing import HISTORY, DeltaWriter

ROW_FIELDS = {"position", "start", "context_layers", "levels"}
LEVEL_FIELDS = {"loss", "pairs", "history", "rule"}
PRECISIONS = (torch.float32, torch.float64)  # of deltas, sums and states of rules
FLOATING = (torch.float16, torch.bfloat16, *PRECISIONS)  # of keys and values
MOST_TOKENS = 2**53
RESUME = "resume/"  # before the names of the tensors of `Row.resume`
# Sizes of a stack of matrices that stand for those of a slot where a rule is asked for its state's shapes.
PROBE = (7, 11, 13)


class SavedRows:
    """Makes rows of what a file holds.

    Args:
        tensors: tensors of the file by their names, on the CPU.
        writers: one per level.
        model: the base model.
        plan: how the learner reads.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        writers: Sequence[DeltaWriter],
        model: PreTrainedModel,
        plan: ReadingPlan,
    ) -> None:
        self._left = dict(tensors)
        self._writers = writers
        self._model = model
        self._plan = plan

    def read(self, numbers: object) -> list[Row]:
        """The rows, on the model's device.

        Args:
            numbers: what the file says of the rows apart from tensors.

        Raises:
            ValueError: a field is missing, too many, of another kind, out of range or of another shape.
        """
        if not isinstance(numbers, list) or not numbers:
            raise ValueError(f"rows is {_short(numbers)}, expected a list of at least one")
        rows = [self._row(f"{index}/", each) for index, each in enumerate(numbers)]
        if self._left:
            raise ValueError(f"unexpected tensors {', '.join(sorted(self._left))[:200]}")
        return rows

    def _row(self, prefix: str, numbers: Any) -> Row:
        has_states = isinstance(numbers, dict) and "read" in numbers
        _check_fields(f"row {prefix[:-1]}", numbers, ROW_FIELDS | ({"read"} if has_states else set()))
        position = _count("position", numbers["position"], MOST_TOKENS)
        tokens = self._tokens(prefix, position)
        length = len(tokens)
        start = _count("start", numbers["start"], length)
        self._check_place(position, position - (length - start))
        # a file without a mask is of a time when everything was learned
        learn = self._left.pop(f"{prefix}mask", torch.ones(length, dtype=torch.bool))
        _check(f"{prefix}mask", learn, (torch.bool,), (length,))
        row = Row.new(len(self._writers), self._model.device)
        row.position, row.start, row.tokens, row.learn = position, start, tokens.to(self._model.device), learn
        layers, lengths = numbers["context_layers"], numbers.get("read", [None, None])
        if not isinstance(lengths, list) or len(lengths) != 2:
            raise ValueError(f"read is {_short(lengths)}, expected two lengths")
        row.context = self._context(prefix, layers, lengths[0], (max(start - 1, 0), max(length - 1, 0)))
        if lengths[1] is not None:
            begun = max(start - 1, 0)
            row.resume = self._context(
                prefix + RESUME, layers if lengths[1] else 0, lengths[1], (begun, begun)
            )
        elif has_states and len(row.context) != max(start - 1, 0):
            raise ValueError("the context that its segment began with is missing")
        levels = numbers["levels"]
        if not isinstance(levels, list) or len(levels) != len(self._writers):
            raise ValueError(f"levels is {_short(levels)}, expected a list of {len(self._writers)}")
        for writer, state, saved in zip(self._writers, row.levels, levels, strict=True):
            done = (position - (length - start)) % writer.level.chunk_size
            self._fill(f"{prefix}{writer.index}/", writer, state, saved, done)
        return row

    def _tokens(self, prefix: str, position: int) -> Tensor:
        tokens = self._pop(f"{prefix}tokens")
        most = min(self._plan.window, position)
        if tokens.dtype != torch.int64 or tokens.ndim != 1 or len(tokens) > most:
            raise ValueError(
                f"{prefix}tokens is {tokens.dtype} {list(tokens.shape)}, expected int64 [n], n at most {most}"
            )
        vocab_size = int(self._model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"{prefix}tokens has ids from {int(tokens.min())} to {int(tokens.max())}, the vocabulary "
                f"goes from 0 to {vocab_size - 1}"
            )
        return tokens

    def _check_place(self, position: int, begins_at: int) -> None:
        """A segment begins at a pause of the plan and has not reached the next one."""
        if begins_at and self._plan.segment_end(begins_at - 1) != begins_at:
            raise ValueError(f"its segment begins at token {begins_at}, where this learner makes no pause")
        if position >= self._plan.segment_end(begins_at):
            raise ValueError(f"its position is {position}, past the segment that begins at {begins_at}")

    # Context -------------------------------------------------------------------------------------------

    def _context(self, prefix: str, layers: object, length: object, bounds: tuple[int, int]) -> Context:
        """Context of all tokens but the last, or of fewer, but all before the present segment.

        Args:
            prefix: of the names of its tensors.
            layers: number of its layers; 0 of an empty one.
            length: number of its tokens where it has states; None where keys and values say it.
            bounds: fewest and most tokens that it can hold at its place, if it is not empty.
        """
        shapes = self._context_shapes
        count = _count("context_layers", layers, len(shapes) if bounds[1] else 0)
        read = [self._layer(prefix, i, shapes[i]) for i in range(count)]
        lengths = {t.shape[-2] for layer in read for name, t in layer.items() if name in GROWING}
        if length is not None and count:
            lengths.add(_count("read", length, MOST_TOKENS))
        if count not in (0, len(shapes)) or len(lengths) > 1 or (count and not lengths):
            raise ValueError(
                f"its context has {count} layers of lengths {sorted(lengths)}, the model has others"
            )
        found = max(lengths, default=0)
        if not bounds[0] <= found <= bounds[1] or (count and not found):
            raise ValueError(
                f"its context holds {found} tokens, expected {bounds[0]} to {bounds[1]} at this place"
            )
        return Context(tuple(read), found)

    def _layer(self, prefix: str, index: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, shown in like.items():
            tensor = self._pop(f"{prefix}{name}/{index}")
            shape: tuple[int, ...] = tuple(shown.shape)
            if name in GROWING:
                shape = (1, shape[1], tensor.shape[2] if tensor.ndim == 4 else -1, shape[3])
            _check(f"{prefix}{name}/{index}", tensor, FLOATING, shape)
            found[name] = tensor.to(self._model.device, shown.dtype)
        return found

    @cached_property
    def _context_shapes(self) -> tuple[Mapping[str, Tensor], ...]:
        """Each layer's tensors after one token: the model says their shapes best itself."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        with Workspace.of(self._model).lock, evaluating(self._model), torch.no_grad():
            _, context = ContextReader(self._model).read(self._model, ids, Context())
        return context.layers

    # Levels --------------------------------------------------------------------------------------------

    def _fill(self, prefix: str, writer: DeltaWriter, state: DeltaState, saved: Any, done: int) -> None:
        """Take over what a level has learned; `done` tokens of its running chunk lie in complete segments."""
        _check_fields(f"level {prefix[:-1]}", saved, LEVEL_FIELDS)
        state.pairs = _count("pairs", saved["pairs"], max(done - 1, 0))
        state.loss = _loss(saved["loss"])
        state.history = _history(saved["history"], writer.level.gate_quantile is not None)
        state.deltas = self._slots(f"{prefix}delta/", writer)
        for target in writer.low_rank_targets:
            if (target.name + DOWN in state.deltas) != (target.name + UP in state.deltas):
                raise ValueError(f"{prefix}delta has one of the two factors of {target.name}, expected both")
        state.sums = self._slots(f"{prefix}sum/", writer)
        if state.sums and not (done and writer.learns):
            raise ValueError(f"{prefix}sum has gradients, but the level has none to keep here")
        self._fill_rule(prefix, writer, state, saved["rule"])

    def _slots(self, prefix: str, writer: DeltaWriter) -> dict[str, Tensor]:
        found = {}
        for slot in writer.keys:
            if (stored := self._left.pop(prefix + slot, None)) is not None:
                _check(prefix + slot, stored, PRECISIONS, writer.shape(slot))
                found[slot] = self._placed(stored, writer)
        return found

    def _fill_rule(self, prefix: str, writer: DeltaWriter, state: DeltaState, fields: object) -> None:
        """The rule's state of each slot: all of its fields, or none."""
        like = _rule_state(writer, 2)
        if fields != [] and fields != sorted(like):
            raise ValueError(f"{prefix}rule has the fields {_short(fields)}, expected {sorted(like)}")
        for slot in writer.keys if fields else ():
            names = {field: f"{prefix}rule/{field}/{slot}" for field in like}
            if not any(name in self._left for name in names.values()):
                continue
            expected = writer.shape(slot)
            like = _rule_state(writer, len(expected))
            sizes = dict(zip(PROBE[-len(expected) :], expected, strict=True))
            for field, name in names.items():
                stored = self._pop(name)
                shape = tuple(sizes.get(n, n) for n in like[field].shape)
                _check(name, stored, PRECISIONS if like[field].is_floating_point() else (torch.int64,), shape)
                if stored.ndim == len(expected) - 2 and not bool((stored >= 0).all()):
                    raise ValueError(f"{name} is {stored.tolist()}, expected a count")
                stored = self._placed(stored, writer) if stored.is_floating_point() else stored
                state.rule.setdefault(slot, {})[field] = stored.to(self._model.device)

    def _placed(self, stored: Tensor, writer: DeltaWriter) -> Tensor:
        # The model may have another precision than the one that the file was written with.
        return stored.to(self._model.device, memory_dtype(writer.targets[0].weight))

    def _pop(self, name: str) -> Tensor:
        if name not in self._left:
            raise ValueError(f"{name} is missing")
        return self._left.pop(name)


def _rule_state(writer: DeltaWriter, ndim: int) -> dict[str, Tensor]:
    """The state that the level's rule keeps of one matrix, or of a stack of them (`ndim` 3), by one of the
    sizes `PROBE`: a first step says it."""
    state = writer.rule.step({}, {"probe": torch.ones(PROBE[-ndim:])}, 1.0).state
    return state.get("probe", {})


def _check_fields(where: str, found: object, fields: set[str]) -> None:
    if not isinstance(found, dict) or set(found) != fields:
        raise ValueError(f"{where} is {_short(found)}, expected the fields {sorted(fields)}")


def _check(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {kinds} of shape {shape}"
        )


def _count(name: str, value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {_short(value)}, expected a whole number from 0 to {most}")
    return value


def _loss(text: object) -> float:
    """A sum of losses, which is written as text, since JSON has no NaN."""
    try:
        loss = float(text) if isinstance(text, str) else math.inf
    except ValueError:
        loss = -1.0
    if not isinstance(text, str) or loss < 0:
        raise ValueError(f"loss is {_short(text)}, expected the text of a number from 0")
    return loss


def _history(values: object, kept: bool) -> list[float]:
    most = HISTORY if kept else 0
    fits = isinstance(values, list) and len(values) <= most
    if not fits or not all(type(v) in (int, float) and 0 <= v < math.inf for v in values):  # type: ignore[attr-defined]
        raise ValueError(f"history is {_short(values)}, expected at most {most} losses from 0")
    return [float(v) for v in values]  # type: ignore[attr-defined]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
