"""A classifier on the hidden states of a base model, which grows with the labels that it is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nested_learning.continual.files import fingerprint, to_json
from nested_learning.continual.inputs import TextOrIds, read_batch
from nested_learning.continual.labels.class_file import read_head, write_head
from nested_learning.continual.labels.class_head import ClassHead
from nested_learning.continual.labels.hidden_features import HiddenFeatures
from nested_learning.continual.weights import Workspace


class Classifier:
    """Labels of texts by class means or discriminant analysis of a model's hidden states; see
    `Learner.classifier`.

    No example is kept, no weight is trained, and the order of the examples matters to rounding alone (but
    for the first ones of "kernel lda", see `HeadSettings.first`).

    Attributes:
        head: sums over what was learned; its settings.
    """

    def __init__(self, features: HiddenFeatures, tokenizer: Any, head: ClassHead) -> None:
        self.head = head
        self._features, self._tokenizer = features, tokenizer

    @property
    def labels(self) -> list[str]:
        """Labels in the order in which they came first."""
        return self.head.labels

    @torch.inference_mode(False)
    def learn(self, text_or_ids: TextOrIds, label: str | Sequence[str]) -> None:
        """Learn an example, or several.

        Args:
            text_or_ids: a text or ids [T], or a list of them, or ids [B, T].
            label: its label; of several a list of labels.

        Raises:
            ValueError: as `Learner.observe`; a text longer than the model's positions; labels that are no
                texts, or not as many as examples. Nothing is learned then.
        """
        batch = read_batch(text_or_ids, self._tokenizer, self._features.model)
        labels = [label] if batch.kind == "one" else label
        fits = isinstance(labels, Sequence) and not isinstance(labels, str)
        if not fits or not all(isinstance(each, str) and each for each in labels):
            raise ValueError(f"expected a text as the label of each example, got {label!r}")
        if len(labels) != len(batch.rows):
            raise ValueError(f"got {len(labels)} label(s) for {len(batch.rows)} example(s)")
        self.head.learn(self._features.of(batch.rows), [str(each) for each in labels])

    def predict(self, text_or_ids: TextOrIds) -> Any:
        """The label of a text, or a list of labels of several. ValueError if nothing was learned yet."""
        batch = read_batch(text_or_ids, self._tokenizer, self._features.model)
        found = [
            self.labels[place] for place in self.head.scores(self._features.of(batch.rows)).argmax(1).tolist()
        ]
        return found[0] if batch.kind == "one" else found

    def scores(self, text_or_ids: TextOrIds) -> Tensor:
        """Scores [C] of a text's labels, or [B, C] of several texts', float64, in the order of `labels`.

        Their softmax are probabilities, where all classes are equally frequent.
        """
        batch = read_batch(text_or_ids, self._tokenizer, self._features.model)
        scores = self.head.scores(self._features.of(batch.rows))
        return scores[0] if batch.kind == "one" else scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that was learned to one safetensors file, whole or not at all.

        Raises:
            ValueError: the path is that of a folder, a device or a pipe.
            OSError: it cannot be written; an earlier file is left as it was.
        """
        write_head(path, self.head, self._identity())

    @torch.inference_mode(False)
    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over what a classifier of the same settings, on the same base model, has saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another base model or of other settings; all stays as it was.
        """
        width = int(self._features.model.config.hidden_size)
        self.head = read_head(path, self.head.settings, width, self._identity())

    def _identity(self) -> dict[str, str]:
        with Workspace.of(self._features.model).bare():
            base = fingerprint(self._features.model)
        return {
            "fingerprint": base,
            "features": to_json(self._features.describe()),
            "settings": to_json(asdict(self.head.settings)),
        }
