"""Tasks of lm-eval by its own harness: a model as it is, or one that learns on the way."""

from nested_learning.evals.tasks.harness.task import HarnessOptions, LmEval, ReadingMethod

__all__ = ["HarnessOptions", "LmEval", "ReadingMethod"]
