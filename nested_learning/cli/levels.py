"""`nested-learning levels`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nested_learning._errors import unknown
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

    model = model_on_meta(values.model)
    system = levels(model, build_optimizer(values.optimizer, model))
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


def optimizers_by_name() -> dict[str, Callable[..., Optimizer]]:
    """Classes of torch.optim and of this package by their names in lower case."""
    import torch

    from nested_learning import optimizers

    found = [*vars(torch.optim).values(), *vars(optimizers).values()]
    classes = [cls for cls in found if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)]
    return {cls.__name__.lower(): cls for cls in classes if cls is not torch.optim.Optimizer}


def build_optimizer(name: str, model: nn.Module) -> Optimizer | list[Optimizer] | None:
    """The optimizer called `name` with its defaults, over the model's parameters.

    AdamW has the parameter groups of `nested-learning train`; for optimizers whose rule is for matrices the
    embeddings and the head are AdamW's, as are all parameters that are no matrices.

    Raises:
        ValueError: no such optimizer, or one that needs more than parameters.
    """
    import torch

    from nested_learning.optimizers import DeltaGD
    from nested_learning.training.config import OptimConfig
    from nested_learning.training.optim import build_optimizer as adamw

    known = optimizers_by_name()
    lower = name.lower()
    if lower == NO_OPTIMIZER:
        return None
    if lower not in known:
        raise unknown("optimizer", lower, [*known, NO_OPTIMIZER])
    cls = known[lower]
    parameters_of_class = inspect.signature(cls).parameters
    needed = [p.name for p in parameters_of_class.values() if p.default is p.empty and p.name != "params"]
    if needed:
        raise ValueError(
            f"{name} needs {', '.join(needed)} besides parameters, which a command line cannot give. "
            "In Python: nested_learning.levels.levels(model, optimizer)"
        )
    if cls is torch.optim.AdamW:
        return adamw(model, OptimConfig())
    matrices, rest = _matrices_and_rest(model)
    if cls is torch.optim.Muon:
        return [cls(matrices), torch.optim.AdamW(rest)] if rest else cls(matrices)
    if "adamw_only" in parameters_of_class:
        groups = [({"params": matrices}, matrices), ({"params": rest, "adamw_only": True}, rest)]
        return cls([group for group, members in groups if members])
    optimizer = cls(model.parameters())
    return optimizer.attach(model) if isinstance(optimizer, DeltaGD) else optimizer


def _matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices that are weights of maps between hidden vectors, and all other parameters."""
    from torch import nn

    get_head = getattr(model, "get_output_embeddings", None)
    ends: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if callable(get_head) and isinstance(head := get_head(), nn.Module):
        ends.append(head)
    outer = {id(p) for module in ends for p in module.parameters()}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in model.parameters():
        (matrices if p.ndim == 2 and id(p) not in outer else rest).append(p)
    return matrices, rest
