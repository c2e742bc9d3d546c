"""Task `languages`: two new languages in sequence."""

from nested_learning.evals.tasks.languages.task import LanguagesOptions, LanguagesTask

__all__ = ["LanguagesOptions", "LanguagesTask"]
