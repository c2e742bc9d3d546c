"""Task `facts`: made-up facts read in a long text, asked in a new window."""

from nested_learning.evals.tasks.facts.task import FactsOptions, FactsTask

__all__ = ["FactsOptions", "FactsTask"]
