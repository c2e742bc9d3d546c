"""Tasks `clinc150` and `classes`: labels are learned in stages."""

from nested_learning.evals.tasks.streams.tasks import ClassesTask, ClincTask

__all__ = ["ClassesTask", "ClincTask"]
