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

DESCRIPTION = """\
Show a model and its optimizer as a nested system: which memories there are, how often each is updated,
what it compresses and by which rule, and what passes between the levels. Nothing of the model's size is
allocated.

MODEL is a preset, a training YAML, a folder written by save_pretrained (of any transformers model), or the
--output folder of a completed run. YAML and run are shown with their own optimizers, others with AdamW as in
`nested-learning train`. The column `part` has the handles by which `train --optim.levels` names what it
trains in a way of its own.

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

    for path in filter(None, (values.mermaid, values.png)):
        writable(path)  # refused before anything is written
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
    for path in filter(None, (values.mermaid, values.png)):
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

    Raises:
        ValueError: none of the three, or a model that transformers does not know.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from nested_learning.training.models import any_config, saved_folder

    if Path(name).is_dir():
        config = AutoConfig.from_pretrained(saved_folder(name), local_files_only=True)
    else:
        config = any_config(name)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    with torch.device("meta"):
        return auto.from_config(config)
