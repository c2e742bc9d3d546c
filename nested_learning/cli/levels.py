"""`nested-learning levels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from nested_learning.cli.output import print_json, say
from nested_learning.cli.parsing import new_parser, parse

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import PreTrainedConfig, PreTrainedModel

DESCRIPTION = """\
Show a model and its optimizer as a nested system: which memories there are, how often each is updated,
what it compresses and by which rule, and what passes between the levels. Nothing of the model's size is
allocated.

MODEL is a preset, a training YAML, a folder written by save_pretrained (of any transformers model, shown as
the class that it was saved from), or the --output folder of a completed run. YAML and run are shown with
their own optimizers, others with AdamW as in `nested-learning train`. The column `part` has the handles by
which `train --optim.levels` names what it trains in a way of its own.

examples:
  nested-learning levels hope-340m
  nested-learning levels runs/first/model --optimizer M3 --png levels.png
  nested-learning levels transformer-tiny --optimizer none --json
  nested-learning levels hope-tiny --levels '[{"part": "cms.1", "name": "m3", "period": 8}]'
"""
NO_OPTIMIZER = "none"


def run(argv: list[str]) -> int:
    """Parse, look, print. Returns the exit code."""
    parser = new_parser("levels", "MODEL ", DESCRIPTION)
    parser.add_argument("model", type=str, help="preset, training YAML, saved model or completed run")
    parser.add_argument(
        "--optimizer",
        type=str,
        default=None,
        help="a class of torch.optim or nested_learning.optimizers, in any case; muon trains matrices and "
        "leaves the rest to AdamW; none: nothing is trained",
    )
    parser.add_argument(
        "--levels",
        type=list[dict[str, Any]],
        default=[],
        help="parts with an optimizer of their own, as for `train --optim.levels`",
    )
    parser.add_argument("--tokens_per_row", type=int, help="tokens of a row, for levels of period 'chunk'")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, alone on stdout")
    parser.add_argument("--mermaid", type=str, metavar="FILE", help="also write a Mermaid flowchart")
    parser.add_argument("--png", type=str, metavar="FILE", help="also write a picture")
    values = parse(parser, argv)
    from nested_learning._files import writable, write_text
    from nested_learning.levels import levels

    outputs = [path for path in (values.mermaid, values.png) if path is not None]
    if len({writable(path) for path in outputs}) < len(outputs):  # refused before anything is written
        raise ValueError(
            f"--mermaid {values.mermaid} and --png {values.png} are one file, in which one would be lost; "
            "expected two: give one of them another name"
        )
    if values.tokens_per_row is not None and not values.levels:
        raise ValueError(
            f"--tokens_per_row {values.tokens_per_row} is for levels of period 'chunk', but there are no "
            "--levels: give them, or leave it out"
        )
    model = model_on_meta(values.model)
    system = levels(model, _optimizer(values, model))
    if values.mermaid is not None:
        write_text(Path(values.mermaid), system.to_mermaid())
    if values.png is not None:
        system.to_png(values.png)
    print_json(system.to_dict()) if values.json else print(system)
    for path in outputs:
        say(f"written: {path}")
    return 0


def _optimizer(values: Namespace, model: nn.Module) -> Optimizer | None:
    """The optimizer that the flags name, else that of the run or YAML, else the default of `train`."""
    from nested_learning.optimizers import build
    from nested_learning.training.config import OptimConfig
    from nested_learning.training.optim import build_optimizer
    from nested_learning.training.run_folder import optimizers_of

    if (values.optimizer or "").lower() == NO_OPTIMIZER:
        if values.levels:
            raise ValueError(
                "got --levels with --optimizer none, which trains nothing; leave one of them out"
            )
        return None
    if values.optimizer is None and not values.levels:
        return build_optimizer(model, *optimizers_of(values.model))
    default = OptimConfig()
    return build(
        values.optimizer or default.name,
        model,
        levels=values.levels,
        tokens_per_row=values.tokens_per_row,
        adamw={"betas": default.betas, "eps": default.eps},
    )


def model_on_meta(name: str) -> nn.Module:
    """The model that a preset, a training YAML or a saved folder stands for, without memory for its weights.

    A folder's model is of the class that its configuration names. Where that is none that transformers or
    this package have, a line on stderr says which one is shown in its place. Code in a folder is not run.

    Raises:
        ValueError: none of the three, or a model that transformers does not know.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from nested_learning.training.models import any_config, saved_folder

    if not Path(name).is_dir():
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(any_config(name))
    try:
        config = AutoConfig.from_pretrained(
            saved_folder(name), local_files_only=True, trust_remote_code=False
        )
        cls, own = _saved_class(config)
        with torch.device("meta"):
            if cls is not None:
                return cls._from_config(own)
            named = config.architectures
            config.architectures = named or []  # an Auto class that has a choice of two reads it
            auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
            guessed = auto.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name!r} is a model with code of its own, and this command runs none but that of transformers; "
            "load it in Python and call nested_learning.levels.levels(model)"
        ) from error
    say(
        f"{name}: config.json names no model class of transformers for a {type(config).__name__} "
        f"(architectures: {named}); shown as {type(guessed).__name__}, a guess"
    )
    return guessed


def _saved_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel] | None, PreTrainedConfig]:
    """The class that a configuration says it was saved from, and the part of the configuration that it takes.

    None where it names none of transformers or this package, or one of another configuration.
    """
    import transformers

    from nested_learning.models.hope import register_hope

    named = config.architectures
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        return None, config
    # the file may name anything: of what these modules hold, only models are called
    for cls in (getattr(transformers, name, None), getattr(register_hope, name, None)):
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class):
            continue
        if isinstance(config, cls.config_class) or name in _auto_names(config.model_type):
            return cls, config
        if config.sub_configs.get("text_config") == cls.config_class:  # a whole model's part, saved alone
            return cls, config.get_text_config()
    return None, config


def _auto_names(model_type: str) -> set[str]:
    """Names of the classes that transformers' Auto classes make of a configuration.

    InternLM3 is a LlamaForCausalLM with a configuration of its own, which is no LlamaConfig.
    """
    from transformers.models.auto import modeling_auto

    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    found = [table[model_type] for table in tables if model_type in table]
    return {name for names in found for name in ([names] if isinstance(names, str) else names)}
