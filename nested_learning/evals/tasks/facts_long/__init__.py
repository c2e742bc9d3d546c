"""Tasks `facts-8k`, `facts-32k`, `facts-64k`: facts told early in a text that no context holds."""

from nested_learning.evals.tasks.facts_long.task import LongFactsOptions, LongFactsTask

__all__ = ["LongFactsOptions", "LongFactsTask"]
