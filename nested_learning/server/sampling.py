"""From logits to the next token: transformers' processors, in the order of its `generate`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from nested_learning.server.settings import COLDEST


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, by OpenAI's names.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together have this probability.
        seed: seed of the first choice; the others' follow from it.
        n: number of choices.
        presence_penalty: taken off the logit of each token that the answer has.
        frequency_penalty: taken off for each time that the answer has it.
        logit_bias: added to logits, by token.
        stop: texts before which the answer ends.
        top_logprobs: number of likeliest tokens to report at each place; None: no log-probabilities at all.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


class AnswerPenalty(LogitsProcessor):
    """OpenAI's penalties on what the answer has already: logits − presence · [count > 0] − frequency · count.

    Args:
        presence: penalty of a token that is there.
        frequency: penalty of each time.
        prompt_length: tokens of the prompt, which do not count.
    """

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] after the answer in input_ids [1, T]."""
        answer = input_ids[0, self._prompt_length :]
        counts = torch.zeros_like(scores[0]).index_add_(
            0, answer, torch.ones_like(answer, dtype=scores.dtype)
        )
        return scores - self._presence * (counts > 0) - self._frequency * counts


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: how.
        choice: index of the answer among `sampling.n`.
        prompt_length: tokens of the prompt.
        repetition_penalty: penalty that the model's own settings (`generation_config`) ask for; 1.0 is none.
    """

    def __init__(
        self, sampling: Sampling, choice: int, prompt_length: int, repetition_penalty: float = 1.0
    ) -> None:
        self._processors = LogitsProcessorList()
        if sampling.logit_bias:
            bias: Any = {(token,): float(value) for token, value in sampling.logit_bias.items() if value}
            if bias:
                self._processors.append(SequenceBiasLogitsProcessor(bias))
        if repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if sampling.presence_penalty or sampling.frequency_penalty:
            penalty = AnswerPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_length)
            self._processors.append(penalty)
        self._draws = sampling.temperature >= COLDEST
        if self._draws and sampling.temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if self._draws and sampling.top_p < 1.0:
            self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
        self._generator = torch.Generator().manual_seed(spread(f"{sampling.seed}/{choice}"))

    def draw(self, ids: Tensor, logits: Tensor) -> int:
        """The next token after ids [1, T], of logits [1, V] in float32 or float64."""
        given: Any = ids  # transformers' annotation wants the classes of old, LongTensor and FloatTensor
        scores = self._processors(given, logits)
        if not self._draws:
            return int(scores.argmax())
        probabilities = scores.softmax(-1)[0].cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def spread(text: str) -> int:
    """A seed from a text: 63 bits, different for texts that differ."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (nats, by the model itself) of a token, and of the likeliest ones at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: Tensor, token: int, count: int) -> TokenLogprob:
        """The log-probabilities at a place with logits [V]."""
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(count, len(logprobs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return cls(token, float(logprobs[token]), tuple(pairs))
