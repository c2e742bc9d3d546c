"""The paper's questions as tasks, what answers them as methods, and claims decided by computed verdicts."""

from nested_learning.evals.claims import Ahead, Claim, Keeps, Reaches, Verdict
from nested_learning.evals.method import Method
from nested_learning.evals.registry import (
    find_method,
    find_task,
    known_methods,
    known_tasks,
    register_method,
    register_task,
)
from nested_learning.evals.rows import Figures, MethodRow, MethodRows
from nested_learning.evals.task import BUDGETS, TUNING_SEED, Task

__all__ = [
    "BUDGETS",
    "TUNING_SEED",
    "Ahead",
    "Claim",
    "Figures",
    "Keeps",
    "Method",
    "MethodRow",
    "MethodRows",
    "Reaches",
    "Task",
    "Verdict",
    "find_method",
    "find_task",
    "known_methods",
    "known_tasks",
    "register_method",
    "register_task",
]
