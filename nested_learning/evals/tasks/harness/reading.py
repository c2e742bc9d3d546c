"""A model for lm-eval's harness that scores each document and then learns from what it has read of it.

Imported where lm-eval is installed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from nested_learning.continual import Learner


class ReadingLM(HFLM):
    """lm-eval's own model of transformers, which learns between documents where it is given a learner.

    Documents come one by one in the harness' order. All requests of a document are answered before any of it
    is learned; then the learner observes the text that they have in common: context and continuation of a
    single request, the context of several choices, whose right one is not known. A text that is scored as a
    whole, window after window, is learned window after window. Without a learner, or with levels whose
    rates are 0, all numbers are those of `HFLM` at a batch size of 1, bit for bit.

    Args:
        model, tokenizer: as loaded.
        learner: the model's learner; None: nothing is learned.
    """

    def __init__(self, model: Any, tokenizer: Any, learner: Learner | None) -> None:
        self.learner = learner
        self.observed = 0  # tokens
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.learner is None:
            return list(super().loglikelihood(requests, disable_tqdm=True))
        answers: list[tuple[float, bool]] = []
        for document in _documents(requests):
            answers += super().loglikelihood(document, disable_tqdm=True)
            self._observe_text(common_text([request.args for request in document]))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if self.learner is None:
            return list(super().generate_until(requests, disable_tqdm=True))
        answers: list[str] = []
        for document in _documents(requests):
            with self.learner.active():
                answers += super().generate_until(document, disable_tqdm=True)
            self._observe_text(document[0].args[0])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        """Scores of encoded requests (texts, context, continuation); those of windows have no texts."""
        options["disable_tqdm"] = True
        with self.learner.active() if self.learner is not None else nullcontext():
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **options)
        for texts, context, continuation in requests:
            if texts is None:  # a window: its context was read before, but for the token that begins a text
                self._observe(
                    [*context, *continuation] if context == [self.prefix_token_id] else continuation
                )
        return found

    def _observe_text(self, text: str) -> None:
        if not text:
            return
        ids = self.tok_encode(text)
        self._observe(ids if ids[:1] == [self.prefix_token_id] else [self.prefix_token_id, *ids])

    def _observe(self, ids: Sequence[int]) -> None:
        if self.learner is not None:
            self.learner.observe(torch.tensor(ids, device=self.device))
            self.observed += len(ids)


def _documents(requests: Sequence[Any]) -> list[list[Any]]:
    """The requests of each document, in order."""
    return [list(group) for _, group in groupby(requests, key=lambda each: (each.task_name, each.doc_id))]


def common_text(requests: Sequence[tuple[str, str]]) -> str:
    """Text that requests (context, continuation) of one document have in common, in whole words.

    Those without a context, which ask for the probability of a choice by itself, count where all are so.
    """
    asked = list(dict.fromkeys(request for request in requests if request[0])) or list(requests)
    if len(asked) == 1:
        return "".join(asked[0])
    contexts = {context for context, _ in asked}
    if len(contexts) == 1:
        return contexts.pop()
    least, most = min(contexts), max(contexts)  # what these share, all do
    shared = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    return least[:shared].rpartition(" ")[0]
