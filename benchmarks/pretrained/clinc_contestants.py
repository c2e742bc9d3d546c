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
    """Base model, wording and features, of which methods are made; none changes them."""

    model: Any
    wording: Wording
    features: Features


class Contestant(NamedTuple):
    """A function that makes a method (from the base, the seed and a setting), and the settings to try."""

    make: Callable[[Base, int, Options], Method]
    grid: Sequence[Options]
    is_joint: bool = False


CHUNKS = (128, 512, 2048)  # tokens: about 7 examples, 30, and 120 of a task's 300


def _summed(count: int, rate: float, share: float = 1.0) -> Options:
    """`count` levels that learn and answer together; each has `share` of the rate of the next faster one."""
    ladder = [
        {"chunk_size": size, "lr": rate * share**index, "layers": "all"}
        for index, size in enumerate(CHUNKS[:count])
    ]
    return {"lr": rate, "share": share, "levels": ladder}


def _consolidated(rate: float, *shares: float) -> Options:
    """The fastest level learns; each slower one takes over a share of the one before; the slowest answers."""
    slow = [
        {"chunk_size": size, "lr": 0.0, "consolidate": share}
        for size, share in zip(CHUNKS[1:], shares, strict=False)
    ]
    levels = [{"chunk_size": CHUNKS[0], "lr": rate}, *slow]
    return {"lr": rate, "consolidate": list(shares), "levels": levels, "answers": [len(shares)]}


def _levels(base: Base, seed: int, options: Options) -> Method:
    levels = [Level(**each) for each in options["levels"]]
    return Levels(base.model, base.wording, levels, options.get("kept", 0), options.get("answers"))


def contestants() -> dict[str, Contestant]:
    """The contestants by name, in the order of the table."""
    rates = [{"lr": lr} for lr in RATES]
    contexts = [{"kept": k, "order": order} for k in (1, KEPT) for order in ("stream", "mixed")]
    features = [
        {"depth": depth, "pooling": pooling, "shrinkage": shrinkage}
        for depth in DEPTHS
        for pooling in ("mean", "last")
        for shrinkage in (0.1, 0.5)
    ]
    penalties = [{"lr": lr, "strength": strength} for lr in RATES[1:] for strength in (1e3, 1e5)]
    penalties += [{"lr": lr, "strength": strength} for lr in (3e-4, 1e-3) for strength in (1e6, 1e7)]
    averages = [{"lr": lr, "average": share} for lr in RATES[1:] for share in (0.05, 0.1)]
    one = [_summed(1, rate) for rate in (0.3, 0.6, 1.0, 1.5)]
    two = [_consolidated(rate, share) for rate in (0.6, 1.0) for share in (0.05, 0.1)]
    three = [_consolidated(rate, 0.2, share) for rate in (0.6, 1.0) for share in (0.2, 0.4)]
    three += [_consolidated(1.0, 0.2, 0.8), _consolidated(1.0, 0.4, 0.4), _consolidated(1.5, 0.4, 0.4)]
    summed = [_summed(3, rate, share) for rate in (0.6, 1.0) for share in (1.0, 0.25)]
    in_context = [{**options, "kept": 1} for options in three[:4:2]]
    return {
        "no examples": Contestant(lambda b, s, o: InContext(b.model, b.wording, kept=0), [{}]),
        "in context": Contestant(lambda b, s, o: InContext(b.model, b.wording, **o, seed=s), contexts),
        "fine-tuning": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), rates),
        "fine-tuning, averaged": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), averages),
        "EWC": Contestant(lambda b, s, o: ElasticWeights(b.model, b.wording, **o), penalties),
        "replay": Contestant(lambda b, s, o: Replay(b.model, b.wording, **o, kept=KEPT, seed=s), rates[1:]),
        "class means": Contestant(lambda b, s, o: ClassMeans(b.features, **o), features),
        "1 level": Contestant(_levels, one),
        "2 levels": Contestant(_levels, two),
        "3 levels": Contestant(_levels, three),
        "3 levels, summed": Contestant(_levels, summed),
        "3 levels, in context": Contestant(_levels, in_context),
        "joint": Contestant(lambda b, s, o: FineTuning(b.model, b.wording, **o), rates[1:], is_joint=True),
    }
