"""Ways of keeping what was read that train no weights in the usual sense: none, a context, means, levels.

Each is a `Student`: it reads once and in order, and is then asked. What students learn stays apart from the
model that they are given, which serves all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual import Level, Replay, Starts, stack_levels
from nested_learning.continual.labels.class_head import ClassHead, HeadSettings
from nested_learning.evals.methods.pretrained.asking import View, most_probable
from nested_learning.evals.methods.pretrained.features import Features
from nested_learning.evals.methods.pretrained.reading import Passage, Reading


class Student:
    """A learner that keeps nothing; others keep what they can.

    Args:
        model: a causal language model in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def learn(self, reading: Reading) -> None:
        """Read passages, once; the ids after the last whole chunk may be left."""

    def read(self, ids: Tensor) -> Tensor:
        """Next-token losses [T] (nats) of a text [T], each token scored before it is learned; NaN in front.

        Raises:
            ValueError: the student does not learn while it is scored.
        """
        raise ValueError(f"{type(self).__name__} does not learn while it reads: it is asked afterwards")

    def active(self) -> AbstractContextManager[View]:
        """The student to be asked, inside the scope."""
        return nullcontext(View(self.model))

    def choose(self, prompts: Sequence[Sequence[int]], labels: dict[str, Sequence[int]]) -> list[str]:
        """The label that belongs to each prompt.

        Args:
            prompts: ids of each.
            labels: ids of each label, as it would stand behind a prompt; all end with the same token.
        """
        names = list(labels)
        with self.active() as view:
            return [names[index] for index in most_probable(view, prompts, list(labels.values()))]


class WindowStudent(Student):
    """A student with what it read last before everything that it is asked.

    Args:
        model: nothing of it is trained.
        window: ids that it keeps, of blocks one after the other.
        block: ids of a block.
    """

    def __init__(self, model: Any, window: int, block: int) -> None:
        super().__init__(model)
        self.window, self.block = window, block
        self.kept = torch.empty(0, dtype=torch.long)

    def learn(self, reading: Reading) -> None:
        blocks = [ids for ids, _ in reading.blocks(self.block)]
        self.kept = torch.cat([self.kept, *blocks])[-self.window :]

    def active(self) -> AbstractContextManager[View]:
        return nullcontext(View(self.model, self.kept))


class ExampleStudent(Student):
    """A student with examples of each label before everything that it is asked.

    Args:
        model: nothing of it is trained.
        window: ids of the examples at most; the oldest are dropped if there are more.
        kept: examples of each label that it keeps; the first ones.
        order: "stream" as they came, or "mixed" over all readings.
        seed: decides the mixed order.
    """

    def __init__(self, model: Any, window: int, kept: int, order: str = "stream", seed: int = 0) -> None:
        if order not in ("stream", "mixed"):
            raise ValueError(f"order must be 'stream' or 'mixed', got {order!r}")
        super().__init__(model)
        self.window, self.kept, self.order, self.seed = window, kept, order, seed
        self.examples: list[Passage] = []

    def learn(self, reading: Reading) -> None:
        self.examples += reading.first_of_each(self.kept)

    def active(self) -> AbstractContextManager[View]:
        return nullcontext(View(self.model, torch.tensor(self.context(), dtype=torch.long)))

    def context(self) -> list[int]:
        """The ids of the examples that fit in the window."""
        pieces = [passage.ids for passage in self.examples]
        while sum(map(len, pieces)) > self.window:
            del pieces[0]
        if self.order == "mixed":
            random.Random(self.seed).shuffle(pieces)
        return [i for piece in pieces for i in piece]


class RetrievalStudent(Student):
    """A student that looks up the nearest of all examples it has read, and has these before a prompt.

    Near is what has a large cosine between the mean hidden states of the prompts in a layer of the base
    model, the mean over all examples taken off; the nearest example stands last.

    Args:
        model: nothing of it is trained.
        features: its hidden states.
        examples: how many are looked up.
        depth: relative depth of the layer whose states are compared.
    """

    def __init__(self, model: Any, features: Features, examples: int, depth: float) -> None:
        super().__init__(model)
        self.features = partial(features.of, depth=depth, pooling="mean")
        self.count, self.passages = examples, list[Passage]()

    def learn(self, reading: Reading) -> None:
        self.passages += [passage for passage in reading.passages if passage.learned]

    def active(self) -> AbstractContextManager[View]:
        known = self.features([passage.prompt for passage in self.passages])
        centre = known.mean(0)
        keys = torch.nn.functional.normalize(known - centre, dim=-1)

        def look_up(prompt: Sequence[int]) -> Tensor:
            near = keys @ (self.features([prompt])[0] - centre)
            best = near.topk(min(self.count, len(near))).indices.flip(0)
            return torch.tensor([i for place in best.tolist() for i in self.passages[place].ids])

        return nullcontext(View(self.model, look_up=look_up))


