"""Learners of a stream of CLINC150's tasks: nothing, a context, class means, and levels.

Methods that train weights in the usual way are in `clinc_training`. All label a query by the label, of those
seen so far, that the model finds most probable behind it; only the class means do not ask the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.pretrained.blocks import packed
from benchmarks.pretrained.clinc_data import Example, Task
from benchmarks.pretrained.trie import Trie, read_context
from nested_learning.continual import Level, stack_levels


class Method(Protocol):
    """Learns tasks one after the other and labels queries, without being told their task."""

    def learn(self, task: Task) -> None:
        """See the training examples of a task, once."""

    def predict(self, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
        """The label of each text, one of `labels`."""


class Wording:
    """Examples as ids: "utterance: TEXT⏎intent: LABEL⏎". The line break ends every label alike."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.line_break = self.ids("\n")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str) -> list[int]:
        return self.ids(f"utterance: {text}\nintent:")

    def label(self, label: str) -> list[int]:
        return self.ids(f" {label}\n")

    def example(self, example: Example) -> list[int]:
        return self.prompt(example.text) + self.label(example.label)


def most_probable(
    model: Any, wording: Wording, texts: Sequence[str], labels: Sequence[str], before: Sequence[int] = ()
) -> list[str]:
    """The label with the highest log-probability, summed over its tokens, behind each text.

    The sum and not the mean: divided by the labels' lengths, the scores chose no better on validation
    queries, without examples and with one or two of each class in the context.

    Args:
        model: that is asked.
        wording: writes the prompts.
        texts: the queries.
        labels: to choose from.
        before: ids that stand before every prompt; they are read once.
    """
    trie = Trie.of([wording.label(label) for label in labels])
    context = read_context(model, before) if before else None
    chosen = (int(trie.scores(model, wording.prompt(text), context).argmax()) for text in texts)
    return [labels[index] for index in chosen]


def first_of_each(task: Task, count: int) -> list[Example]:
    """The first `count` examples of each label, in the order of the stream."""
    kept: dict[str, list[Example]] = {label: [] for label in task.labels}
    for example in task.train:
        if len(kept[example.label]) < count:
            kept[example.label].append(example)
    chosen = {example for examples in kept.values() for example in examples}
    return [example for example in task.train if example in chosen]


