"""chrF (Popović, 2015): F-score of character n-grams, as machine translation is scored by.

Of all segments together: precision and recall of the n-grams of each order 1 to 6, white space removed; their
means over the orders that occur on both sides; F with β = 2, in percent. As sacrebleu's default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ORDER = 6
BETA = 2.0


def ngrams(text: str) -> list[Counter[str]]:
    """Counts of the character n-grams of each order, without white space."""
    letters = "".join(text.split())
    return [
        Counter(letters[i : i + order] for i in range(len(letters) - order + 1))
        for order in range(1, ORDER + 1)
    ]


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """chrF of translations, one reference each; from 0 to 100.

    Raises:
        ValueError: another number of references, or none.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"got {len(hypotheses)} translations for {len(references)} references")
    ours, theirs, common = [0] * ORDER, [0] * ORDER, [0] * ORDER
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for order, (a, b) in enumerate(zip(ngrams(hypothesis), ngrams(reference), strict=True)):
            ours[order] += a.total() if b else 0  # an order that the reference is too short for
            theirs[order] += b.total()
            common[order] += (a & b).total()
    counted = [order for order in range(ORDER) if ours[order] and theirs[order]]
    if not counted:
        return 0.0
    precision = sum(common[order] / ours[order] for order in counted) / len(counted)
    recall = sum(common[order] / theirs[order] for order in counted) / len(counted)
    if not precision + recall:
        return 0.0
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
