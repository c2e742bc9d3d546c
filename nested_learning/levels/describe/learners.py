"""The description of a pretrained model with levels: `nested_learning.continual`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import cast

from torch import nn

from nested_learning.continual.budget import level_bytes
from nested_learning.continual.learner import Learner
from nested_learning.continual.level import Level
from nested_learning.levels.components import Transfer, every_tokens
from nested_learning.levels.describe.layers import written
from nested_learning.levels.describe.registry import Described, DescribedMemory, DescribedWeights


def describe_learner(learner: Learner) -> Iterator[Described]:
    """A memory per level, its delta Δ1, Δ2, …, beside the base weights that the deltas are added to.

    Weights that the same levels learn on are one component. Every level's gradient is taken at W_base + Σ Δ,
    so each is conditioned on the weights of the others.
    """
    writers = learner.reader.writers
    names = [f"Δ{writer.index + 1} (chunk {writer.level.chunk_size})" for writer in writers]
    for writer, name in zip(writers, names, strict=True):
        yield DescribedMemory(
            name=name,
            frequency=every_tokens(writer.level.chunk_size),
            state_bytes=sum(level_bytes(writer)),
            context=f"chunks of {writer.level.chunk_size} tokens",
            objective=_objective(writer.level),
            rule=_rule(writer.level),
            output="",
        )
    for levels, parameters in _weights(learner).items():
        own = [names[index] for index in levels]
        base = f"weights under {', '.join(f'Δ{index + 1}' for index in levels)}"
        yield DescribedWeights(base, parameters)
        yield Transfer(sources=(base,), targets=tuple(own), kind="initial state", what="W_base, where Δ is 0")
    for writer, name in zip(writers, names, strict=True):
        others = tuple(names[w.index] for w in writers if w is not writer and w.averaged is None)
        if others and writer.learns:
            what = "its gradient is taken at W_base + Σ Δ"
            yield Transfer(sources=others, targets=(name,), kind="conditioning on weights", what=what)
        if share := writer.level.consolidate:
            yield Transfer(
                sources=(names[writer.index - 1],),
                targets=(name,),
                kind="generation of weights",
                what=f"consolidation: {share:g} of Δ moves every {writer.level.chunk_size} tokens",
            )
        if writer.averaged is not None:
            yield Transfer(
                sources=(names[writer.averaged.index],),
                targets=(name,),
                kind="generation of weights",
                what=f"average, taken every {writer.level.chunk_size} tokens; it answers in its place",
            )


def _weights(learner: Learner) -> dict[tuple[int, ...], list[nn.Parameter]]:
    """Parameters by the levels that learn on them."""
    levels: dict[str, list[int]] = defaultdict(list)
    weights = {}
    for writer in learner.reader.writers:
        for target in writer.targets:
            levels[target.name].append(writer.index)
            weights[target.name] = target.weight
    found: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
    for name, indices in levels.items():
        found[tuple(indices)].append(cast(nn.Parameter, weights[name]))
    return found


def _objective(level: Level) -> str:
    """What a level's write makes smaller, in a line."""
    if level.average_of is not None:
        return f"½‖A − Δ{level.average_of + 1}‖²"
    parts = ["the next-token loss"]
    if level.distill:
        parts.append(f"{level.distill:g} · KL from answers with the closing window to those without")
    if level.anchor_kl:
        parts.append(f"{level.anchor_kl:g} · KL from the base model on background text")
    return " + ".join(parts)


def _rule(level: Level) -> str:
    """How a level writes, in a line."""
    if level.average_of is not None:
        of = level.average_of + 1
        parts = [f"A ← A + {level.rate:g} (Δ{of} − A); not in force while text is read, answers for Δ{of}"]
    else:
        parts = written(f"{level.describe()['rule']}, lr {level.lr:g} (eq 71)", level.lr, level.clip)
    if level.rank is not None:
        parts.append(f"rank {level.rank}" + ("" if level.learn_down else ", down fixed"))
    if level.sparse is not None:
        parts.append(f"to the {level.sparse:.3g} of the hidden units whose gradient stands out")
    if level.gate is not None:
        parts.append(f"where the loss exceeds {level.gate:g}")
    if level.gate_quantile is not None:
        parts.append(f"where the loss exceeds the running quantile {level.gate_quantile:g}")
    if level.decay:
        parts.append(f"decay {level.decay:g} towards the base")
    if level.reread:
        parts.append(f"chunk read again {level.reread} times")
    return "; ".join(parts)
