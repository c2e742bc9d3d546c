"""Tasks and methods by name: the library's own, and those that other packages add.

A package adds its own by calling `register_task` and `register_method` in a module that it names as an entry
point of the group `nested_learning.evals`; the module is imported when names are looked up. One that cannot
be imported is passed over, with a warning.
"""

from __future__ import annotations

import importlib
import re
import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from nested_learning._checks import shown
from nested_learning._errors import unknown
from nested_learning.evals.method import Method
from nested_learning.evals.task import Task

GROUP = "nested_learning.evals"
OWN = ("nested_learning.evals.methods", "nested_learning.evals.tasks")  # register the library's own
TaskT = TypeVar("TaskT", bound=type[Task[Any]])
_TASKS: dict[str, type[Task[Any]]] = {}
_METHODS: dict[str, Method] = {}


def register_task(task: TaskT) -> TaskT:
    """Let a task be found by its name; fit for use as a decorator of the class.

    Raises:
        ValueError: another task has the name, or it has none that commands and files can take.
    """
    if not re.fullmatch("[a-z0-9][a-z0-9_-]*", task.name):  # --option TASK.NAME=VALUE, TASK.png
        raise ValueError(
            f"the task {task.__name__} is named {shown(task.name)}; expected letters a to z, digits, - and _"
        )
    if _TASKS.setdefault(task.name, task) is not task:
        raise ValueError(f"a task {task.name!r} is registered already: {_TASKS[task.name]!r}")
    return task


def register_method(method: Method) -> Method:
    """Let a method be found by its name.

    Raises:
        ValueError: another method has the name.
    """
    if _METHODS.setdefault(method.name, method) != method:
        raise ValueError(f"a method {method.name!r} is registered already: {_METHODS[method.name]!r}")
    return method


def known_tasks() -> dict[str, type[Task[Any]]]:
    """Every task by name, in the order of registration."""
    _load()
    return dict(_TASKS)


def known_methods() -> dict[str, Method]:
    """Every method by name, in the order of registration."""
    _load()
    return dict(_METHODS)


def find_task(name: str) -> type[Task[Any]]:
    """The task of a name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    found = known_tasks()
    if name not in found:
        raise unknown("task", name, found)
    return found[name]


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    found = known_methods()
    if name not in found:
        raise unknown("method", name, found)
    return found[name]


@cache
def _load() -> None:
    for module in OWN:
        importlib.import_module(module)
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # the others are of use without it
            package = (
                "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
            )
            warnings.warn(
                f"the entry point {entry.name} = {entry.value} of {package} is passed over: "
                f"{type(error).__name__}: {error}. Repair or uninstall that package to have its tasks.",
                RuntimeWarning,
                stacklevel=2,
            )
