"""Task `longdoc`: bits per byte by position on long documents that the model cannot have read."""

from nested_learning.evals.tasks.longdoc.task import LongdocOptions, LongdocTask

__all__ = ["LongdocOptions", "LongdocTask"]
