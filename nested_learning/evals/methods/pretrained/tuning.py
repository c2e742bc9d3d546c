"""Ways of keeping what was read that train weights by AdamW: fine-tuning, LoRA, EWC, replay.

Steps are taken on copies of the weights in float32: a small one would be lost to the rounding of bfloat16.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nested_learning.continual.context import Context, ContextReader
from nested_learning.continual.find import find_targets
from nested_learning.evals.methods.pretrained.asking import View
from nested_learning.evals.methods.pretrained.reading import Passage, Reading
from nested_learning.evals.methods.pretrained.students import Student

HAS_PEFT = importlib.util.find_spec("peft") is not None
MLP = ["gate_proj", "up_proj", "down_proj"]
RANK = 8  # rank of LoRA's adapters
IGNORED = -100  # target of a token that is not learned
AVERAGED = 4  # steps between two moves of an average: about the tokens of the second level's chunk


@dataclass(frozen=True)
class Steps:
    """The steps of AdamW: constant rate, no weight decay.

    Args:
        lr: learning rate.
        chunk: ids of a step, a block of passages.
        examples: passages of a step instead, each in a row of its own; None: blocks.
        clip: largest norm of the gradient of a mean loss; None: no bound.
        window: positions of the context in which a text is read that is scored, and tokens of it that a new
            one begins with.
    """

    lr: float
    chunk: int
    examples: int | None = None
    clip: float | None = None
    window: tuple[int, int] = (1024, 128)


class TunedStudent(Student):
    """AdamW on some parameters of a model; its other weights stay.

    Args:
        model: is written to: a copy, or one with adapters.
        parameters: what is trained.
        steps: rate and size of the steps.
        average: it answers by a moving average of the weights, which moves this share of its distance after
            every fourth step; None: by the weights.
    """

    def __init__(
        self, model: Any, parameters: Sequence[nn.Parameter], steps: Steps, average: float | None = None
    ) -> None:
        super().__init__(model)
        self.parameters, self.steps = list(parameters), steps
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=steps.lr, weight_decay=0.0, fused=True)
        self.share, self.done = average, 0
        self.average = [] if average is None else [master.clone() for master in self.masters]

    def learn(self, reading: Reading) -> None:
        for ids, targets in self.batches(reading):
            self.step(self.gradients(ids, targets))

    def read(self, ids: Tensor) -> Tensor:
        """Losses as of `Student.read`: a step after each chunk; keys and values stay as computed."""
        positions, overlap = self.steps.window
        ids = ids.to(self.model.device)
        reader, kept, context = ContextReader(self.model), ids[:0], Context()
        found = [torch.full((1,), torch.nan)]
        for chunk in ids.split(self.steps.chunk):
            if len(kept) + len(chunk) > positions:
                kept = kept[-overlap:]
                context = reader.context_of(self.model, kept[:-1])
            kept = torch.cat([kept, chunk])
            pairs = kept[len(context) :]
            if len(pairs) < 2:  # a text of one token, or one that ends so: nothing new is predicted
                continue
            (logits,), context = reader.read(self.model, pairs[None, :-1], context)
            losses = cross_entropy(logits.float(), pairs[1:], reduction="none")
            found.append(losses.detach().cpu())
            self.step([grad.float() for grad in torch.autograd.grad(losses.mean(), self.parameters)])
        return torch.cat(found)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """A step of AdamW by gradients of the parameters, float32, to which the penalty's is added."""
        for master, grad in zip(self.masters, gradients, strict=True):
            master.grad = grad
        self.penalise()
        if self.steps.clip is not None:
            nn.utils.clip_grad_norm_(self.masters, self.steps.clip)
        self.optimizer.step()
        self._publish(self.masters)
        self.done += 1
        if self.share is not None and self.done % AVERAGED == 0:
            torch._foreach_lerp_(self.average, self.masters, self.share)

    def batches(self, reading: Reading) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and what each place is to predict, both [B, T], of each step in the order of reading."""
        if self.steps.examples is not None:
            for passages in self.passages(reading, self.steps.examples):
                yield collate(passages)
            return
        for ids, mask in reading.blocks(self.steps.chunk):
            targets = ids.roll(-1) if mask is None else ids.masked_fill(~mask, IGNORED).roll(-1)
            targets[-1] = IGNORED
            if (targets != IGNORED).any():
                yield ids[None], targets[None]

    def passages(self, reading: Reading, count: int) -> Iterator[Sequence[Passage]]:
        """The passages of each step."""
        for start in range(0, len(reading.passages), count):
            yield reading.passages[start : start + count]

    def penalise(self) -> None:
        """Add the gradient of a penalty to the masters' `grad`; here none."""

    def gradients(self, ids: Tensor, targets: Tensor) -> list[Tensor]:
        """Gradients of the mean loss of the targets, float32."""
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), use_cache=False).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED)
        return [grad.float() for grad in torch.autograd.grad(loss, self.parameters)]

    @contextmanager
    def active(self) -> Iterator[View]:
        if self.average:
            self._publish(self.average)
        try:
            yield View(self.model)
        finally:
            self._publish(self.masters)

    @torch.no_grad()
    def _publish(self, weights: Sequence[Tensor]) -> None:
        """Let the model have these weights."""
        torch._foreach_copy_([p.data for p in self.parameters], list(weights))


