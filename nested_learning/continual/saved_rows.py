"""The rows of a memory file, each field checked against levels, model and plan before a row is made of it.

A file with the right checksum is what was written; this says whether what was written can be a memory of this
learner. It knows what a row looks like at its place in the text: where its segment begins, which chunks are
unfinished, how much of the window was read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nested_learning.continual.context import GROWING, Context, ContextReader, evaluating
from nested_learning.continual.deltas import DOWN, UP, DeltaState, Row
from nested_learning.continual.find import memory_dtype
from nested_learning.continual.inputs import vocabulary_size
from nested_learning.continual.objectives.answers import KeptAnswers
from nested_learning.continual.objectives.passage import KeptTokens
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.replaying.saved_store import SavedStore
from nested_learning.continual.weights import Workspace
from nested_learning.continual.writing import HISTORY, DeltaWriter

ROW_FIELDS = {"position", "start", "context_layers", "levels"}
LEVEL_FIELDS = {"loss", "pairs", "history", "rule"}
PRECISIONS = (torch.bfloat16, torch.float32, torch.float64)  # of deltas, sums and states of rules
FLOATING = (torch.float16, *PRECISIONS)  # of keys and values
MOST_TOKENS = 2**53
RESUME = "resume/"  # before the names of the tensors of `Row.resume`
# Sizes of a stack of matrices that stand for those of a slot where a rule is asked for its state's shapes.
PROBE = (7, 11, 13)
_SHAPES: WeakKeyDictionary[nn.Module, tuple[Mapping[str, Tensor], ...]] = WeakKeyDictionary()


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
        kept = numbers.get("store") if isinstance(numbers, dict) else None
        has_states = isinstance(numbers, dict) and "read" in numbers
        optional = {"store": kept is not None, "read": has_states}
        _check_fields(
            f"row {prefix[:-1]}", numbers, ROW_FIELDS | {name for name, given in optional.items() if given}
        )
        position = _count("position", numbers["position"], MOST_TOKENS)
        tokens = self._tokens(prefix, position)
        length = len(tokens)
        start = _count("start", numbers["start"], length)
        self._check_place(position, position - (length - start))
        # a file without a mask is of a time when everything was learned
        learn = self._left.pop(f"{prefix}mask", torch.ones(length, dtype=torch.bool, device="cpu"))
        _check(f"{prefix}mask", learn, (torch.bool,), (length,))
        row = Row.new((DeltaState() for _ in self._writers), self._model.device)
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
        row.answers = self._answers(f"{prefix}answers/", self._answered(position, length, start))
        levels = numbers["levels"]
        if not isinstance(levels, list) or len(levels) != len(self._writers):
            raise ValueError(f"levels is {_short(levels)}, expected a list of {len(self._writers)}")
        for writer, state, saved in zip(self._writers, row.levels, levels, strict=True):
            done = (position - (length - start)) % writer.level.chunk_size
            if writer.fixed_down:
                state.drawn = self._drawn(prefix, writer, row)
            self._fill(f"{prefix}{writer.index}/", writer, state, saved, done)
            if writer.level.reread:
                most = self._plan.overlap + position % writer.level.chunk_size
                state.read = self._passage(f"{prefix}{writer.index}/read", min(most, position))
        if kept is not None:
            saved_store = SavedStore(self._left, f"{prefix}store/", self._vocab_size, self._plan.window)
            row.store = saved_store.read(kept, position, position - (length - start))
        return row

    def _answered(self, position: int, length: int, start: int) -> int:
        """Number of tokens whose predictions a row at this place keeps for distillation."""
        closed = start == length and self._plan.window_ends(length, position)
        if not self._plan.distill_top_k or closed:
            return 0
        begins_at = position - length  # of the window
        for index in range(self._plan.half, start):
            if self._plan.segment_end(begins_at + index - 1) == begins_at + index:
                return start - index
        return 0

    def _answers(self, prefix: str, count: int) -> KeptAnswers | None:
        if not count:
            return None
        vocab_size = int(self._model.get_output_embeddings().weight.shape[0])
        shape = (count, min(self._plan.distill_top_k, vocab_size - 1))
        ids, log_probs, rest = (self._pop(f"{prefix}{name}") for name in ("ids", "log_probs", "rest"))
        _check(f"{prefix}ids", ids, (torch.int32,), shape)
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"{prefix}ids has ids that are not in the vocabulary, 0 to {vocab_size - 1}")
        for name, found, expected in (("log_probs", log_probs, shape), ("rest", rest, shape[:1])):
            _check(f"{prefix}{name}", found, PRECISIONS, expected)
            if not bool((found <= 1e-3).all()):
                raise ValueError(f"{prefix}{name} has {found.max()}, expected logarithms of probabilities")
        device, dtype = self._model.device, torch.promote_types(self._model.dtype, torch.float32)
        return KeptAnswers(ids.to(device), log_probs.to(device, dtype), rest.to(device, dtype))

    def _passage(self, name: str, most: int) -> KeptTokens | None:
        """At most so many tokens with their mask; None where the file has none."""
        if name not in self._left:
            return None
        tokens = self._ids(name, most)
        learn = self._pop(f"{name}_mask")
        _check(f"{name}_mask", learn, (torch.bool,), (len(tokens),))
        return KeptTokens(tokens.to(self._model.device), learn)

    def _tokens(self, prefix: str, position: int) -> Tensor:
        return self._ids(f"{prefix}tokens", min(self._plan.window, position))

    def _ids(self, name: str, most: int) -> Tensor:
        """At most so many ids of the vocabulary."""
        tokens = self._pop(name)
        if tokens.dtype != torch.int64 or tokens.ndim != 1 or len(tokens) > most:
            raise ValueError(
                f"{name} is {tokens.dtype} {list(tokens.shape)}, expected int64 [n], n at most {most}"
            )
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ValueError(
                f"{name} has ids from {int(tokens.min())} to {int(tokens.max())}, the vocabulary "
                f"goes from 0 to {self._vocab_size - 1}"
            )
        return tokens

    @property
    def _vocab_size(self) -> int:
        return vocabulary_size(self._model)

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

    @property
    def _context_shapes(self) -> tuple[Mapping[str, Tensor], ...]:
        """Each layer's tensors after one token: the model says their shapes best itself, once."""
        if self._model not in _SHAPES:
            _SHAPES[self._model] = self._layers_after_one_token()
        return _SHAPES[self._model]

    def _layers_after_one_token(self) -> tuple[Mapping[str, Tensor], ...]:
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
        self._fill_units(prefix, writer, state)
        state.deltas = self._slots(f"{prefix}delta/", writer, state)
        for target in writer.low_rank_targets:
            down, up = target.name + DOWN in {**state.deltas, **state.drawn}, target.name + UP in state.deltas
            if up > down or (down > up and not writer.fixed_down):  # drawn factors outlive a reset
                raise ValueError(f"{prefix}delta has one of the two factors of {target.name}, expected both")
        state.sums = self._slots(f"{prefix}sum/", writer)
        if state.sums and not (done and writer.learns):
            raise ValueError(f"{prefix}sum has gradients, but the level has none to keep here")
        if writer.level.distill:
            state.distilled = self._slots(f"{prefix}distilled/", writer)
        if state.distilled and not done:
            raise ValueError(f"{prefix}distilled has gradients, but the level has none to keep here")
        self._fill_rule(prefix, writer, state, saved["rule"])

    def _slots(self, prefix: str, writer: DeltaWriter, state: DeltaState | None = None) -> dict[str, Tensor]:
        """Matrices of the slots that there are; with the state of a sparse level those of its units."""
        found = {}
        for slot in writer.keys:
            if (stored := self._left.pop(prefix + slot, None)) is not None:
                _check(prefix + slot, stored, PRECISIONS, _kept_shape(writer, slot, state))
                found[slot] = self._placed(stored, writer)
        missing = (
            state
            and writer.sparse
            and [s for s, e in writer.sparse.layer_of.items() if e.name in state.units]
        )
        if missing and (names := set(missing) - found.keys()):
            raise ValueError(f"{prefix}{min(names)} is missing")
        return found

    def _fill_units(self, prefix: str, writer: DeltaWriter, state: DeltaState) -> None:
        """Which hidden units a sparse level has written, and what their gradients usually are."""
        for layer in () if writer.sparse is None else writer.sparse.layers:
            name = f"{prefix}units/{layer.name}"
            if (units := self._left.pop(name, None)) is not None:
                _check(name, units, (torch.int64,), (len(units) if units.ndim else -1,))
                if (
                    not len(units)
                    or units[0] < 0
                    or units[-1] >= layer.count
                    or not bool((units.diff() > 0).all())
                ):
                    raise ValueError(f"{name}: expected indices from 0 to {layer.count - 1}, ascending")
                state.units[layer.name] = units.to(self._model.device)
            name = f"{prefix}background/{layer.name}"
            if (usual := self._left.pop(name, None)) is not None:
                _check(name, usual, PRECISIONS, (layer.count,))
                if not bool(((usual >= 0) & usual.isfinite()).all()):
                    raise ValueError(f"{name}: expected finite numbers from 0")
                state.background[layer.name] = self._placed(usual, writer)
        if state.background:
            chunks = self._pop(f"{prefix}chunks")
            _check(f"{prefix}chunks", chunks, (torch.int64,), ())
            state.chunks = _count(f"{prefix}chunks", int(chunks), MOST_TOKENS)

    def _drawn(self, prefix: str, writer: DeltaWriter, row: Row) -> dict[str, Tensor]:
        """The `down` factors that stay as drawn; an average has those of the level that it averages."""
        if writer.averaged is not None:
            has_any = any(name.startswith(f"{prefix}{writer.index}/delta/") for name in self._left)
            return dict(row.levels[writer.averaged.index].drawn) if has_any else {}
        found = {}
        for target in writer.low_rank_targets:
            slot = target.name + DOWN
            name = f"{prefix}{writer.index}/drawn/{slot}"
            if (stored := self._left.pop(name, None)) is not None:
                _check(name, stored, PRECISIONS, writer.shape(slot))
                found[slot] = self._placed(stored, writer)
        return found

    def _fill_rule(self, prefix: str, writer: DeltaWriter, state: DeltaState, fields: object) -> None:
        """The rule's state of each slot: all of its fields, or none."""
        like = _rule_state(writer, 2)
        if isinstance(fields, list) and (dropped := [f for f in writer.rule.dropped if f in fields]):
            fields = [field for field in fields if field not in dropped]
            for slot in writer.keys:  # a file of an earlier version has what no write looks at
                for field in dropped:
                    self._left.pop(f"{prefix}rule/{field}/{slot}", None)
        if fields != [] and fields != sorted(like):
            raise ValueError(f"{prefix}rule has the fields {_short(fields)}, expected {sorted(like)}")
        for slot in writer.keys if fields else ():
            names = {field: f"{prefix}rule/{field}/{slot}" for field in like}
            if not any(name in self._left for name in names.values()):
                continue
            expected = _kept_shape(writer, slot, state)
            like = _rule_state(writer, len(expected))
            sizes = dict(zip(PROBE[-len(expected) :], expected, strict=True))
            for field, name in names.items():
                stored = self._pop(name)
                shape = tuple(sizes.get(n, n) for n in like[field].shape)
                if writer.sparse is not None and not shape:  # of each unit
                    shape = (expected[0], 1)
                _check(name, stored, PRECISIONS if like[field].is_floating_point() else (torch.int64,), shape)
                counts = not like[field].ndim or (writer.sparse is None and stored.ndim == len(expected) - 2)
                if counts and not bool((stored >= 0).all()):
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


def _kept_shape(writer: DeltaWriter, slot: str, state: DeltaState | None) -> tuple[int | None, ...]:
    """Shape of what is kept of a slot: of a sparse level's `state` the rows of its units."""
    if writer.sparse is None or state is None:
        return writer.shape(slot)
    layer = writer.sparse.layer_of[slot]
    return len(state.units.get(layer.name, ())), layer.width[slot]


def _rule_state(writer: DeltaWriter, ndim: int) -> dict[str, Tensor]:
    """The state that the level's rule keeps of one matrix, or of a stack of them (`ndim` 3), by one of the
    sizes `PROBE`: a first step says it."""
    state = writer.rule.step({}, {"probe": torch.ones(PROBE[-ndim:], device="cpu")}, 1.0).state
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
