"""A Hope model, whose memory of a user is its cache: to learn a text is to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning.continual.files import fingerprint
from nested_learning.layers.attention import Attention
from nested_learning.levels import Component, levels
from nested_learning.models import HopeCache, HopeForCausalLM
from nested_learning.models.hope.session_hope import HopeSession
from nested_learning.server.mind import Learned, Mind, MindLevel, numbers

WEIGHTS = "weights"  # metadata key: fingerprint of the weights that a memory was made with
LONGEST_TURN, USUAL_TURN = 512, 64  # tokens


class HopeMind(Mind):
    """A Hope model; a memory is a `HopeSession`, the text that was learned as far as the model has read it.

    The text begins with the tokenizer's start token, so that each of its tokens has a prediction. Its last
    token is pending: whether a lesson or a question follows it is not known before.

    Args:
        model: the model, which may learn in context by its mixers alone or by its CMS too.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the tokenizer has no token that a text begins or ends with.
    """

    def __init__(self, model: HopeForCausalLM, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError(
                "the tokenizer has neither a bos_token nor an eos_token, one of which the text of a memory "
                'begins with: set one, `tokenizer.eos_token = "…"`, and save the tokenizer again'
            )
        self._notes = {WEIGHTS: fingerprint(model)}
        self.empty = HopeSession(HopeCache(model.config), (start,), self._notes)
        self.levels = own_levels(model)
        self.grows = any(isinstance(m, Attention) and m.window is None for m in model.modules())
        chunks = [level.chunk_size for level in self.levels if level.chunk_size > 1]
        self._turn = min([*chunks, LONGEST_TURN]) if chunks else USUAL_TURN

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer; where the model names none, the end of a text."""
        end = self.tokenizer.eos_token_id
        return super().ends or frozenset(() if end is None else (end,))

    # Learning ------------------------------------------------------------------------------------------

    def learn(self, memory: HopeSession, ids: list[int]) -> Generator[None, None, Learned]:
        """Read ids in turns of at most one chunk. The memory given stays as it is."""
        cache = memory.cache.clone()
        losses = yield from self._losses(cache, memory, ids)
        before, after = memory.cache.get_seq_length(), cache.get_seq_length()
        written = [after // level.chunk_size - before // level.chunk_size for level in self.levels]
        learned = HopeSession(cache, tuple(ids[-1:]) or memory.pending, self._notes)
        return Learned(learned, self.words(ids), losses, written)

    def score(self, memory: HopeSession, ids: list[int]) -> Generator[None, None, list[float | None]]:
        """Next-token losses of ids, were they learned now."""
        return (yield from self._losses(memory.cache.clone(), memory, ids))

    def _losses(
        self, cache: HopeCache, memory: HopeSession, ids: list[int]
    ) -> Generator[None, None, list[float | None]]:
        """Losses of ids, which the cache takes in but for the last one, after what is pending."""
        text = torch.tensor([[*memory.pending, *ids]], device=self.model.device)
        losses: list[float] = []
        for piece in self._pieces(cache.get_seq_length(), text.shape[1] - 1):
            with torch.no_grad():
                logits = self.model(text[:, piece], past_key_values=cache, use_cache=True).logits[0]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                following = text[0, piece.start + 1 : piece.stop + 1]
                losses += F.cross_entropy(logits, following, reduction="none").tolist()
            yield
        # A cache adds up its columns when it is asked for them; afterwards several threads may ask.
        cache.get_seq_length()
        missing = [float("nan")] * (len(ids) - len(losses))
        return numbers([*missing, *losses][-len(ids) :])

    def _pieces(self, position: int, count: int) -> Iterator[slice]:
        """Slices of `count` tokens that end where chunks do."""
        start = 0
        while start < count:
            stop = min(count, start + self._turn - (position + start) % self._turn)
            yield slice(start, stop)
            start = stop

    # Answering -----------------------------------------------------------------------------------------

    def start(self, memory: HopeSession, prompt: list[int]) -> tuple[HopeCache, list[int]]:
        """(the memory's cache, going its own way; what is pending, and the prompt)."""
        return memory.cache.clone(), [*memory.pending, *prompt]

    def branch(self, cache: HopeCache) -> HopeCache:
        """A clone, which takes no memory until it moves on."""
        return cache.clone()

    def read(self, memory: HopeSession, cache: HopeCache, ids: Tensor, *, is_answer: bool) -> Tensor:
        """Logits [1, V] after ids [1, T], which the cache takes in.

        A CMS that learns in context does not learn from the answer, as in `generate`.
        """
        options: dict[str, Any] = {}
        if is_answer and self.model.config.cms_learns:
            options["learn_mask"] = torch.zeros_like(ids)
        with torch.no_grad():
            output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        logits: Tensor = output.logits
        return logits[:, -1]

    # Files ---------------------------------------------------------------------------------------------

    def save(self, memory: HopeSession, path: Path) -> None:
        """Write a memory as `HopeSession.save` does, with a fingerprint of the weights."""
        memory.save(path)

    def load(self, path: Path) -> HopeSession:
        """The memory in a file of `save`, or of `nested-learning generate --save_state`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: as `HopeSession.load`, or it was made with other weights.
        """
        loaded = HopeSession.load(path, self.model)
        theirs, ours = loaded.notes.get(WEIGHTS), self._notes[WEIGHTS]
        if theirs not in (None, ours):
            raise ValueError(
                f"{path} belongs to a model with other weights (fingerprint {str(theirs)[:12]}…, this one "
                f"has {ours[:12]}…): load it with the model that has read it"
            )
        return dataclasses.replace(loaded, notes=self._notes)

    def nbytes(self, memory: HopeSession) -> int:
        """Bytes of the cache."""
        return memory.cache.nbytes()

    def tokens_read(self, memory: HopeSession) -> int:
        """Number of tokens of the text but the first, which stands for its start."""
        return max(0, memory.length - 1)


def own_levels(model: HopeForCausalLM) -> tuple[MindLevel, ...]:
    """The memories of a model by how often they are written, fast to slow. What keeps every token is written
    at each."""
    memories = [
        component
        for component in levels(model).components
        if component.kind == "memory" and component.frequency.unit in ("infinite", "token")
    ]
    memories.sort(key=lambda component: component.frequency.rank)
    grouped = groupby(memories, key=lambda component: component.frequency)
    return tuple(MindLevel(_joined(list(each)), frequency.every) for frequency, each in grouped)


def _joined(components: list[Component]) -> str:
    """Names of memories, those of one mixer after its name: "titans: M_memory, momentum of the writes"."""
    parts: dict[str, list[str]] = {}
    for component in components:
        owner, _, name = component.name.rpartition(": ")
        parts.setdefault(owner, []).append(name)
    return "; ".join(f"{owner}: {', '.join(n)}" if owner else ", ".join(n) for owner, n in parts.items())