class ClassifierStudent(Student):
    """`nested_learning.continual`'s classifier on the base model's features: class means and their kin.

    Sums over examples are all that is kept, so nothing is forgotten, whatever the order.

    Args:
        model: nothing of it is trained.
        features: its hidden states.
        depth: which of the features' layers.
        pooling: "mean" or "last"; see `Features.of`.
        settings: kind of the classifier, and its options.
    """

    def __init__(
        self, model: Any, features: Features, depth: float, pooling: str, settings: HeadSettings
    ) -> None:
        super().__init__(model)
        self.features = partial(features.of, depth=depth, pooling=pooling)
        self.head = ClassHead(settings)

    def learn(self, reading: Reading) -> None:
        passages = [passage for passage in reading.passages if passage.label is not None]
        labels = [passage.label for passage in passages if passage.label is not None]
        self.head.learn(self.features([passage.prompt for passage in passages]), labels)

    def active(self) -> AbstractContextManager[View]:
        raise ValueError("a classifier chooses labels and writes no text")

    def choose(self, prompts: Sequence[Sequence[int]], labels: dict[str, Sequence[int]]) -> list[str]:
        places = [self.head.labels.index(label) for label in labels]
        best = self.head.scores(self.features(prompts))[:, places].argmax(1)
        return [list(labels)[index] for index in best.tolist()]


class LevelStudent(Student):
    """`nested_learning.continual`: deltas that are written at several frequencies.

    Args:
        model: the base model.
        levels: fast to slow. Passages are packed into blocks of the fastest chunk's length.
        window: positions of the context, and tokens of it that a new one begins with; `by_itself` reads each
            chunk of the fastest level by itself. None: the default one.
        answers: indices of the levels that are in force when it is asked; None for all.
        examples: what stands before a prompt; None: nothing.
        starts: rates and starts of the levels; None: their own rates, from zero.
        replay: examples that are kept, each with its label, and mixed into what is learned; None: none.
    """

    def __init__(
        self,
        model: Any,
        levels: Sequence[Level],
        window: tuple[int, int] | None = None,
        answers: Sequence[int] | None = None,
        examples: ExampleStudent | None = None,
        starts: Starts | None = None,
        replay: Replay | None = None,
    ) -> None:
        super().__init__(model)
        self.block, self.answers, self.examples = levels[0].chunk_size, answers, examples
        positions, overlap = window or (None, None)
        self.learner = stack_levels(
            model, levels=levels, window=positions, overlap=overlap, starts=starts, replay=replay
        )

    def read(self, ids: Tensor) -> Tensor:
        losses: Tensor = self.learner.observe(ids)
        return losses.cpu()

    def learn(self, reading: Reading) -> None:
        if self.examples is not None:
            self.examples.learn(reading)
        if self.learner.replayer is not None:  # passage by passage: each is kept with its label
            for piece in reading.spaced(self.block):
                mask = torch.tensor(piece.mask).bool()
                self.learner.observe(torch.tensor(piece.ids), learn_mask=mask, label=piece.label)
            return
        blocks = reading.blocks(self.block)
        ids = torch.cat([block for block, _ in blocks])
        masks = [mask for _, mask in blocks if mask is not None]
        self.learner.observe(ids, learn_mask=torch.cat(masks) if masks else None)

    @contextmanager
    def active(self) -> Iterator[View]:
        context = None if self.examples is None else torch.tensor(self.examples.context(), dtype=torch.long)
        with self.learner.active(levels=self.answers) as model:
            yield View(model, context)


def by_itself(chunk: int) -> tuple[int, int]:
    """A window of `LevelStudent` in which each chunk sees itself and one token before it."""
    return chunk + 1, 1