class ElasticStudent(TunedStudent):
    """Fine-tuning with EWC: λ/2 Σ_t F_t (θ − θ_t)² over the readings t before, F_t on the diagonal.

    F_t is the mean square of the gradients of single examples, with their own labels, at θ_t. The readings'
    penalties add up to one quadratic form, so two numbers for each weight are kept, however many they are.

    Args:
        model, parameters, steps: as in `TunedStudent`.
        strength: λ.
        fisher: examples of each label that F_t is estimated from.
    """

    def __init__(
        self, model: Any, parameters: Sequence[nn.Parameter], steps: Steps, strength: float, fisher: int = 2
    ) -> None:
        super().__init__(model, parameters, steps)
        self.strength, self.fisher = strength, fisher
        self.precision = [torch.zeros_like(master) for master in self.masters]  # Σ_t F_t
        self.pull = [torch.zeros_like(master) for master in self.masters]  # Σ_t F_t θ_t

    def learn(self, reading: Reading) -> None:
        super().learn(reading)
        examples = reading.first_of_each(self.fisher)
        importance = [torch.zeros_like(master) for master in self.masters]
        for example in examples:
            grads = self.gradients(*collate([example]))
            torch._foreach_addcmul_(importance, grads, grads, 1 / len(examples))
        torch._foreach_add_(self.precision, importance)
        torch._foreach_addcmul_(self.pull, importance, self.masters)

    def penalise(self) -> None:
        for master, precision, pull in zip(self.masters, self.precision, self.pull, strict=True):
            assert master.grad is not None
            master.grad.addcmul_(precision, master, value=self.strength).sub_(pull, alpha=self.strength)


class ReplayStudent(TunedStudent):
    """Fine-tuning with as many examples of earlier readings in each step as new ones.

    Args:
        model, parameters, steps: as in `TunedStudent`, with steps of examples.
        kept: examples of each label that stay in the buffer.
        seed: decides which of them are taken.
    """

    def __init__(
        self, model: Any, parameters: Sequence[nn.Parameter], steps: Steps, kept: int, seed: int = 0
    ) -> None:
        super().__init__(model, parameters, steps)
        self.kept, self.random = kept, random.Random(seed)
        self.buffer: list[Passage] = []

    def learn(self, reading: Reading) -> None:
        super().learn(reading)
        self.buffer += reading.first_of_each(self.kept)

    def passages(self, reading: Reading, count: int) -> Iterator[Sequence[Passage]]:
        for batch in super().passages(reading, count):
            old = self.random.sample(self.buffer, min(len(batch), len(self.buffer)))
            yield [*batch, *old]


def own_copy(model: Any, weights: str) -> tuple[Any, list[nn.Parameter]]:
    """A copy of a model, and of its parameters those that are trained: "all", or those of its "mlp"s."""
    own = copy.deepcopy(model)
    if weights == "all":
        return own, [p for p in own.parameters() if p.requires_grad]
    own.requires_grad_(False)
    targets = {id(target.weight) for target in find_targets(own)}
    trained = [p for p in own.parameters() if id(p) in targets]
    for weight in trained:
        weight.requires_grad_()
    return own, trained


@contextmanager
def adapted(model: Any) -> Iterator[tuple[Any, list[nn.Parameter]]]:
    """A model with adapters of rank 8 on all MLPs, taken away again on leaving, and their parameters.

    Raises:
        ValueError: peft is not installed.
    """
    if not HAS_PEFT:
        raise ValueError("LoRA needs peft: pip install peft, or leave it out by --methods")
    from peft import LoraConfig, get_peft_model

    frozen = [p for p in model.parameters() if p.requires_grad]
    options = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MLP, task_type="CAUSAL_LM")
    torch.manual_seed(0)  # decides the adapters' initial factors
    with_adapters = get_peft_model(model, options).eval()
    try:
        yield with_adapters, [p for p in with_adapters.parameters() if p.requires_grad]
    finally:
        with_adapters.unload()
        for p in frozen:
            p.requires_grad_()


def collate(passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], filled up at the end, and what each place is to predict [B, T]: what is learned only."""
    longest = max(len(passage.ids) for passage in passages) - 1
    ids = torch.zeros(len(passages), longest, dtype=torch.long)
    targets = torch.full_like(ids, IGNORED)
    for row, passage in enumerate(passages):
        end = len(passage.ids) - 1
        ids[row, :end] = torch.tensor(passage.ids[:-1])
        wanted = torch.tensor(passage.ids[1:])
        targets[row, :end] = wanted.where(torch.tensor(passage.mask[1:]).bool(), IGNORED)
    return ids, targets
