"""Task `month`: thirty short conversations with each of two users, who share a base model."""

from nested_learning.evals.tasks.month.task import MonthOptions, MonthTask

__all__ = ["MonthOptions", "MonthTask"]
