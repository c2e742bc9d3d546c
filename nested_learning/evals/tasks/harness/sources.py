"""A model and its tokenizer from this machine, and tasks by name or file, as lm-eval takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from nested_learning._errors import unknown
from nested_learning._saved_models import load_causal_lm
from nested_learning.evals.methods.pretrained.base import RANDOM, is_downloaded, random_llama
from nested_learning.models.packaged import packaged_names
from nested_learning.training.data import byte_tokenizer
from nested_learning.training.data.download import given_file
from nested_learning.training.models import saved_folder

LAMBADA, LAMBADA_FILE = "lambada", "lambada_openai.jsonl"  # in NESTED_LEARNING_DATA


def missing_model(name: str) -> str | None:
    """How to get a model that is not on this machine; None where it is here.

    Args:
        name: "random", a trained model of the package, a folder that `save_pretrained` or `nested-learning
            train` wrote, or a name of the hub, which is looked up in the local cache alone.
    """
    if not name:
        return "no model is named: set the option `model` to a folder that save_pretrained wrote"
    if name == RANDOM:
        return None
    if name in packaged_names() or Path(name).is_dir():
        try:
            saved_folder(name)
        except ValueError as error:
            return str(error)
        return None
    if is_downloaded(name):
        return None
    return (
        f"the model {name!r} is neither a folder nor in the hub's local cache: set the option `model` to a "
        "folder that save_pretrained wrote, or download it first"
    )


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a name (see `missing_model`), in evaluation mode on the CPU.

    Args:
        name: the model.
        dtype: of its weights; "auto": as they were saved.

    Raises:
        ValueError: it is not on this machine.
    """
    problem = missing_model(name)
    if problem is not None:
        raise ValueError(problem)
    if name == RANDOM:
        return random_llama(positions=512).eval(), byte_tokenizer()
    local = name in packaged_names() or Path(name).is_dir()
    source = str(saved_folder(name)) if local else name
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    model = load_causal_lm(source, config, local_files_only=True, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(source, local_files_only=True)


def task_specs(names: Sequence[str], manager: Any) -> list[Any]:
    """Tasks as lm-eval's `TaskManager.load` takes them.

    Args:
        names: "lambada" for LAMBADA in NESTED_LEARNING_DATA, the path of a task's YAML, or the name of any
            task, group or tag that lm-eval knows.
        manager: the task manager.

    Raises:
        ValueError: no such task or file, or a damaged file.
    """
    specs: list[Any] = []
    for name in names:
        if name == LAMBADA:
            specs.append(_lambada())
        elif is_file(name):
            if not Path(name).is_file():
                raise ValueError(f"there is no task file {name!r} (seen from {os.getcwd()})")
            specs.append(name)
        elif name in manager.all_tasks:
            specs.append(name)
        else:
            raise unknown("lm-eval task", name, [LAMBADA, *manager.all_tasks])
    return specs


def is_file(name: str) -> bool:
    """Whether the name of a task is that of a YAML file."""
    return Path(name).suffix in (".yaml", ".yml")


def _lambada() -> dict[str, Any]:
    """LAMBADA, the last word given the rest, scored as lm-eval's `lambada_openai` is."""
    path = given_file(LAMBADA_FILE)
    if path is None:
        raise ValueError(f"NESTED_LEARNING_DATA has no {LAMBADA_FILE}")
    rows = _questions(path)

    def read(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {
        "task": LAMBADA,
        "custom_dataset": read,
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
        "metadata": {"version": 1.0},
    }


def _questions(path: Path) -> list[dict[str, str]]:
    """Rows with "context" and "continuation" of a JSON Lines file. ValueError for another kind of line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("context", "continuation")})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with the texts context and continuation "
                f"({type(error).__name__}: {error}); mend or remove the line"
            ) from error
    return rows
