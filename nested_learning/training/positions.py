"""Loss by position in the document: whole documents read block by block, the state carried or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from nested_learning._progress import progress
from nested_learning.models import HopeConfig
from nested_learning.models.hope.cache_hope import HopeCache
from nested_learning.training.data.packing import IGNORED
from nested_learning.training.data.streams import DocumentBlocks, DocumentIds

FIRST_BUCKET = 16  # positions 1 to 15; every later bucket is as long as all before it
MODES = ("empty", "carried")  # from the empty state in every block, or from that after the block before

Score = dict[str, Any]


def buckets(longest: int) -> list[int]:
    """First positions of the buckets of documents of up to `longest` tokens: 1, 16, 32, 64, …"""
    starts = [1]
    while max(starts[-1] * 2, FIRST_BUCKET) < longest:
        starts.append(max(starts[-1] * 2, FIRST_BUCKET))
    return starts


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel,
    documents: DocumentIds,
    block_size: int,
    carry: bool,
    rows: int = 16,
    accelerator: Accelerator | None = None,
) -> Score:
    """Mean losses of the tokens of whole documents, by their position in the document.

    All tokens but each document's first are predicted, those at the start of a block too. So both ways of
    reading score the same tokens.

    Args:
        model: a Hope model; its mode is left as it was.
        documents: ids [n] of each document.
        block_size: tokens that are read at once.
        carry: go on in each block from the state after the block before it; False: from the empty state.
        rows: documents read at a time, over all processes.
        accelerator: that of several processes, each of which reads its part; they all get the result.

    Returns:
        A dict fit for JSON: "nats_per_token" and "tokens", over all, and "buckets": for each "from" and "to",
        the first position and the one after the last (0 is a document's first token), "tokens" and
        "nats_per_token".
    """
    starts = buckets(max(map(len, documents)))
    index, processes = (
        (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    )
    blocks = DocumentBlocks(documents, block_size, max(rows, processes), index, processes)
    was_training = model.training
    model.eval()
    sums = _sums(model, blocks, torch.tensor(starts), carry)
    model.train(was_training)
    if accelerator is not None:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    tokens, nats = sums[0].long().tolist(), sums[1].tolist()
    ends = [*starts[1:], max(map(len, documents))]
    return {
        "tokens": sum(tokens),
        "nats_per_token": sum(nats) / max(sum(tokens), 1),
        "buckets": [
            {"from": start, "to": end, "tokens": n, "nats_per_token": total / n if n else None}
            for start, end, n, total in zip(starts, ends, tokens, nats, strict=True)
        ],
    }


def _sums(model: PreTrainedModel, blocks: DocumentBlocks, starts: Tensor, carry: bool) -> Tensor:
    """[2, buckets] float64: tokens in each bucket, and the sum of their losses."""
    sums = torch.zeros(2, len(starts), dtype=torch.float64)
    cache = HopeCache(cast(HopeConfig, model.config)) if carry else None
    with progress("scoring by position", blocks.steps, "block") as bar:
        for batch in blocks:
            rows = len(batch["input_ids"])
            labels, positions = batch.pop("shift_labels").flatten(), batch["position_ids"].flatten() + 1
            if cache is not None and cache.batch_size not in (None, rows):
                cache = cache.select_rows(torch.arange(rows))  # the others have ended
            given = {name: value.to(model.device) for name, value in batch.items()}
            logits = model(**given, past_key_values=cache, use_cache=carry).logits
            logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(logits, labels.to(logits.device), ignore_index=IGNORED, reduction="none")
            counted = labels != IGNORED
            bucket = torch.bucketize(positions[counted], starts, right=True) - 1
            sums[0].index_add_(0, bucket, torch.ones_like(bucket, dtype=sums.dtype))
            sums[1].index_add_(0, bucket, losses.cpu()[counted].to(sums.dtype))
            bar.advance()
    return sums


def score_both_ways(
    model: PreTrainedModel,
    documents: DocumentIds,
    block_size: int,
    rows: int = 16,
    accelerator: Accelerator | None = None,
) -> Score:
    """Losses by position of documents read from the empty state in every block, and with the state carried.

    Arguments as in `loss_by_position`.

    Returns:
        A dict fit for JSON: "block_size", the number of "documents" and of scored "tokens", "nats_per_token"
        of each of `MODES`, and the "table": per bucket "from", "to", "tokens" and the mean loss of each mode.
    """
    found = [
        loss_by_position(model, documents, block_size, mode == "carried", rows, accelerator) for mode in MODES
    ]
    table = [
        {
            **{key: either[0][key] for key in ("from", "to", "tokens")},
            **{mode: _finite(bucket["nats_per_token"]) for mode, bucket in zip(MODES, either, strict=True)},
        }
        for either in zip(*(each["buckets"] for each in found), strict=True)
    ]
    return {
        "block_size": block_size,
        "documents": len(documents),
        "tokens": found[0]["tokens"],
        "nats_per_token": {
            mode: _finite(each["nats_per_token"]) for mode, each in zip(MODES, found, strict=True)
        },
        "table": table,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no NaN


def curves(score: Score) -> dict[str, list[tuple[float, float]]]:
    """Points of each mode, for a plot: (geometric mean of a bucket's ends, mean loss in it)."""
    return {
        mode: [
            (math.sqrt(row["from"] * row["to"]), row[mode]) for row in score["table"] if row[mode] is not None
        ]
        for mode in MODES
    }


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean over runs that were scored on the same documents."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    rows = zip(*(score["table"] for score in scores), strict=True)
    return {
        **scores[0],
        "nats_per_token": {mode: mean([score["nats_per_token"][mode] for score in scores]) for mode in MODES},
        "table": [{**row[0], **{mode: mean([each[mode] for each in row]) for mode in MODES}} for row in rows],
    }
