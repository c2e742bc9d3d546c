"""Pretrained models that learn from what they read: the model, ways of learning, ways of asking."""

from nested_learning.evals.methods.pretrained.base import Base, lacking, load_base, new_base
from nested_learning.evals.methods.pretrained.method import PRETRAINED, PretrainedMethod, Teaching
from nested_learning.evals.methods.pretrained.reading import Passage, Reading, merged_reading
from nested_learning.evals.methods.pretrained.students import Student

__all__ = [
    "PRETRAINED",
    "Base",
    "Passage",
    "PretrainedMethod",
    "Reading",
    "Student",
    "Teaching",
    "lacking",
    "load_base",
    "merged_reading",
    "new_base",
]
