"""A task of a third party, with a method of its own: guesses of a coin that is loaded by the method."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch

from nested_learning.evals import Ahead, Method, Reaches, Task


@dataclass(frozen=True)
class CoinMethod(Method):
    kind: ClassVar[str] = "coin"
    chance: float = 0.5


@dataclass(frozen=True)
class CoinOptions:
    flips: int = 100
    seeds: int = 3
    fail: str = ""


GOOD, BAD, TUNED = CoinMethod("good", chance=0.9), CoinMethod("bad", chance=0.1), CoinMethod("tuned")


def unfit(kind):
    """What is no figures of a run."""
    if kind == "exit":
        raise SystemExit(3)
    deep = []
    deep.append(deep)
    return {
        "nan": {"heads": float("nan")},
        "tensor": {"heads": torch.tensor(0.5)},
        "numpy": {"heads": numpy.float32(0.5)},
        "None": None,
        "text": {"heads": "many"},
        "deep": {"heads": 1.0, "more": deep},
    }[kind]


class Coin(Task[CoinOptions]):
    name = "coin"
    title = "heads | tails <b>"
    budgets: ClassVar = {"smoke": CoinOptions(10), "small": CoinOptions(), "full": CoinOptions(1000)}
    columns: ClassVar = {"heads": "share of heads", "parameters": "none"}
    headline = "heads"

    def methods(self):
        return [GOOD, BAD, TUNED]

    def grid(self, method):
        return [{"bias": 0.2}, {"bias": 0.4}, {"bias": 0.3}] if method.name == "tuned" else [{}]

    def run(self, method, seed):
        if method.name == self.options.fail:
            raise ValueError("the coin | fell off <the> table")
        if self.options.fail.startswith(f"{method.name} "):
            return unfit(self.options.fail.split()[1])
        drawn = random.Random(seed)
        chance = method.settings.get("bias", method.chance)
        return {"heads": sum(drawn.random() < chance for _ in range(self.options.flips)) / self.options.flips}

    def constants(self):
        return {"always heads": {"heads": 1.0}}

    def claims(self):
        return [
            Ahead("good beats tuned beats bad", "Table 1", "heads", ("good", "tuned", "bad")),
            Ahead("bad beats good", "Table 1", "heads", ("bad", "good")),
            Reaches("heads always", "Fig. 1", "always heads", {"heads": 1.0}),
        ]

    def printed(self):
        return {"good": {"heads": 0.95}}

    def note(self):
        return "fewer flips than in the paper"
