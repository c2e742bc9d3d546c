"""A learner reads a text, and what it learned is compared with its base model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning._progress import progress
from nested_learning.continual import Learner, Level
from nested_learning.continual.find import Target, is_quantised
from nested_learning.continual.inputs import TextOrIds, read_batch
from nested_learning.layers.memory.watch import Array, as_array
from nested_learning.lens.recording import Recording
from nested_learning.lens.traces import LearnedTrace, Prediction
from nested_learning.lens.words import word, words
from nested_learning.levels import levels
from nested_learning.memory.state import Weights

LONGEST_WINDOW = 512  # tokens of a pass whose predictions are compared
PREDICTIONS, LIKELIEST = 40, 5


def record_learner(learner: Learner, text_or_ids: TextOrIds, row: int = 0) -> Recording:
    """Let a learner read a text, and compare it with its base model, before and after.

    The learner is left as it was: what it learned from the text is undone.

    Args:
        learner: of a pretrained model; what its memory holds already is part of "after".
        text_or_ids: a text, or ids [T], at least two tokens.
        row: the row of the memory that reads.

    Returns: the recording. Its loss is that of `observe`, while reading.

    Raises:
        ValueError: as `Learner.observe`, several texts, or fewer than two tokens.
    """
    batch = read_batch(text_or_ids, learner.tokenizer, learner.model)
    if batch.kind != "one" or len(batch.rows[0]) < 2:
        got = f"{len(batch.rows)} of them" if batch.kind != "one" else "one token"
        raise ValueError(f"expected one text, or ids [T], of at least two tokens; got {got}")
    ids, start = batch.rows[0], learner.memory.row(row).position
    with learner.adaptation_scope():
        loss = learner.observe(ids, row=row)
        writes = tuple(learner.writes)
        diff = learner.memory.diff(row=row)
        compared = _Comparison(learner, ids, row)
    targets = {target.name: target for writer in learner.reader.writers for target in writer.targets}
    norms = {name: float(D.norm()) for name, D in diff.items()}
    return Recording(
        model=_line(learner),
        tokens=words(learner.tokenizer, ids.tolist()),
        ids=ids.cpu().numpy(),
        loss=as_array(loss),
        moments=np.zeros(0, dtype=np.int64),
        memories=(),
        levels=(),
        system=levels(learner),
        learned=LearnedTrace(
            start=start,
            before=compared.before,
            after=compared.after,
            divergence=compared.divergence,
            levels=tuple(_level(level) for level in learner.levels),
            writes=writes,
            norms=norms,
            relative={name: norm / _size(targets[name].weight) for name, norm in norms.items()},
            layers={name: targets[name].layer for name in norms},
            units=_units(learner, diff, targets),
            predictions=compared.predictions,
        ),
    )


def _units(learner: Learner, diff: Weights, targets: dict[str, Target]) -> dict[str, Array]:
    """Per weight the norm of each hidden unit's change: of rows [out] where out is not the model's width,
    else of columns [in] where in is not, else of rows."""
    width = getattr(learner.model.config, "hidden_size", None)
    found = {}
    for name, D in diff.items():
        D = D.mT if targets[name].transposed else D
        inward = D.shape[-2] == width and D.shape[-1] != width
        found[name] = as_array(torch.linalg.vector_norm(D, dim=-2 if inward else -1).flatten())
    return found


class _Comparison:
    """Predictions of the base model and of the model with a row's deltas, window by window.

    Attributes: before, after, divergence, predictions, as in `LearnedTrace`.
    """

    def __init__(self, learner: Learner, ids: Tensor, row: int) -> None:
        self.learner = learner
        parts: list[tuple[Array, ...]] = []
        candidates: list[Prediction] = []
        window = min(learner.reader.plan.window, LONGEST_WINDOW)
        windows = _windows(len(ids), window, min(learner.reader.plan.overlap, window // 2))
        with progress("comparing with the base model", len(ids), "token") as bar:
            for start, first, stop in windows:
                told = ids[first:stop]
                seen, count = ids[start : stop - 1], len(told)
                base = self._log_probabilities(seen, count, row, levels=[])
                now = self._log_probabilities(seen, count, row, levels=None)
                divergence = F.kl_div(base, now, reduction="none", log_target=True).sum(-1)
                losses = (-p.gather(1, told.unsqueeze(1)).squeeze(1) for p in (base, now))
                parts.append((*(as_array(part) for part in losses), as_array(divergence)))
                bar.advance(count)
                most = divergence.nan_to_num().topk(min(PREDICTIONS, len(told))).indices.tolist()
                candidates += [
                    Prediction(
                        first + i, float(divergence[i]), self._likeliest(base[i]), self._likeliest(now[i])
                    )
                    for i in most
                ]
        first_token = np.full(1, np.nan)
        self.before, self.after, self.divergence = (
            np.concatenate([first_token, *columns]) for columns in zip(*parts, strict=True)
        )
        candidates.sort(key=lambda prediction: -prediction.divergence)
        self.predictions = tuple(candidates[:PREDICTIONS])

    def _log_probabilities(self, ids: Tensor, count: int, row: int, levels: list[int] | None) -> Tensor:
        """Log-probabilities [count, V] after the last `count` of ids."""
        logits = self.learner.logits(ids.unsqueeze(0), row=row, levels=levels)[0, -count:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _likeliest(self, log_probabilities: Tensor) -> tuple[tuple[str, float], ...]:
        top = log_probabilities.topk(min(LIKELIEST, len(log_probabilities)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return tuple((word(self.learner.tokenizer, index), math.exp(value)) for index, value in pairs)


def _windows(count: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop): tokens first … stop − 1 are predicted in a window that begins at `start`."""
    start, first = 0, 1
    while first < count:
        stop = min(count, start + window + 1)  # the last token is predicted and not read
        yield start, first, stop
        start, first = max(stop - overlap, 0), stop


def _line(learner: Learner) -> str:
    model = learner.model
    name = getattr(model.config, "name_or_path", "") or ""
    label = f" {name}" if name else ""
    return (
        f"{type(model).__name__}{label}, {model.num_parameters():,} parameters, {len(learner.levels)} levels"
    )


def _size(weight: Tensor) -> float:
    """Frobenius norm of a base weight; NaN of one that is quantised, or zero."""
    return math.nan if is_quantised(weight) else float(weight.detach().norm()) or math.nan


def _level(level: Level) -> str:
    if level.average_of is not None:
        of = f"average of level {level.average_of + 1}, rate {level.rate:g}"
        return f"every {level.chunk_size:,} tokens, {of}"
    rule = level.rule if isinstance(level.rule, str) else type(level.rule).__name__
    return f"every {level.chunk_size:,} tokens, lr {level.lr:g}, {rule}"
