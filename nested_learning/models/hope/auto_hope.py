"""How transformers finds Hope: the code beside saved weights, and the lists of names that it goes by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nested_learning._files import write_text

_CODE = "nested_learning_hope"
# Auto class → class, as config.json has it: for `trust_remote_code=True`, and for tools that look there.
AUTO_MAP = {
    "AutoConfig": f"{_CODE}.HopeConfig",
    "AutoModel": f"{_CODE}.HopeModel",
    "AutoModelForCausalLM": f"{_CODE}.HopeForCausalLM",
    "AutoModelForQuestionAnswering": f"{_CODE}.HopeForQuestionAnswering",
    "AutoModelForSequenceClassification": f"{_CODE}.HopeForSequenceClassification",
    "AutoModelForTokenClassification": f"{_CODE}.HopeForTokenClassification",
}


def auto_map(given: Any = None) -> dict[str, Any]:
    """`AUTO_MAP`, with entries of a configuration of one's own in the place of Hope's.

    Raises:
        ValueError: `given` is neither None nor a dictionary.
    """
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"auto_map must be a dictionary from auto class to 'module.Class', got {given!r}")
    return {**AUTO_MAP, **(given or {})}


def write_code(folder: str | os.PathLike[str]) -> None:
    """Write the module that `AUTO_MAP` names into a folder, which is made if it is not there."""
    source = Path(__file__).with_name(f"{_CODE}.py")
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder) / source.name, source.read_text(encoding="utf-8"))


def list_as_causal_lm(model: Any) -> None:
    """Enter a class into transformers' list of causal language models, which holds names of classes.

    Trainer shifts the labels for label smoothing only for what stands there (anything else it would train to
    copy the input); pipelines, model cards and lm-eval look there too. Subclasses, such as those that FSDP2
    makes, have names of their own; they are entered under keys that no model of transformers has.
    """
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model.__name__ not in names.values():
        key = model.config_class.model_type
        names[f"{key}:{model.__name__}" if key in names else key] = model.__name__
