"""Accuracy over stages, and what it says about forgetting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from nested_learning.evals.methods.pretrained import Student
from nested_learning.evals.rows import Figures
from nested_learning.evals.tasks.streams.data import Example, Stage
from nested_learning.evals.tasks.streams.wording import Wording

AccuracyMatrix = Sequence[Sequence[float]]  # row i: accuracy on the tasks 0 … i after task i


def forgetting(matrix: AccuracyMatrix) -> float | None:
    """Mean over all tasks but the last of the best accuracy before the end minus that at the end."""
    tasks = range(len(matrix) - 1)
    losses = [max(matrix[i][j] for i in range(j, len(matrix) - 1)) - matrix[-1][j] for j in tasks]
    return sum(losses) / len(losses) if losses else None


def backward_transfer(matrix: AccuracyMatrix) -> float | None:
    """Mean over all tasks but the last of the accuracy at the end minus that right after the task."""
    gains = [matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1)]
    return sum(gains) / len(gains) if gains else None


def learn_in_turn(student: Student, wording: Wording, stages: Sequence[Stage]) -> Figures:
    """Learn the stages, and ask after each about all labels seen so far.

    Returns:
        seconds: learning alone.
        matrix: accuracies after each stage, on the queries that are asked every time.
        accuracy: at the end, on all queries, over all labels.
        accuracy by task: as `accuracy`, for each stage.
        confusion: row i: shares of stage i's queries that were given a label of stage 0, 1, … at the end.
        right task: share of queries that were given a label of their own stage.
        last task: share of queries that were given a label of the last stage.
        forgetting, backward transfer: of `matrix`. These and the two before are None for a single stage.
    """
    matrix: list[list[float]] = []
    seconds = 0.0
    for index, stage in enumerate(stages):
        start = time.perf_counter()
        student.learn(wording.reading(stage))
        seconds += time.perf_counter() - start
        seen = stages[: index + 1]
        if len(seen) < len(stages):
            right = _right(answers(student, wording, seen, lambda stage: stage.asked_between))
            matrix.append([sum(each) / len(each) for each in right])
    given = answers(student, wording, stages, lambda stage: stage.queries)
    right = _right(given)
    asked = [each[: stage.between] for each, stage in zip(right, stages, strict=True)]
    matrix.append([sum(each) / len(each) for each in asked])
    every = [answer for each in right for answer in each]
    confusion = [[_share(row, stage) for stage in stages] for row in given]
    several = len(stages) > 1
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


def final_accuracy(student: Student, wording: Wording, stages: Sequence[Stage]) -> float:
    """Learn the stages, and ask all queries at the end, among all labels."""
    for stage in stages:
        student.learn(wording.reading(stage))
    right = _right(answers(student, wording, stages, lambda stage: stage.queries))
    every = [answer for each in right for answer in each]
    return sum(every) / len(every)


Answers = list[list[tuple[Example, str]]]  # by stage: queries and the labels that they were given


def answers(
    student: Student,
    wording: Wording,
    stages: Sequence[Stage],
    queries: Callable[[Stage], Sequence[Example]],
) -> Answers:
    """The queries of each stage, labelled among the labels of all these stages."""
    labels: Mapping[str, Sequence[int]] = {
        label: wording.label(label) for stage in stages for label in stage.labels
    }
    asked = [queries(stage) for stage in stages]
    prompts = [wording.prompt(query.text) for each in asked for query in each]
    found = iter(student.choose(prompts, dict(labels)))
    return [[(query, next(found)) for query in each] for each in asked]


def _right(answers: Answers) -> list[list[bool]]:
    return [[label == query.label for query, label in each] for each in answers]


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def _share(answers: Sequence[tuple[Example, str]], stage: Stage) -> float:
    """Share of the answers that are labels of a stage."""
    return sum(label in stage.labels for _, label in answers) / len(answers)
