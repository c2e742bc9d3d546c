"""An answer, token by token, as turns that other users' turns may come between."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nested_learning.server.decoding import AnswerText
from nested_learning.server.mind import MemoryValue, Mind
from nested_learning.server.sampling import Sampler, Sampling, TokenLogprob


@dataclass(frozen=True)
class AnswerPart:
    """The next part of an answer.

    Attributes:
        choice: index of the answer, where there are several.
        text: text to add; may be empty.
        tokens: log-probabilities of the tokens that the text is made of; empty unless asked for.
        count: number of tokens generated for it.
        finish: "stop" or "length" where the answer ends with it.
    """

    choice: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    count: int = 0
    finish: str | None = None


class Generation:
    """The answers to one prompt, under a memory that stays as it is while they are written.

    Args:
        mind: the model.
        memory: memory of the user.
        prompt: ids of the prompt, at least one.
        sampling: how to draw.
        emit: called with each part, on the scheduler's thread.
        prefill: most tokens of the prompt that one turn reads.
    """

    def __init__(
        self,
        mind: Mind,
        memory: MemoryValue,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[AnswerPart], None],
        prefill: int = 512,
    ) -> None:
        self._mind = mind
        self._memory = memory
        self._prompt = torch.tensor([prompt], device=mind.model.device)
        self._sampling = sampling
        self._emit = emit
        self._prefill = prefill
        self._ends = mind.ends
        self._repetition_penalty = mind.model.generation_config.repetition_penalty or 1.0

    def turns(self) -> Generator[None, None, None]:
        """The turns: pieces of the prompt, then tokens, choice by choice."""
        cache, first = self._mind.start(self._memory, self._prompt[0].tolist())
        pieces = self._prompt.new_tensor([first]).split(self._prefill, dim=1)
        for piece in pieces[:-1]:
            self._read(piece, cache)
            yield
        logits = self._read(pieces[-1], cache)
        for choice in range(self._sampling.n):
            is_last = choice == self._sampling.n - 1
            yield from self._answer(choice, logits, cache if is_last else self._mind.branch(cache))

    def _answer(self, choice: int, logits: Tensor, cache: Any) -> Generator[None, None, None]:
        sampling, length = self._sampling, self._prompt.shape[1]
        sampler = Sampler(sampling, choice, length, self._repetition_penalty)
        text = AnswerText(self._mind.tokenizer, sampling.stop)
        ids, held = self._prompt, []
        for index in range(sampling.max_tokens):
            token = sampler.draw(ids, logits)
            if sampling.top_logprobs is not None:
                held.append(TokenLogprob.of(logits[0], token, sampling.top_logprobs))
            if token in self._ends:
                held = held[: len(held) - 1]
                break
            new = text.add(token)
            if text.stopped:
                self._emit(AnswerPart(choice, new, tuple(held), 1, "stop"))
                return
            if index == sampling.max_tokens - 1:
                self._emit(AnswerPart(choice, new + text.end(), tuple(held), 1, text_finish(text)))
                return
            self._emit(AnswerPart(choice, new, tuple(held) if new else (), 1))
            held = [] if new else held
            yield
            last = torch.tensor([[token]], device=ids.device)
            ids = torch.cat([ids, last], dim=1)
            logits = self._read(last, cache, is_answer=True)
        self._emit(AnswerPart(choice, text.end(), tuple(held), 1, "stop"))

    def _read(self, ids: Tensor, cache: Any, is_answer: bool = False) -> Tensor:
        """Logits [1, V] after ids [1, T], which the cache takes in; float32, or float64."""
        logits = self._mind.read(self._memory, cache, ids, is_answer=is_answer)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def text_finish(text: AnswerText) -> str:
    """Reason of an answer's end at its last token: the end of the text may have had a stop text in it."""
    return "stop" if text.stopped else "length"
