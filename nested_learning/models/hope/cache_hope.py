"""The states of a running Hope model, as transformers' `past_key_values`, and their file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nested_learning.memory.state import State, TensorFn, held_bytes
from nested_learning.models.hope.cache_file import Saved, read_cache, write_cache
from nested_learning.models.hope.placement_hope import device_of, devices_of_blocks

if TYPE_CHECKING:
    from nested_learning.models.hope.block_hope import Blocks, Tokens
    from nested_learning.models.hope.configuration_hope import HopeConfig
    from nested_learning.models.hope.lm_update import LMUpdate

# Multiplier of the running hash of the token ids (odd, from splitmix64, as a signed 64-bit number).
_HASH_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)


@dataclasses.dataclass(frozen=True)
class _Rows(State):
    """The cache's own counts of each row, as a state: they move and reorder as the layers' states do."""

    tokens_seen: Tensor
    prefix_hash: Tensor | None


class Columns:
    """A number of columns, added up when it is asked for: a compiler makes a graph for each number it reads.

    Args:
        new: columns of the last call.
        before: those of the calls before it.
    """

    new: int
    before: Columns | None

    def __init__(self, new: int = 0, before: Columns | None = None) -> None:
        # At once where nothing is compiled, so that no object is held for each call.
        if not torch.compiler.is_compiling() and before is not None and before.before is None:
            new, before = new + before.new, None
        self.new, self.before = new, before

    def total(self) -> int:
        """Number of columns of all calls; the calls before are forgotten."""
        while self.before is not None:
            self.new, self.before = self.new + self.before.new, self.before.before
        return self.new

    def __reduce__(self) -> tuple[Any, ...]:
        return Columns, (self.total(),)  # a copy of a chain of calls would take a frame of the stack for each


class ReadCalls:
    """The cache as it was and the tokens read since: all that `HopeCache.crop` needs.

    Attributes:
        before: the cache before the first of the calls; None without any.
        calls: their tokens.
        reader: of the last call, which reads tokens again.
    """

    def __init__(self) -> None:
        self.before: HopeCache | None = None
        self.calls: list[Tokens] = []
        self.reader: Blocks | LMUpdate

    def copy(self) -> ReadCalls:
        """A record of the same calls, to which others may be added."""
        new = ReadCalls()
        new.before, new.calls = self.before, list(self.calls)
        if self.calls:
            new.reader = self.reader
        return new

    @property
    def columns(self) -> int:
        """Columns read in the calls."""
        return sum(tokens.x.shape[1] for tokens in self.calls)

    def add(self, cache: HopeCache, tokens: Tokens, reader: Blocks | LMUpdate) -> None:
        """Keep a call on `tokens`, before which `cache` stands."""
        self.before = cache.clone() if self.before is None else self.before
        self.calls.append(tokens)
        self.reader = reader

    def read_again(self, cache: HopeCache, columns: int) -> None:
        """Advance `cache`, which stands where `before` did, by the first `columns` of the calls.

        Successive calls that give the same kinds of tokens (with a mask or without) are read as one.
        """
        for _, calls in groupby(self.calls, lambda tokens: [t is None for t in tokens]):
            if not columns:
                return
            parts = zip(*calls, strict=True)
            joined = (None if part[0] is None else torch.cat(part, dim=1) for part in parts)
            tokens = type(self.calls[0])._make(joined).columns(0, columns)
            length = tokens.x.shape[1]
            size = cache.config.segment_size or length
            states = cache.states
            for start in range(0, length, size):
                _, states = self.reader.read(tokens.columns(start, start + size), states)
            cache.advance(states, tokens.x, tokens.ids, tokens.real)
            columns -= length


class HopeCache:
    """States of all layers after some tokens, and how many tokens that were.

    The model advances the cache it is given, as transformers do; `clone()` first to branch off. States are
    values that are replaced, never written to, so a clone costs no memory until one of the two moves on.
    Methods that transformers also has (`reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`,
    `reset`) work in place, all others return a new cache.

    Args:
        config: configuration of the model.

    Attributes:
        states: by name, such as "layers.0.mixer"; every tensor has the batch as first dimension.
        tokens_seen: [B] int64, real tokens per row; None while the cache is empty.
        prefix_hash: [B] int64, hash of the ids of all columns fed; None while empty or after `inputs_embeds`.
        recording: what `crop` goes back to; None until `activate_past_recording`.
    """

    # transformers' generate asks any cache for these.
    is_compileable = True
    is_croppable = False
    _is_user_defined = False

    def __init__(self, config: HopeConfig) -> None:
        self.config = config
        self.states: dict[str, State] = {}
        self.tokens_seen: Tensor | None = None
        self.prefix_hash: Tensor | None = None
        self.recording: ReadCalls | None = None
        self._columns = Columns()

    def __repr__(self) -> str:
        rows = (
            "empty" if self.batch_size is None else f"{self.batch_size} rows, {self.get_seq_length()} columns"
        )
        return f"HopeCache({rows}, {self.nbytes():,} bytes)"

    @property
    def batch_size(self) -> int | None:
        """Number of rows, None while the cache is empty."""
        return None if self.tokens_seen is None else len(self.tokens_seen)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included: what the length of `input_ids` is compared with."""
        return self._columns.total()

    def nbytes(self) -> int:
        """Bytes of the layers' states; a tensor that several fields share counts once."""
        return held_bytes(t for state in self.states.values() for t in state.tensors())

    def check(self, config: HopeConfig, rows: int | None) -> None:
        """Take `config` for the cache's own, if it is that of a model which can go on with `rows` rows.

        Raises:
            ValueError: if it is not.
        """
        if self.batch_size not in (None, rows):
            raise ValueError(
                f"past_key_values holds {self.batch_size} rows, the input {rows}; "
                "use cache.select_rows or cache.batch_repeat_interleave"
            )
        if self.config is not config:
            if self.config.fingerprint() != config.fingerprint():
                raise ValueError(
                    "past_key_values belongs to a model with another configuration; "
                    "start a new one with HopeCache(model.config)"
                )
            self.config = config  # so that the next call need not compare them again

    def advance(
        self, states: dict[str, State], x: Tensor, input_ids: Tensor | None, real: Tensor | None
    ) -> None:
        """Take over the states after a call on new columns x [B, T, D], where real [B, T] holds tokens."""
        batch_size, length, _ = x.shape
        self.prefix_hash = self._hash(input_ids)
        if self.tokens_seen is None:
            self.tokens_seen = torch.zeros(batch_size, dtype=torch.long, device=x.device)
        new = length if real is None else real.sum(dim=1)
        self.tokens_seen = self.tokens_seen.to(x.device) + new
        self._columns = Columns(length, self._columns)
        self.states = states

    def is_prefix_of(self, input_ids: Tensor) -> bool:
        """Whether `input_ids` [B, T] begins with the very columns this cache has seen, and goes on.

        Compares a 64-bit hash per row; synchronises with the host once.
        """
        if (
            self.prefix_hash is None
            or len(input_ids) != self.batch_size
            or input_ids.shape[1] <= self.get_seq_length()
        ):
            return False
        prefix = HopeCache(self.config)._hash(input_ids[:, : self.get_seq_length()])
        assert prefix is not None
        return bool((prefix.to(self.prefix_hash.device) == self.prefix_hash).all())

    def _hash(self, input_ids: Tensor | None) -> Tensor | None:
        """h ← h · factor + id + 1 over the new columns, modulo 2^64, from the hash so far."""
        if input_ids is None or (self.tokens_seen is not None and self.prefix_hash is None):
            return None
        length, before = input_ids.shape[1], self.prefix_hash
        if length == 1 and before is not None:
            return torch.add(input_ids[:, 0].long() + 1, before.to(input_ids.device), alpha=_HASH_FACTOR)
        powers = torch.full((length,), _HASH_FACTOR, device=input_ids.device).cumprod(0)
        weights = torch.cat([powers[:-1].flip(0), torch.ones_like(powers[:1])])
        new = ((input_ids.long() + 1) * weights).sum(dim=1)
        return new if before is None else before.to(new.device) * powers[-1] + new

    # New caches ---------------------------------------------------------------------------------------

    def map(self, fn: TensorFn) -> HopeCache:
        """A new cache with `fn` applied to each state's tensors, `tokens_seen` and `prefix_hash`."""
        return self._with(lambda state: state.map(fn))

    def _with(self, change: Callable[[State], State]) -> HopeCache:
        """A new cache with `change` applied to each layer's state and to the counts per row."""
        new = HopeCache(self.config)
        new.states = {name: change(state) for name, state in self.states.items()}
        new._columns = self._columns
        if self.tokens_seen is not None:
            rows = change(_Rows(self.tokens_seen, self.prefix_hash))
            assert isinstance(rows, _Rows)
            new.tokens_seen, new.prefix_hash = rows.tokens_seen, rows.prefix_hash
        return new

    def clone(self) -> HopeCache:
        """A cache that goes its own way from here."""
        return self._with(lambda state: state)

    def detach(self) -> HopeCache:
        """A cache of the same values, cut from the autograd graph."""
        return self._with(State.detach)

    def to(self, device: torch.device | str | int | None, non_blocking: bool | None = None) -> HopeCache:
        """The cache on another device, as for tensors itself where all of it is there; dtypes stay.

        Args:
            device: where to; None, which accelerate's hooks give for "leave it", changes nothing.
            non_blocking: given by these hooks, which send whatever a model is given to where it computes. A
                copy would go on in place of the cache that its owner holds, so with this argument the cache
                itself moves.
        """
        if device is None:
            return self
        rows = () if self.tokens_seen is None else (_Rows(self.tokens_seen, self.prefix_hash),)
        there = torch.empty(0, device=device).device  # "cuda" is one with a number
        if all(t.device == there for state in (*self.states.values(), *rows) for t in state.tensors()):
            return self
        moved = self._with(lambda state: state.to(there))
        if non_blocking is None:
            return moved
        self.states, self.tokens_seen, self.prefix_hash = moved.states, moved.tokens_seen, moved.prefix_hash
        return self

    def _beside(self, model: nn.Module) -> HopeCache:
        """The cache with each block's states where the block computes, what counts with the first."""
        first, blocks = device_of(model), devices_of_blocks(model)
        counts = self.clone()
        counts.states = {}
        new = counts.to(first)
        for name, state in self.states.items():
            new.states[name] = state.to(blocks.get(name.rpartition(".")[0], first))
        return new

    def select_rows(self, index: Tensor) -> HopeCache:
        """A cache of the rows `index` [B'] (int64), in that order; a row may be taken any number of times."""
        return self._with(lambda state: state.select_rows(index))

    # In place, under the names that transformers' generate calls ---------------------------------------

    def _become(self, other: HopeCache) -> None:
        self.states, self._columns = other.states, other._columns
        self.tokens_seen, self.prefix_hash = other.tokens_seen, other.prefix_hash
        if self.recording is not None:  # what it holds is of other rows or other tokens
            self.recording = ReadCalls()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from row beam_idx[i]."""
        self._become(self.select_rows(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._become(self.select_rows(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take each row `repeats` times in succession."""
        self._become(self._with(lambda state: state.repeat_rows(repeats)))

    def reset(self) -> None:
        """Empty the cache."""
        self._become(HopeCache(self.config))

    def activate_past_recording(self) -> None:
        """Keep from here on what `crop` needs; transformers calls it before speculative decoding."""
        if self.recording is None:
            self.recording = ReadCalls()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns that were fed, as if they had never been.

        A memory cannot unlearn, but its state is a value: the cache goes back to the states before the first
        call since it was last cropped (or since `activate_past_recording`), and the model reads those columns
        again that stay. One such state is kept, however much was read; reordering the rows forgets it.

        Args:
            tokens_to_remove: minus the number of columns, as transformers give it; 0 keeps all of them, and
                later crops reach back to here.

        Raises:
            ValueError: if that is no number of columns that were read while the cache was recording.
        """
        recording = self.recording
        kept = 0 if recording is None else recording.columns
        if not -kept <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop takes minus the number of columns to take back, here from {-kept} to 0, got "
                f"{tokens_to_remove!r}: a memory cannot unlearn what it read before "
                "activate_past_recording() or the last crop(). Keep a clone() from before"
            )
        if recording is None:
            return
        self.recording = ReadCalls()
        if tokens_to_remove:
            assert recording.before is not None
            self._become(recording.before)
            recording.read_again(self, kept + tokens_to_remove)

    @contextmanager
    def adaptation_scope(self) -> Iterator[HopeCache]:
        """Whatever the cache learns inside is undone on leaving, bit for bit, also after an exception.

        States are values, so nothing is copied: on leaving, the cache has the states and counts of rows again
        that it had. Scopes may be nested. Clones made inside stay as they are.

        Yields:
            the cache itself.
        """
        before, recording = self.clone(), self.recording
        kept = None if recording is None else recording.copy()
        try:
            yield self
        finally:
            self._become(before)
            self.recording = kept

    # File ----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> None:
        """Write the cache to one safetensors file, under a temporary name first.

        Args:
            path: path of the file.
            notes: metadata of the caller's; the file's checksum covers it too.

        Raises:
            ValueError: if the cache is empty, or the path is that of a folder, a device or a pipe.
            OSError: if the file cannot be written; nothing is left behind.
        """
        if self.tokens_seen is None:
            raise ValueError("the cache is empty: run the model with it before saving")
        saved = Saved(self.states, self.tokens_seen, self.prefix_hash, self.get_seq_length())
        write_cache(path, self.config, saved, notes or {})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config_or_model: Any, device: torch.device | str | None = None
    ) -> HopeCache:
        """Read a cache that `save` wrote.

        It is checked that the file is whole (a checksum over its tensors and what they stand for), that the
        model has the configuration of the one that wrote it (`HopeConfig.fingerprint`), and that every
        tensor has the shape and kind of number that this model's states have, every count the range. The
        weights are not compared: with a model of the same configuration that was trained otherwise, a cache
        loads and means nothing. Metadata that others added to the file is left alone.

        Args:
            path: path of the file.
            config_or_model: the `HopeConfig` of the model that goes on from the cache, or the model.
            device: where the tensors go; None: each where the model's block computes that uses it, with a
                configuration the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, of another format version or of a model with another
                configuration.
        """
        config: HopeConfig = getattr(config_or_model, "config", config_or_model)
        saved = read_cache(path, config)
        cache = cls(config)
        cache.states, cache.tokens_seen, cache.prefix_hash, columns = saved
        cache._columns = Columns(columns)
        if device is not None:
            return cache.to(device)
        return cache._beside(config_or_model) if isinstance(config_or_model, nn.Module) else cache
