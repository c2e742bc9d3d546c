"""Self-modifying Titans with chunks of a stated length, by which all memories write more or less often."""

from __future__ import annotations

from nested_learning.evals.methods.models import TrainedModel

CHUNKS = tuple(
    TrainedModel(
        f"self-modifying-titans-chunk-{size}",
        "self_modifying_titans",
        options={"chunk_size": size, "eta_max": 2.0},
    )
    for size in (1, 4, 32)
)
