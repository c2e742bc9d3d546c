"""`nested-learning levels`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning.cli.output import print_json, say
from nested_learning.cli.parsing import new_parser, parse

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION = """\
Show a model and its optimizer as a nested system: which memories there are, how often each is updated,
what it compresses and by which rule, and what passes between the levels. Nothing of the model's size is
allocated.

MODEL is a preset, a training YAML, a folder written by save_pretrained (of any transformers model), or the
--output folder of a completed run.

examples:
  nested-learning levels hope-340m
  nested-learning levels runs/first/model --optimizer M3 --png levels.png
  nested-learning levels transformer-tiny --optimizer none --json
"""
NO_OPTIMIZER = "none"


def run(argv: list[str]) -> int:
    """Parse, look, print. Returns the exit code."""
    parser = new_parser("levels", "MODEL ", DESCRIPTION)
    parser.add_argument("model", type=str, help="preset, training YAML, saved model or completed run")
    parser.add_argument(
        "--optimizer",
        type=str,
        default="AdamW",
        help="a class of torch.optim or nested_learning.optimizers, in any case; muon trains matrices and "
        "leaves the rest to AdamW; none: nothing is trained",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, alone on stdout")
    parser.add_argument("--mermaid", type=str, metavar="FILE", help="also write a Mermaid flowchart")
    parser.add_argument("--png", type=str, metavar="FILE", help="also write a picture")
    values = parse(parser, argv)
    from nested_learning._files import write_text
    from nested_learning.levels import levels
    from nested_learning.optimizers import build

    model = model_on_meta(values.model)
    named = values.optimizer.lower() != NO_OPTIMIZER
    system = levels(model, build(values.optimizer, model) if named else None)
    if values.mermaid is not None:
        write_text(Path(values.mermaid), system.to_mermaid())
    if values.png is not None:
        system.to_png(values.png)
    print_json(system.to_dict()) if values.json else print(system)
    for path in filter(None, (values.mermaid, values.png)):
        say(f"written: {path}")
    return 0


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
