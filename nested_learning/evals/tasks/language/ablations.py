"""Language modelling by Hope without one of its parts: the ablations of the paper's Table 6."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from nested_learning.evals.claims import Ahead, Claim
from nested_learning.evals.method import Method
from nested_learning.evals.methods.models import TrainedModel
from nested_learning.evals.registry import register_method, register_task
from nested_learning.evals.tasks.language.task import LanguageModelling

MIXER = "self_modifying_titans"
WHOLE: dict[str, Any] = {"momentum": True, "adaptive_q": True}  # beside DGD, retention, adaptive k and v
HOPE = "hope-full"
# A method for each row of the table: its options, whether it has a CMS, perplexity and accuracy as printed.
ROWS: dict[str, tuple[dict[str, Any], bool, float, float]] = {
    HOPE: ({}, True, 12.24, 58.1),
    "hope-no-dgd": ({"rule": "gd"}, True, 13.41, 56.5),
    "hope-no-momentum": ({"momentum": False}, True, 13.58, 56.9),
    "hope-no-retention": ({"decay": "none"}, True, 13.71, 57.2),
    "hope-no-cms": ({}, False, 13.04, 57.3),
    "hope-static-k": ({"adaptive_k": False}, True, 13.77, 56.9),
    "hope-static-v": ({"adaptive_v": False}, True, 13.90, 55.1),
    "hope-static-q": ({"adaptive_q": False}, True, 12.19, 57.4),
}
VARIANTS = tuple(
    register_method(
        TrainedModel(name, MIXER, options=WHOLE | options, levels="periods" if has_cms else "one")
    )
    for name, (options, has_cms, _, _) in ROWS.items()
)


@register_task
class Ablations(LanguageModelling):
    """Language modelling by Hope with all its parts, and without each of them, at equal parameters."""

    name = "ablations"
    title = "language modelling without DGD, momentum, retention, CMS, adaptive k, v, q: Table 6"
    budgets: ClassVar[Mapping[str, Any]] = {
        budget: dataclasses.replace(options, seeds=min(options.seeds, 3))
        for budget, options in LanguageModelling.budgets.items()
    }

    def methods(self) -> Sequence[Method]:
        return VARIANTS

    def claims(self) -> Sequence[Claim]:
        helps = {
            "hope-no-dgd": "(2) DGD beats gradient descent inside",
            "hope-no-momentum": "(3) momentum helps",
            "hope-no-retention": "(4) weight decay helps",
            "hope-no-cms": "(5) the CMS helps",
            "hope-static-k": "(6) adaptive k helps",
            "hope-static-v": "(6) adaptive v helps",
        }
        pairs = [(text, (HOPE, name)) for name, text in helps.items()]
        pairs.append(("(6) adaptive q does not help", ("hope-static-q", HOPE)))
        return [Ahead(text, "Table 6", self.headline, order, higher=False) for text, order in pairs]

    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Perplexity and accuracy of Table 6."""
        return {name: {"ppl": ppl, "accuracy": accuracy} for name, (_, _, ppl, accuracy) in ROWS.items()}

    def note(self) -> str:
        return (
            f"{HOPE} has DGD, momentum, retention, a CMS of two levels that step at their own frequencies, "
            "and memories that generate k, v and q; each other row has one of these less, and as many "
            "parameters. "
            f"{super().note()}"
        )
