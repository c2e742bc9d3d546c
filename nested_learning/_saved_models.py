"""Causal language models as they were saved: with all of their weights, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SHOWN = 3  # names of weights in a message


class IncompleteModelError(ValueError):
    """A saved model that is no causal language model, or not a whole one."""


def load_causal_lm(source: str | Path, config: Any, **options: Any) -> Any:
    """The causal language model of a folder or of the hub, whose weights are all its own.

    Where weights are missing or have other sizes transformers makes random ones, and reports it in the log
    alone.

    Args:
        source: folder, or name on the hub.
        config: its configuration.
        options: further arguments of `from_pretrained`.

    Raises:
        IncompleteModelError: it was saved as a model of another kind, or weights are missing or have other
            sizes.
        OSError: there is no such model.
        SafetensorError: a file of weights is damaged.
    """
    _check_causal(source, config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, report = loaded
    other = sorted(
        f"{name} ({list(here)}, expected {list(due)})" for name, here, due in report["mismatched_keys"]
    )
    if other:
        raise IncompleteModelError(
            f"weights in {source} have sizes other than its config.json says: {_some(other)}; give the "
            "folder of one model, as save_pretrained wrote it"
        )
    if missing := sorted(report["missing_keys"]):
        raise IncompleteModelError(
            f"the weights in {source} lack {_some(missing)}; give a whole model, as save_pretrained wrote it"
        )
    return model


def load_tokenizer_of(source: str | Path) -> Any:
    """The tokenizer of a folder or of the hub.

    Raises:
        ValueError: the folder has none.
        OSError: there is no such name.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (ValueError, OSError, ImportError) as problem:
        if not Path(source).is_dir():
            raise
        reason = str(problem).splitlines()[0].rstrip(" :")
        raise ValueError(
            f"no tokenizer can be loaded from {source} ({reason}); put the files there that the tokenizer's "
            "save_pretrained writes, such as tokenizer.json"
        ) from problem


def _check_causal(source: str | Path, config: Any) -> None:
    """Raise IncompleteModelError for a model that was saved with a head that reads or answers otherwise."""
    saved = [name for name in getattr(config, "architectures", None) or [] if "For" in name]
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if saved and not any(name in causal or name.endswith("ForCausalLM") for name in saved):
        raise IncompleteModelError(
            f"{source} holds a {' and '.join(saved)}, which is no causal language model: it does not predict "
            "the next token from those before; give a decoder, such as a ...ForCausalLM"
        )


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
