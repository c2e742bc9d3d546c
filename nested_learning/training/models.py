"""The model that a preset, a YAML file or a saved folder stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from transformers import AutoConfig, PreTrainedTokenizerBase

from nested_learning._errors import unknown
from nested_learning.models import PRESETS, HopeConfig, HopeForCausalLM, preset
from nested_learning.models.packaged import or_packaged, packaged_names
from nested_learning.training.config_file import load_config
from nested_learning.training.run_folder import YAML_SUFFIXES, RunFolder


def model_config(name: str, overrides: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> HopeConfig:
    """The preset `name` with fields overridden and with as many ids as the tokenizer has.

    Raises:
        ValueError: unknown preset or field, values that do not fit, or a `vocab_size` in the overrides.
    """
    if "vocab_size" in overrides:
        raise ValueError(
            f"model.vocab_size is {overrides['vocab_size']}, but the tokenizer decides it "
            f"({len(tokenizer)}). Leave it out, or choose another --tokenizer."
        )
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return preset(name, **{**tokens, **overrides})


def new_model(config: HopeConfig, seed: int) -> HopeForCausalLM:
    """An untrained model whose weights depend on the configuration and the seed alone."""
    set_seed(seed)
    return HopeForCausalLM(config)


def preset_or_yaml(name: str) -> tuple[str, dict[str, Any]]:
    """(preset, overrides) of a preset's name or of the `preset` and `model` keys of a training YAML.

    Raises:
        ValueError: neither of the two, or a YAML with unknown keys.
        OSError: the file cannot be read.
    """
    if Path(name).suffix in YAML_SUFFIXES:
        config = load_config(Path(name))
        return config.preset, config.model
    if name not in PRESETS:
        raise ValueError(f"{unknown('preset', name, PRESETS)} Or give a YAML file (.yaml).")
    return name, {}


def saved_folder(path: str | Path) -> Path:
    """The folder with the config.json: `path` itself, the `model/` of the run in `path`, or that of a trained
    model of the package.

    Raises:
        ValueError: there is none of them, or the package is damaged.
    """
    path = or_packaged(str(path))
    for folder in (Path(path), RunFolder(path).model):
        if (folder / "config.json").is_file():
            return folder
    kind = "holds no saved model (no config.json)" if Path(path).is_dir() else "is not a folder"
    raise ValueError(
        f"{str(path)!r} {kind}. Give the folder of a model written by save_pretrained, "
        "the --output folder of a completed `nested-learning train`, or a trained model of the package "
        f"({', '.join(packaged_names())})."
    )


def any_config(name: str) -> HopeConfig:
    """The configuration of a preset, a training YAML or a saved Hope model.

    Raises:
        ValueError: none of the three, or a model of another kind.
    """
    if not Path(name).is_dir():
        base, overrides = preset_or_yaml(name)
        return preset(base, **overrides)
    config = AutoConfig.from_pretrained(saved_folder(name), local_files_only=True)
    if not isinstance(config, HopeConfig):
        raise ValueError(f"{name!r} is a model of type {config.model_type!r}; expected a Hope model")
    return config
