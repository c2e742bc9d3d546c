"""Accuracy over tasks, and what it says about forgetting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.pretrained.clinc_data import Example, Task
from benchmarks.pretrained.clinc_methods import Method

Matrix = Sequence[Sequence[float]]  # row i: accuracy on the tasks 0 … i after task i


def forgetting(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of the best accuracy before the end minus that at the end."""
    tasks = range(len(matrix) - 1)
    losses = [max(matrix[i][j] for i in range(j, len(matrix) - 1)) - matrix[-1][j] for j in tasks]
    return sum(losses) / len(losses) if losses else None


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over all tasks but the last of the accuracy at the end minus that right after the task."""
    gains = [matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1)]
    return sum(gains) / len(gains) if gains else None


def learn_in_turn(method: Method, tasks: Sequence[Task]) -> dict[str, Any]:
    """Learn the tasks, and ask after each about all labels seen so far.

    Returns:
        seconds: learning alone.
        matrix: accuracies after each task, on the queries that are asked every time.
        accuracy: at the end, on all queries, over all labels.
        accuracy by task: as `accuracy`, for each task.
        confusion: row i: shares of task i's queries that were given a label of task 0, 1, … at the end.
        right task: share of queries that were given a label of their own task.
        last task: share of queries that were given a label of the last task.
        forgetting, backward transfer: of `matrix`. These and the two before are None for a single task.
    """
    matrix: list[list[float]] = []
    seconds = 0.0
    for index, task in enumerate(tasks):
        start = time.perf_counter()
        method.learn(task)
        seconds += time.perf_counter() - start
        seen = tasks[: index + 1]
        if len(seen) < len(tasks):
            right = _right(_answers(method, seen, lambda task: task.asked_between))
            matrix.append([sum(each) / len(each) for each in right])
    answers = _answers(method, tasks, lambda task: task.queries)
    right = _right(answers)
    asked = [each[: task.between] for each, task in zip(right, tasks, strict=True)]
    matrix.append([sum(each) / len(each) for each in asked])
    every = [answer for each in right for answer in each]
    confusion = [[_share(row, task) for task in tasks] for row in answers]
    several = len(tasks) > 1
    return {
        "seconds": round(seconds, 1),
        "matrix": matrix,
        "accuracy": sum(every) / len(every),
        "accuracy by task": [sum(each) / len(each) for each in right],
        "confusion": confusion,
        "right task": _mean(row[index] for index, row in enumerate(confusion)) if several else None,
        "last task": _mean(row[-1] for row in confusion) if several else None,
        "forgetting": forgetting(matrix),
        "backward transfer": backward_transfer(matrix),
    }


def final_accuracy(method: Method, tasks: Sequence[Task]) -> float:
    """Learn the tasks, and ask all queries at the end, among all labels."""
    for task in tasks:
        method.learn(task)
    right = _right(_answers(method, tasks, lambda task: task.queries))
    every = [answer for each in right for answer in each]
    return sum(every) / len(every)


Answers = list[list[tuple[Example, str]]]  # by task: queries and the labels that they were given


def _answers(method: Method, tasks: Sequence[Task], queries: Callable[[Task], Sequence[Example]]) -> Answers:
    """The queries of each task, labelled among the labels of all these tasks."""
    labels = [label for task in tasks for label in task.labels]
    asked = [queries(task) for task in tasks]
    found = iter(method.predict([query.text for each in asked for query in each], labels))
    return [[(query, next(found)) for query in each] for each in asked]


def _right(answers: Answers) -> list[list[bool]]:
    return [[label == query.label for query, label in each] for each in answers]


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def _share(answers: Sequence[tuple[Example, str]], task: Task) -> float:
    """Share of the answers that are labels of a task."""
    return sum(label in task.labels for _, label in answers) / len(answers)