class InContext:
    """The base model with examples before the query.

    Args:
        model: the base model; nothing is trained.
        wording: writes the examples.
        kept: examples of each class that stay in the context; with 0 the model answers without any.
        order: "stream" as they came, or "mixed" over all tasks.
        window: tokens of the examples at most; the oldest are dropped if there are more.
        seed: decides the mixed order.
    """

    def __init__(
        self,
        model: Any,
        wording: Wording,
        kept: int,
        order: str = "stream",
        window: int = 6144,
        seed: int = 0,
    ) -> None:
        if order not in ("stream", "mixed"):
            raise ValueError(f"order must be 'stream' or 'mixed', got {order!r}")
        self.model, self.wording, self.kept = model, wording, kept
        self.order, self.window, self.seed = order, window, seed
        self.examples: list[Example] = []

    def learn(self, task: Task) -> None:
        self.examples += first_of_each(task, self.kept)

    def predict(self, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
        return most_probable(self.model, self.wording, texts, labels, self.context())

    def context(self) -> list[int]:
        """The ids of the examples that fit in the window."""
        pieces = [self.wording.example(example) for example in self.examples]
        while sum(map(len, pieces)) > self.window:
            del pieces[0]
        if self.order == "mixed":
            random.Random(self.seed).shuffle(pieces)
        return [token for piece in pieces for token in piece]


class Features:
    """The base model's hidden states behind prompts, pooled; each text is read once, whatever is asked of it.

    Args:
        model: the base model.
        wording: writes the prompts.
        depths: relative depths of the layers that are kept, from 0 (the embedding) to 1 (the last layer).
        batch: prompts of one pass.
    """

    def __init__(self, model: Any, wording: Wording, depths: Sequence[float], batch: int = 16) -> None:
        self.model, self.wording, self.batch = model, wording, batch
        self.layers = {depth: round(depth * model.config.num_hidden_layers) for depth in depths}
        self.known: dict[str, dict[tuple[float, str], Tensor]] = {}

    def of(self, texts: Sequence[str], depth: float, pooling: str) -> Tensor:
        """Features [texts, D] in float64: the "mean" over each prompt's tokens, or its "last" one."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for start in range(0, len(new), self.batch):
            self._read(new[start : start + self.batch])
        return torch.stack([self.known[text][depth, pooling] for text in texts]).double()

    @torch.no_grad()
    def _read(self, texts: Sequence[str]) -> None:
        prompts = [self.wording.prompt(text) for text in texts]
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):  # a prompt does not see what fills it up behind
            row[: len(prompt)] = torch.tensor(prompt)
        states = self.model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
        for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            found = self.known[text] = {}
            for depth, layer in self.layers.items():
                x = states[layer][row, : len(prompt)].float()
                found[depth, "mean"], found[depth, "last"] = x.mean(0), x[-1].clone()


class ClassMeans:
    """The nearest class mean in the base model's features, by a Mahalanobis distance.

    The covariance is that of all classes around their means, shrunk towards a multiple of the identity. Sums
    over examples are all that is kept, so nothing is forgotten, whatever the order.

    Args:
        features: hidden states of the base model; nothing is trained.
        depth: which of the features' layers.
        pooling: "mean" or "last"; see `Features.of`.
        shrinkage: share of the identity, above 0 and up to 1.
    """

    def __init__(self, features: Features, depth: float, pooling: str, shrinkage: float) -> None:
        self.features = partial(features.of, depth=depth, pooling=pooling)
        self.shrinkage = shrinkage
        self.means: dict[str, Tensor] = {}
        self.scatter: Tensor | float = 0.0
        self.count = 0

    def learn(self, task: Task) -> None:
        everything = self.features([example.text for example in task.train])
        for label in task.labels:
            x = everything[[i for i, example in enumerate(task.train) if example.label == label]]
            self.means[label] = x.mean(0)
            self.scatter = self.scatter + (x - x.mean(0)).T @ (x - x.mean(0))
            self.count += len(x)

    def predict(self, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
        assert isinstance(self.scatter, Tensor)
        covariance = self.scatter / self.count
        scale = covariance.diagonal().mean()
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * scale * identity
        root = torch.linalg.cholesky(shrunk)
        means = torch.stack([self.means[label] for label in labels])
        whitened = [
            torch.linalg.solve_triangular(root, x.T, upper=False).T for x in (self.features(texts), means)
        ]
        return [labels[index] for index in torch.cdist(*whitened).argmin(1).tolist()]


class Levels:
    """The base model with levels that learn from the stream of examples as from any text.

    Examples are packed into blocks of the fastest chunk's length, none cut, the rest filled with line breaks;
    each block is read from an empty context but for one token (`window`), as a query will be. The labels'
    tokens are learned, not the utterances'.

    Args:
        model: the base model.
        wording: writes the examples.
        levels: fast to slow.
        kept: examples of each class that stand before a query, as in `InContext`.
        answers: indices of the levels that are in force when queries are answered; None for all.
    """

    def __init__(
        self,
        model: Any,
        wording: Wording,
        levels: Sequence[Level],
        kept: int = 0,
        answers: Sequence[int] | None = None,
    ) -> None:
        self.wording, self.block, self.answers = wording, levels[0].chunk_size, answers
        self.learner = stack_levels(model, levels=levels, window=self.block + 1, overlap=1)
        self.context = InContext(model, wording, kept)

    def learn(self, task: Task) -> None:
        self.context.learn(task)
        ids, masks = [], []
        for example in task.train:
            prompt, label = self.wording.prompt(example.text), self.wording.label(example.label)
            ids.append(prompt + label)
            masks.append([0] * len(prompt) + [1] * len(label))
        blocks = packed(ids, self.block, self.wording.line_break)
        for block, mask in zip(blocks, packed(masks, self.block, [0]), strict=True):
            self.learner.observe(block, learn_mask=mask)

    def predict(self, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
        with self.learner.active(levels=self.answers):
            return self.context.predict(texts, labels)
