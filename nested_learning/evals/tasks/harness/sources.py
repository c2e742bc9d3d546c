"""A model and its tokenizer from this machine, and tasks by name or file, as lm-eval takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nested_learning._errors import unknown
from nested_learning.training.data import byte_tokenizer
from nested_learning.training.models import saved_folder

RANDOM = "random"  # a small Llama that knows nothing, for trials of the task
LAMBADA, LAMBADA_FILE = "lambada", "lambada_openai.jsonl"  # in NESTED_LEARNING_DATA


def missing_model(name: str) -> str | None:
    """How to get a model that is not on this machine; None where it is here.

    Args:
        name: "random", a folder that `save_pretrained` or `nested-learning train` wrote, or a name of the
            hub, which is looked up in the local cache alone.
    """
    if not name:
        return "no model is named: set the option `model` to a folder that save_pretrained wrote"
    if name == RANDOM:
        return None
    if Path(name).is_dir():
        try:
            saved_folder(name)
        except ValueError as error:
            return str(error)
        return None
    if name.count("/") == 1 and isinstance(try_to_load_from_cache(name, "config.json"), str):
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
        return _random_llama(), byte_tokenizer()
    source = str(saved_folder(name)) if Path(name).is_dir() else name
    model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(source, local_files_only=True)


def _random_llama() -> Any:
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def lambada_file() -> Path | None:
    """LAMBADA as JSON Lines in NESTED_LEARNING_DATA, or None where it is not there."""
    folder = os.environ.get("NESTED_LEARNING_DATA")
    path = Path(folder) / LAMBADA_FILE if folder else None
    return path if path is not None and path.is_file() else None


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
    path = lambada_file()
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
