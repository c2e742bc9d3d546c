"""Hope with all its parts, and with one of them left out or put in: what its figures come from.

Each is a memory composed of parts, so that a row differs from the first one in what its name says alone.
"""

from __future__ import annotations

from typing import Any

from nested_learning.evals.methods.models import TrainedModel

# Self-modifying Titans with momentum: five memories, four of which generate k, v, η and α, with targets of
# their own; q is a projection, with which the paper's Hope is better.
WHOLE: dict[str, Any] = {
    "generated": ["k", "v", "eta", "alpha"],
    "self_targets": True,
    "rule": "dgd",
    "momentum": True,
}
# The delta rule with decay on one matrix: exact, no chunk enters its result. One head's matrix has as many
# numbers as the two of each head of an MLP memory with two heads.
LINEAR: dict[str, Any] = {"architecture": "matrix", "gradient": "token", "unit": ["k", "q"]}


def _variant(name: str, levels: Any = "periods", num_levels: int = 2, **parts: Any) -> TrainedModel:
    return TrainedModel(
        f"mechanism-{name}", "memory", options={**WHOLE, **parts}, levels=levels, num_levels=num_levels
    )


GRID = (
    _variant("whole"),
    _variant("static", generated=[], self_targets=False),
    _variant("given-targets", self_targets=False),
    _variant("static-k-v", generated=["eta", "alpha"]),
    _variant("adaptive-q", generated=["k", "v", "q", "eta", "alpha"]),
    _variant("no-momentum", momentum=False),
    _variant("one-level", levels="one"),
    TrainedModel("mechanism-linear", "memory", options=LINEAR, levels="periods", heads=1),
)
MORE = (
    _variant("three-levels", num_levels=3),
    _variant("in-context", levels="in context"),
    _variant("static-gates", generated=["k", "v"]),
    _variant("ungated", generated=["k", "v"], rate="one"),
)
