"""Answers of a model: predictions of given sequences, and greedy text, with or without a context."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from nested_learning.continual.context import Context, ContextReader
from nested_learning.evals.methods.pretrained.trie import Trie

PIECE = 512  # tokens of one pass over a context


@dataclass(frozen=True)
class View:
    """A model to be asked.

    Args:
        model: a causal language model.
        context: ids [T] that stand before everything it is asked; None for a new window.
        look_up: gives each prompt, as its ids, further ids [T] that stand between the context and it.
    """

    model: Any
    context: Tensor | None = None
    look_up: Callable[[Sequence[int]], Tensor] | None = None

    def before(self, prompt: Sequence[int]) -> View:
        """The view with the context that a prompt has."""
        if self.look_up is None:
            return self
        found = self.look_up(prompt)
        return View(self.model, found if self.context is None else torch.cat([self.context, found]))


@dataclass(frozen=True)
class Answered:
    """Predictions of the tokens [1:] of a sequence.

    Args:
        losses: [n − 1], in nats.
        hits: [n − 1], whether the token is the one that the model finds most likely.
    """

    losses: Tensor
    hits: Tensor


@torch.no_grad()
def ask(
    view: View, sequences: Sequence[Tensor], batch: int, answers: Sequence[int] | None = None
) -> list[Answered]:
    """Predictions of each sequence of ids [n], each in a window of its own after the context.

    Args:
        view: the model.
        sequences: ids of each.
        batch: sequences of a pass, where there is no context.
        answers: how many ids at the end of each are the answer: those before it are the prompt, for which
            a view looks up what stands before it.

    Raises:
        ValueError: the view looks up contexts, which takes a prompt, and `answers` is None.
    """
    if view.look_up is not None and answers is None:
        raise ValueError("contexts are looked up for prompts: ask for a label or a continuation")
    device = view.model.device
    sequences = [ids.to(device) for ids in sequences]
    answered = []
    if view.context is not None or view.look_up is not None:
        cache = read_context(view)
        for place, ids in enumerate(sequences):
            before = ids[:0]
            if view.look_up is not None and answers is not None:
                before = view.look_up(ids[: len(ids) - answers[place]].tolist()).to(device)
            read = torch.cat([before, ids])
            logits = view.model(input_ids=read[None], past_key_values=cache, use_cache=True).logits
            cache.crop(-len(read))  # the next one follows the context alone
            answered.append(_answered(logits[0, len(before) :], ids))
        return answered
    for start in range(0, len(sequences), batch):
        rows = sequences[start : start + batch]
        # padding stands behind, where no token that counts attends to it
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        logits = view.model(input_ids=ids, use_cache=False).logits
        answered += [_answered(row, own) for row, own in zip(logits, rows, strict=True)]
    return answered


def _answered(logits: Tensor, ids: Tensor) -> Answered:
    logits, targets = logits[: len(ids) - 1].float(), ids[1:]
    losses = F.cross_entropy(logits, targets, reduction="none")
    return Answered(losses.cpu(), (logits.argmax(-1) == targets).cpu())


@torch.no_grad()
def read_context(view: View) -> DynamicCache:
    """Keys and values of the context, read in pieces; none where there is no context."""
    cache = DynamicCache(config=view.model.config)
    if view.context is None:
        return cache
    for piece in view.context.to(view.model.device).split(PIECE):
        view.model.base_model(input_ids=piece[None], past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def continuations(
    view: View, prompts: Sequence[Tensor], new_tokens: int, stop: int, batch: int
) -> list[list[int]]:
    """Greedy continuation of each prompt [n]: at most `new_tokens` ids, and none from the id `stop` on."""
    if view.look_up is not None:
        apart = [(view.before(prompt.tolist()), prompt) for prompt in prompts]
        return [continuations(own, [prompt], new_tokens, stop, 1)[0] for own, prompt in apart]
    read = None if view.context is None else read_context(view)
    found = []
    for start in range(0, len(prompts), batch):
        rows = [prompt.to(view.model.device) for prompt in prompts[start : start + batch]]
        cache = DynamicCache(config=view.model.config) if read is None else copy.deepcopy(read)
        if read is not None:
            cache.batch_repeat_interleave(len(rows))
        found += _continue(view.model, rows, cache, new_tokens, stop)
    return found


def _continue(
    model: Any, rows: Sequence[Tensor], cache: DynamicCache, new_tokens: int, stop: int
) -> list[list[int]]:
    """One batch; prompts are padded in front, and padding is masked and takes no position."""
    past, longest = cache.get_seq_length(), max(map(len, rows))
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    mask = torch.cat([mask.new_ones(len(rows), past), mask], dim=1)
    output: list[Tensor] = []
    ended = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
    while len(output) < new_tokens and not ended.all():
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        ids = logits[:, -1:].argmax(-1)
        ended |= ids[:, 0] == stop
        output.append(ids)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    ids_of_row = torch.cat(output, dim=1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in ids_of_row]


def most_probable(view: View, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> list[int]:
    """Index of the label with the highest log-probability, summed over its tokens, behind each prompt.

    The sum and not the mean: divided by the labels' lengths, the scores chose no better on validation
    queries, without examples and with one or two of each class in the context.
    """
    trie = Trie.of(labels)
    return [int(scores.argmax()) for scores in log_probabilities(view, [(each, trie) for each in prompts])]


def log_probabilities(view: View, asked: Sequence[tuple[Sequence[int], Trie]]) -> list[Tensor]:
    """Log-probabilities [labels] (nats, summed over tokens) of each trie's labels behind its prompt."""
    shared = None if view.look_up is not None else _keys_and_values(view)
    scores = []
    for prompt, trie in asked:
        context = shared if view.look_up is None else _keys_and_values(view.before(prompt))
        scores.append(trie.scores(view.model, prompt, context))
    return scores


def _keys_and_values(view: View) -> Context | None:
    """Keys and values of the context, read in one pass, for any number of prompts behind it."""
    if view.context is None or not len(view.context):
        return None
    return ContextReader(view.model).context_of(view.model, view.context.to(view.model.device))
