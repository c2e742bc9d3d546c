"""Tasks on text: language modelling, and what each part of Hope is worth in it."""

from nested_learning.evals.tasks.language.ablations import Ablations
from nested_learning.evals.tasks.language.task import LanguageModelling, LanguageOptions

__all__ = ["Ablations", "LanguageModelling", "LanguageOptions"]
