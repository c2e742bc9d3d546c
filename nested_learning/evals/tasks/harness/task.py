"""Any task of lm-eval by its own harness: a model as it is, or one that learns from what it was asked."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from accelerate.utils import set_seed

from nested_learning.continual import Level, stack_levels
from nested_learning.evals.method import Method
from nested_learning.evals.methods.pretrained.base import RANDOM
from nested_learning.evals.registry import register_method, register_task
from nested_learning.evals.rows import Figures
from nested_learning.evals.task import TUNING_SEED, Task
from nested_learning.evals.tasks.harness.sources import (
    LAMBADA,
    LAMBADA_FILE,
    is_file,
    load_model,
    missing_model,
    task_specs,
)
from nested_learning.training.data.download import given_file
from nested_learning.training.process import process_state

SEED = 1234  # lm-eval's default, by which examples in the context are drawn, and texts sampled
SHARED = ("perplexity", "word_perplexity", "bits_per_byte")  # columns that are metrics by their own name


@dataclass(frozen=True)
class ReadingMethod(Method):
    """A model in lm-eval's harness.

    Attributes:
        chunks: tokens between two writes of each level, fast to slow; none: the model stays as it is.
        rule: of the levels, as in `Level`.
    """

    kind: ClassVar[str] = "reading"
    chunks: tuple[int, ...] = ()
    rule: str = "gd"

    def levels(self) -> list[Level]:
        """The levels, all with the rate of the settings."""
        lr = float(self.settings.get("lr", 0.0))
        return [Level(chunk, lr, rule=self.rule) for chunk in self.chunks]


READERS = (
    register_method(ReadingMethod("as-it-is")),
    register_method(ReadingMethod("learning-one-level", (64,))),
    register_method(ReadingMethod("learning-two-levels", (64, 256))),
)


@dataclass(frozen=True)
class HarnessOptions:
    """Options of a run of lm-eval.

    Args:
        model: a folder that `save_pretrained` or `nested-learning train` wrote, a name of the hub that is in
            the local cache, or "random", a small Llama that knows nothing.
        tasks: "lambada" (LAMBADA in NESTED_LEARNING_DATA), paths of task files (.yaml), or names of lm-eval,
            whose data have to be in the local cache of `datasets` or within reach.
        limit: documents of each task in a run; run s has the s-th so many, in the task's order; 0: all.
        seeds: runs that are reported, each on documents of its own.
        fewshot: examples in the context; None: as the task has it.
        lrs: learning rates of levels; of several the best is chosen on the task's last documents.
        dtype: of the model's weights; "auto": as they were saved.
    """

    model: str = ""
    tasks: list[str] = field(default_factory=lambda: [LAMBADA])
    limit: int = 200
    seeds: int = 3
    fewshot: int | None = None
    lrs: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    dtype: str = "auto"


@register_task
class LmEval(Task[HarnessOptions]):
    """Tasks of lm-eval."""

    name = "lm_eval"
    title = "any task of lm-eval by its own harness, of a model as it is or learning from what it was asked"
    budgets: ClassVar[Mapping[str, Any]] = {
        "smoke": HarnessOptions(RANDOM, limit=3, seeds=1, lrs=[0.1]),
        "small": HarnessOptions(),
        "full": HarnessOptions(limit=1000, seeds=4),
    }
    columns: ClassVar[Mapping[str, str]] = {
        "accuracy": "first metric of a task that is better where higher, mean over the tasks",
        "perplexity": "perplexity, mean over the tasks that have it",
        "word_perplexity": "perplexity of words, mean over the tasks that have it",
        "bits_per_byte": "bits per byte, mean over the tasks that have it",
        "observed": "tokens that were learned from",
        "parameters": "parameters of the model",
        "seconds": "seconds of a run",
    }
    headline = "accuracy"

    def methods(self) -> Sequence[Method]:
        return READERS

    def grid(self, method: Method) -> Sequence[Mapping[str, Any]]:
        assert isinstance(method, ReadingMethod)
        if not method.chunks:
            return [{}]
        rates = self.options.lrs if self.options.limit else self.options.lrs[:1]
        return [{"lr": lr} for lr in rates]

    def missing(self) -> str | None:
        if importlib.util.find_spec("lm_eval") is None:
            return "lm-eval is not installed: pip install 'nested-learning-torch[eval]'"
        if LAMBADA in self.options.tasks and given_file(LAMBADA_FILE) is None:
            return (
                f"NESTED_LEARNING_DATA has no {LAMBADA_FILE} (JSON Lines of context and continuation); put "
                "it there, or choose other tasks"
            )
        return missing_model(self.options.model)

    def run(self, method: Method, seed: int) -> Figures:
        """Figures of a run: the columns, and every metric of a task as "TASK METRIC".

        Raises:
            ValueError: no such model or task, fewer documents than the run needs, or levels that the model
                cannot have.
        """
        assert isinstance(method, ReadingMethod)
        from lm_eval import evaluate

        from nested_learning.evals.tasks.harness.reading import ReadingLM

        start = time.perf_counter()
        model, tokenizer = load_model(self.options.model, self.options.dtype)
        model = model.to(process_state().device)
        levels = method.levels()
        learner = stack_levels(model, tokenizer, levels=levels, seed=seed) if levels else None
        with _quiet():
            tasks = self._tasks()
            reader = ReadingLM(model, tokenizer, learner)
            set_seed(SEED)
            found = evaluate(
                reader,
                {"tasks": tasks},
                samples=self._documents(tasks, seed),
                bootstrap_iters=0,
                log_samples=False,
            )
        assert found is not None
        return figures_of(found) | {
            "observed": reader.observed,
            "parameters": model.num_parameters(),
            "seconds": time.perf_counter() - start,
        }

    def note(self) -> str:
        o = self.options
        read = f"{o.limit} documents of each task in a run" if o.limit else "all documents"
        notes = [
            f"{o.model or 'No model'} on {', '.join(o.tasks)}, {read}, one at a time in the task's order."
        ]
        if o.model == RANDOM:
            notes.append("The model is a small Llama with random weights: its figures mean nothing.")
        return " ".join(notes)

    def _tasks(self) -> dict[str, Any]:
        """lm-eval's tasks by name, groups as their members."""
        from lm_eval.tasks import TaskManager

        by_name = [name for name in self.options.tasks if name != LAMBADA and not is_file(name)]
        manager = TaskManager(include_defaults=bool(by_name))  # which reads thousands of files
        tasks: dict[str, Any] = dict(manager.load(task_specs(self.options.tasks, manager))["tasks"])
        # As `simple_evaluate` does, which is not called itself: it looks over the machine for seconds.
        for task in tasks.values():
            fixed = task.get_config("num_fewshot")
            if fixed is None or (self.options.fewshot is not None and fixed != 0):
                task.set_config(key="num_fewshot", value=self.options.fewshot or 0)
            task.set_fewshot_seed(seed=SEED)
        return tasks

    def _documents(self, tasks: Mapping[str, Any], seed: int) -> dict[str, list[int]] | None:
        """Numbers of each task's documents in a run. ValueError where it has too few."""
        count = self.options.limit
        if not count:
            return None
        chosen = {}
        for name, task in tasks.items():
            total = len(task.eval_docs)
            first = total - count if seed == TUNING_SEED else seed * count
            tuned = count if len(self.options.lrs) > 1 and seed != TUNING_SEED else 0
            if first < 0 or first + count + tuned > total:
                raise ValueError(
                    f"{name} has {total} documents; run {seed} of {count} each"
                    f"{', the last ones kept for tuning,' if tuned else ''} needs {first + count + tuned}: "
                    "set limit or seeds to less"
                )
            chosen[name] = list(range(first, first + count))
        return chosen


@contextmanager
def _quiet() -> Any:
    """lm-eval says warnings alone, and fewer of them."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def figures_of(results: Mapping[str, Any]) -> Figures:
    """Figures of what lm-eval's `simple_evaluate` returns: every metric as "TASK METRIC", and the columns.

    A metric behind a filter other than "none" is named METRIC,FILTER as in lm-eval.
    """
    figures: Figures = {}
    first: list[float] = []
    shared: dict[str, list[float]] = {name: [] for name in SHARED}
    leaves = results["n-samples"]  # groups are means of these
    for task, found in results["results"].items():
        better_high = results["higher_is_better"].get(task, {})
        values = {
            key.removesuffix(",none"): value
            for key, value in found.items()
            if "_stderr" not in key and isinstance(value, int | float) and "," in key
        }
        figures |= {f"{task} {name}": value for name, value in values.items()}
        if task not in leaves:
            continue
        high = [value for name, value in values.items() if better_high.get(name.partition(",")[0])]
        first += high[:1]
        for name in SHARED:
            shared[name] += [values[name]] if name in values else []
    means = {"accuracy": first, **shared}
    return figures | {name: fmean(values) for name, values in means.items() if values}
