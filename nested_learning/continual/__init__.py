"""Pretrained models turned into continual learners: levels of deltas that learn at several speeds."""

from nested_learning.continual.auto import AUTO
from nested_learning.continual.budget import Budget
from nested_learning.continual.exporting.export import Exported
from nested_learning.continual.labels.classifier import Classifier
from nested_learning.continual.learner import Learner
from nested_learning.continual.level import Level
from nested_learning.continual.memory import Memory, Snapshot
from nested_learning.continual.objectives.fisher import Fisher
from nested_learning.continual.reopen import reopen
from nested_learning.continual.replaying.settings import Replay
from nested_learning.continual.stack import stack_levels
from nested_learning.continual.starts.learn import learn_starts
from nested_learning.continual.starts.starts import Starts
from nested_learning.continual.writing import Write

__all__ = [
    "AUTO",
    "Budget",
    "Classifier",
    "Exported",
    "Fisher",
    "Learner",
    "Level",
    "Memory",
    "Replay",
    "Snapshot",
    "Starts",
    "Write",
    "learn_starts",
    "reopen",
    "stack_levels",
]
