"""Self-modifying Titans with chunks of a stated length: how often the generating memories write."""

from __future__ import annotations

from nested_learning.evals.methods.models import TrainedModel

CHUNKS = tuple(
    TrainedModel(f"self-modifying-titans-chunk-{size}", "self_modifying_titans", options={"chunk_size": size})
    for size in (1, 4, 32)
)
