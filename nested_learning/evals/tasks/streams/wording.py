"""Examples with labels as ids: "utterance: TEXT⏎intent: LABEL⏎". The line break ends every label alike."""

from __future__ import annotations

from nested_learning.evals.methods.pretrained import Base, Passage, Reading
from nested_learning.evals.tasks.streams.data import Example, Stage


class Wording:
    """Examples as ids.

    Args:
        base: whose tokenizer encodes them.
    """

    def __init__(self, base: Base) -> None:
        self.ids = base.ids
        self.line_break = tuple(self.ids("\n"))

    def prompt(self, text: str) -> list[int]:
        """Ids before the label."""
        return self.ids(f"utterance: {text}\nintent:")

    def label(self, label: str) -> list[int]:
        """Ids of a label behind a prompt."""
        return self.ids(f" {label}\n")

    def example(self, example: Example) -> Passage:
        """Ids of an example, of which the label is to be learned."""
        prompt, label = self.prompt(example.text), self.label(example.label)
        return Passage((*prompt, *label), (len(prompt), len(prompt) + len(label)), example.label)

    def reading(self, stage: Stage) -> Reading:
        """The training examples of a stage."""
        return Reading(tuple(map(self.example, stage.train)), self.line_break)
