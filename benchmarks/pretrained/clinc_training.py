"""Methods that train a copy of the model in the usual way: fine-tuning, EWC, replay.

They learn the weights that levels learn, the MLPs', kept in float32 beside the copy in the model's precision
(in bfloat16 most of AdamW's steps would be rounded away). The loss is that of the label's tokens alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.pretrained.clinc_data import Example, Task
from benchmarks.pretrained.clinc_methods import Wording, first_of_each, most_probable
from nested_learning.continual.find import find_targets

BATCH = 8  # examples
AVERAGED = 4  # steps between two moves of an average: about the tokens of the second level's chunk
IGNORED = -100


class FineTuning:
    """AdamW on batches of the stream, each example once.

    Args:
        model: the base model; a copy is trained.
        wording: writes the examples.
        lr: learning rate, constant; no weight decay.
        seed: decides all draws beside the stream.
        average: queries are answered by a moving average of the weights, which moves this share of its
            distance after every fourth step; None: by the weights.
    """

    def __init__(
        self, model: Any, wording: Wording, lr: float, seed: int = 0, average: float | None = None
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.wording, self.random = wording, random.Random(seed)
        self.weights = [target.weight for target in find_targets(self.model)]
        for weight in self.weights:
            weight.requires_grad_()
        self.masters = [weight.detach().float() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)
        self.share, self.steps = average, 0
        self.average = [] if average is None else [master.clone() for master in self.masters]

    def learn(self, task: Task) -> None:
        for batch in self.batches(task):
            for master, grad in zip(self.masters, self.gradients(batch), strict=True):
                master.grad = grad
            self.penalise()
            self.optimizer.step()
            self._publish(self.masters)
            self.steps += 1
            if self.share is not None and self.steps % AVERAGED == 0:
                torch._foreach_lerp_(self.average, self.masters, self.share)

    def predict(self, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
        if self.average:
            self._publish(self.average)
        answers = most_probable(self.model, self.wording, texts, labels)
        self._publish(self.masters)
        return answers

    def batches(self, task: Task) -> Iterator[Sequence[Example]]:
        """The examples of the task in the order of the stream."""
        for start in range(0, len(task.train), BATCH):
            yield task.train[start : start + BATCH]

    def penalise(self) -> None:
        """Add the gradient of a penalty to the masters' `grad`; here none."""

    def gradients(self, examples: Sequence[Example]) -> list[Tensor]:
        """Gradients of the mean loss of the labels' tokens, float32."""
        ids, targets = collate(self.wording, examples)
        logits = self.model(input_ids=ids).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return [grad.float() for grad in torch.autograd.grad(loss, self.weights)]

    @torch.no_grad()
    def _publish(self, weights: Sequence[Tensor]) -> None:
        """Let the model have these weights."""
        torch._foreach_copy_([weight.data for weight in self.weights], list(weights))


class ElasticWeights(FineTuning):
    """Fine-tuning with EWC: λ/2 Σ_t F_t (θ − θ_t)² over the tasks t learned before, F_t on the diagonal.

    F_t is the mean square of the gradients of single examples, with their own labels, at θ_t. The tasks'
    penalties add up to one quadratic form, so two numbers for each weight are kept, whatever the tasks.

    Args:
        strength: λ.
        fisher: examples of each class that F_t is estimated from.
    """

    def __init__(
        self, model: Any, wording: Wording, lr: float, strength: float, fisher: int = 2, seed: int = 0
    ) -> None:
        super().__init__(model, wording, lr, seed)
        self.strength, self.fisher = strength, fisher
        self.precision = [torch.zeros_like(master) for master in self.masters]  # Σ_t F_t
        self.pull = [torch.zeros_like(master) for master in self.masters]  # Σ_t F_t θ_t

    def learn(self, task: Task) -> None:
        super().learn(task)
        examples = first_of_each(task, self.fisher)
        importance = [torch.zeros_like(master) for master in self.masters]
        for example in examples:
            grads = self.gradients([example])
            torch._foreach_addcmul_(importance, grads, grads, 1 / len(examples))
        torch._foreach_add_(self.precision, importance)
        torch._foreach_addcmul_(self.pull, importance, self.masters)

    def penalise(self) -> None:
        parts = zip(self.masters, self.precision, self.pull, strict=True)
        for master, precision, pull in parts:
            assert master.grad is not None
            master.grad.addcmul_(precision, master, value=self.strength).sub_(pull, alpha=self.strength)


class Replay(FineTuning):
    """Fine-tuning with as many examples of earlier tasks in each batch as new ones.

    Args:
        kept: examples of each class that stay in the buffer.
    """

    def __init__(self, model: Any, wording: Wording, lr: float, kept: int, seed: int = 0) -> None:
        super().__init__(model, wording, lr, seed)
        self.kept, self.buffer = kept, list[Example]()

    def learn(self, task: Task) -> None:
        super().learn(task)
        self.buffer += first_of_each(task, self.kept)

    def batches(self, task: Task) -> Iterator[Sequence[Example]]:
        for batch in super().batches(task):
            old = self.random.sample(self.buffer, min(len(batch), len(self.buffer)))
            yield [*batch, *old]


def collate(wording: Wording, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], filled up at the end, and what each position is to predict [B, T]: labels only."""
    prompts = [wording.prompt(example.text) for example in examples]
    labels = [wording.label(example.label) for example in examples]
    longest = max(len(p) + len(a) for p, a in zip(prompts, labels, strict=True)) - 1
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        end = len(prompt) + len(label) - 1
        ids[row, :end] = torch.tensor([*prompt, *label[:-1]])
        targets[row, len(prompt) - 1 : end] = torch.tensor(label)
    return ids, targets
