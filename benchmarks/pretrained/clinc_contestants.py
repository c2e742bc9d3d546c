"""The methods that are compared on CLINC150, and the settings that each may choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.pretrained.clinc_methods import ClassMeans, Features, InContext, Levels, Method, Wording
from benchmarks.pretrained.clinc_training import ElasticWeights, FineTuning, Replay
from nested_learning.continual import Level

Options = dict[str, Any]
KEPT = 2  # examples of each class that replay and the context may keep
RATES = [3e-5, 1e-4, 3e-4]
DEPTHS = (0.33, 0.67, 1.0)


class Base(NamedTuple):
    """What methods are made of; none changes it."""

    model: Any
    wording: Wording
    features: Features


class Contestant(NamedTuple):
    """How to make a method (from the base, the seed and a setting), and the settings to try."""

    make: Callable[[Base, int, Options], Method]
    grid: Sequence[Options]
    is_joint: bool = False


def _stack(count: int, rate: float) -> Options:
    """Levels that write every 64, 256 and 1,024 tokens; the slower, the smaller the share of the rate."""
    ladder = [(64, 1.0), (256, 1.0), (1024, 1.0)][:count]
    levels = [{"chunk_size": size, "lr": rate * share, "layers": "all"} for size, share in ladder]
    return {"lr": rate, "levels": levels}


def _levels(base: Base, seed: int, options: Options) -> Method:
    return Levels(
        base.model, base.wording, [Level(**each) for each in options["levels"]], options.get("kept", 0)
    )


def contestants() -> dict[str, Contestant]:
    """By name, in the order of the table."""
    rates = [{"lr": lr} for lr in RATES]
    contexts = [{"kept": k, "order": order} for k in (1, KEPT) for order in ("stream", "mixed")]
    features = [
        {"depth": depth, "pooling": pooling, "shrinkage": shrinkage}
        for depth in DEPTHS
        for pooling in ("mean", "last")
        for shrinkage in (0.1, 0.5)
    ]
    penalties = [{"lr": lr, "strength": strength} for lr in RATES[:2] for strength in (1e2, 1e4, 1e6)]
    stacks = {count: [_stack(count, rate) for rate in (0.1, 0.3)] for count in (1, 2, 3)}
    return {
        "no examples": Contestant(lambda b, s, o: InContext(b.model, b.wording, kept=0), [{}]),
        "in context": Contestant(lambda b, s, o: InContext(b.model, b.wording, **o, seed=s), contexts),
        "fine-tuning": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), rates),
        "EWC": Contestant(lambda b, s, o: ElasticWeights(b.model, b.wording, **o), penalties),
        "replay": Contestant(lambda b, s, o: Replay(b.model, b.wording, **o, kept=KEPT, seed=s), rates),
        "class means": Contestant(lambda b, s, o: ClassMeans(b.features, **o), features),
        "1 level": Contestant(_levels, stacks[1]),
        "2 levels": Contestant(_levels, stacks[2]),
        "3 levels": Contestant(_levels, stacks[3]),
        "3 levels, in context": Contestant(_levels, [{**stack, "kept": 1} for stack in stacks[3]]),
        "joint": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), rates, is_joint=True),
    }
