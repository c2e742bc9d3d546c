"""Settings of replay, and the choices that follow from them: which examples stay, which are read again."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nested_learning.continual.replaying.store import KeptExample, Store
from nested_learning.optimizers.checks import Bound, Choice

CHOICES = ("random", "surprise", "label")
CAPACITY = Bound(low=2, integer=True)
SEED = Bound(integer=True)
SHARE = Bound(high=1.0, open_low=True, open_high=True)


@dataclass(frozen=True)
class Replay:
    """How much of what was read is kept, and how it is mixed into what is learned.

    Text is kept as examples of at most `piece` tokens, cut from where its source (or its labelled text)
    begins. At a boundary of a level that learns, with n learned tokens in its chunk, the gradient G of the
    write gets that of

        r = round(n · share / (1 − share))

    learned tokens of kept examples (fewer if the store has fewer): each example is read alone, from an empty
    context, with the deltas that were in force while the chunk's last segment was read; the last one is cut
    where r is reached. Only examples that end before the level's chunk begins are replayed. Which ones is a
    function of the seed, the level, the position and the store alone.

    Args:
        tokens: capacity of the store of one row.
        share: share of replayed tokens among the learned tokens of a write, above 0 and below 1.
        choose: "random": all examples alike, and a full store is a random sample of all that was read;
            "surprise": with a probability in proportion to the mean next-token loss that their learned
            tokens had when they were read, and a full store drops the least surprising one; "label": labels
            in turn, examples of a label alike, and a full store drops one of the largest label.
        piece: most tokens of an example.
        seed: seed of the choices.

    Raises:
        ValueError: a value is out of its range, or a piece does not fit into the store.
    """

    tokens: int = 65_536
    share: float = 0.25
    choose: str = "random"
    piece: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        CAPACITY.check("tokens", self.tokens)
        SHARE.check("share", self.share)
        Choice(CHOICES).check("choose", self.choose)
        CAPACITY.check("piece", self.piece)
        SEED.check("seed", self.seed)
        if self.piece > self.tokens:
            raise ValueError(
                f"an example of {self.piece} tokens (piece) does not fit into a store of {self.tokens} "
                f"(tokens); expected a piece of at most {self.tokens}"
            )

    def bounded(self, store: Store) -> Store:
        """The store within its capacity: examples are dropped until it is, never the unfinished last one."""
        examples, total = list(store.examples), store.tokens
        while total > self.tokens:
            droppable = examples[:-1] if len(examples[-1]) < self.piece else examples
            victim = self._least_wanted(droppable)
            examples.remove(victim)
            total -= len(victim)
        if len(examples) == len(store.examples):
            return store
        return dataclasses.replace(store, examples=tuple(examples)).incomplete("dropped")

    def _least_wanted(self, examples: Sequence[KeptExample]) -> KeptExample:
        if self.choose == "surprise":
            return min(examples, key=lambda example: (example.surprise, example.start))
        if self.choose == "label":
            sizes: Counter[str | None] = Counter()
            for example in examples:
                sizes[example.label] += len(example)
            largest = max(sizes.values())
            examples = [example for example in examples if sizes[example.label] == largest]
        return min(examples, key=lambda example: _priority(self.seed, example.start))

    def drawn(self, store: Store, learned: int, chunk_start: int, place: str) -> list[KeptExample]:
        """The examples that a write replays.

        Args:
            store: the store.
            learned: learned tokens of the chunk.
            chunk_start: position at which the chunk begins.
            place: name of the boundary; another one gives another choice.
        """
        left = round(learned * self.share / (1 - self.share))
        candidates = [e for e in store.examples if e.end <= chunk_start and e.learned] if left else []
        chosen = []
        for example in self._ordered(candidates, random.Random(f"{self.seed}/{place}")):
            if left <= 0:
                break
            chosen.append(example if example.learned <= left else _cut(example, left))
            left -= example.learned
        return chosen

    def _ordered(self, examples: Sequence[KeptExample], rng: random.Random) -> Iterator[KeptExample]:
        """The examples in the order in which they are replayed."""
        if self.choose == "surprise":
            # The smallest of exponential times with rates w_i is that of i with probability w_i / Σ w.
            times = [rng.expovariate(1.0) / max(example.surprise, 1e-9) for example in examples]
            return iter([examples[i] for i in sorted(range(len(examples)), key=times.__getitem__)])
        shuffled = rng.sample(list(examples), len(examples))
        if self.choose == "random":
            return iter(shuffled)
        by_label: dict[str | None, list[KeptExample]] = {}
        for example in shuffled:
            by_label.setdefault(example.label, []).append(example)
        turns = max(map(len, by_label.values()), default=0)
        labels = rng.sample(list(by_label.values()), len(by_label))
        return (own[turn] for turn in range(turns) for own in labels if turn < len(own))


@functools.lru_cache(maxsize=1 << 16)
def _priority(seed: int, start: int) -> float:
    """A random number for the example that begins at token `start`: a full store keeps the highest."""
    return random.Random(f"{seed}/{start}").random()


def _cut(example: KeptExample, learned: int) -> KeptExample:
    """The beginning of an example that has so many learned tokens."""
    length = int(example.learn[1:].cumsum(0).eq(learned).nonzero()[0]) + 2
    return dataclasses.replace(example, tokens=example.tokens[:length], learn=example.learn[:length])
