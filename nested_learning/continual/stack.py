"""`stack_levels`: a pretrained model turned into a continual learner (section 7.3 of arXiv 2512.24695)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from nested_learning.continual.compiled_calls import compiled_call
from nested_learning.continual.find import (
    Target,
    base_model,
    check_gradients,
    check_weights,
    find_targets,
)
from nested_learning.continual.inputs import TextOrIds
from nested_learning.continual.learner import Learner
from nested_learning.continual.level import Level, check_levels
from nested_learning.continual.objectives.anchors import Anchors
from nested_learning.continual.objectives.distil import plan_distillation
from nested_learning.continual.objectives.fisher import Fisher
from nested_learning.continual.plan import ReadingPlan
from nested_learning.continual.reader import Reader
from nested_learning.continual.replaying.settings import Replay
from nested_learning.continual.starts.starts import Starts
from nested_learning.continual.weights import Workspace
from nested_learning.continual.writing import DeltaWriter


@torch.inference_mode(False)  # what stays must be usable outside of that mode
def stack_levels(
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    levels: Sequence[Level],
    modules: Sequence[str] | None = None,
    segment: int | None = None,
    window: int | None = None,
    overlap: int | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    replay: Replay | None = None,
    distill_top_k: int | None = None,
    background: TextOrIds | None = None,
    fisher: Fisher | None = None,
    starts: Starts | str | os.PathLike[str] | None = None,
    compile: bool | Mapping[str, Any] = False,
) -> Learner:
    """Give the MLPs of a pretrained causal language model frequencies, and let it learn in context.

    The model stays as it is: its class, its parameters, its generate. With learning rates of 0 the learner
    computes exactly what the model computes. Long: it describes sixteen arguments.

    Args:
        model: any transformers causal language model whose layers all have attention, in any precision, also
            quantised ones, under peft's adapters (which stay in force and are part of what is kept) or under
            torch.compile (whose calls are stepped round while deltas are in force; see `compile`). Deltas are
            float32 (float64 under float64).
        tokenizer: tokenizer for text; None if only ids come.
        levels: the levels, fast to slow, chunk sizes increasing. Each has its own layers; where they
            overlap, W is W_base plus all their deltas.
        modules: names (or ends of names) of the linear modules to learn; default: the MLPs.
        segment: most tokens of one forward and backward pass. Default: the fastest chunk, or half of the
            model's positions where that is longer. A chunk of several segments sums their gradients; none
            flows from one segment into another.
        window: positions of the attention context, the segment included. Default: 1,024 or two
            segments, whichever is more, at most the model's positions. Attention to a longer context is
            what costs most beyond a plain forward and backward pass.
        overlap: tokens that are read again, without gradient, when a new window begins. Default: an eighth
            of the window.
        gradient_checkpointing: keep only the inputs of the layers, and run them twice.
        seed: seed of the initial factors of low-rank deltas.
        replay: keep examples of what is read, and mix them into what is learned; None to keep nothing of it
            but the tokens of the present window.
        distill_top_k: how many of the likeliest values of each token are kept as what a level with `distill`
            is taught, the others together as one more. Default: 64.
        background: text for levels with `anchor_kl`, as `Learner.observe` takes it: a text, ids, or a list
            of them.
        fisher: Fisher diagonal of background text, which scales the decay of each weight; see `Fisher`.
        starts: rates and starts that `learn_starts` has found for these levels on this model, or their file.
        compile: run the base model through torch.compile while deltas are in force, in `observe` as in
            `generate`, from now on for all learners on it; or options of torch.compile, such as
            {"backend": "aot_eager"}. The first windows take long. Where the compiler fails it warns once, and
            the model runs plainly.

    Raises:
        ValueError: the MLPs cannot be found (the message lists candidates), chunk sizes that do not
            increase, layers out of range, a rank too large, a window that does not fit, or starts of
            another model or of other levels; compile with what is not compiled.
        FileNotFoundError: there is no such file of starts.
    """
    levels = check_levels(levels)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if not isinstance(compile, (bool, Mapping)):
        raise ValueError(f"compile must be True, False or options of torch.compile, got {compile!r}")
    if not isinstance(starts, (Starts, str, os.PathLike, type(None))):
        raise ValueError(f"starts must be what learn_starts returned, or its file, got {starts!r}")
    model = base_model(model)
    workspace = Workspace.of(model)
    with workspace.bare():  # another learner may have its deltas in force
        targets = find_targets(model, modules)
    if isinstance(starts, (str, os.PathLike)):
        starts = Starts.load(starts)
    anchors = Anchors.checked(model, tokenizer, levels, background, fisher, starts)
    writers = _writers(levels, targets, seed, fisher, starts)
    check_weights([target for writer in writers for target in writer.targets])
    if any(writer.learns for writer in writers):
        with workspace.bare():
            check_gradients(model)
    plan = ReadingPlan.fitted(model, levels, segment, window, overlap, gradient_checkpointing)
    plan = plan_distillation(plan, levels, distill_top_k)
    reader = Reader(model, writers, plan, anchors)
    with workspace.bare():
        reader.contexts.check(model)
    if compile:
        workspace.call = compiled_call(reader, {} if compile is True else compile)
    return Learner(model, tokenizer, reader, replay)


def _writers(
    levels: Sequence[Level],
    targets: Sequence[Target],
    seed: int,
    fisher: Fisher | None,
    starts: Starts | None,
) -> list[DeltaWriter]:
    num_layers = len({target.layer for target in targets})
    scale = fisher.diagonal if fisher else None
    writers: list[DeltaWriter] = []
    for index, level in enumerate(levels):
        chosen = set(level.layer_indices(num_layers))
        own = [target for target in targets if target.layer in chosen]
        faster = [writer for writer in writers if writer.averaged is None]
        averaged = None if level.average_of is None else writers[level.average_of]
        fast = faster[-1] if faster else None
        start = starts.of_level(index, [target.name for target in own]) if starts else None
        writers.append(DeltaWriter(index, level, own, seed, fast, averaged, scale, start))
    return writers
