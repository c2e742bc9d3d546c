"""What tests/compat/write.py and the tests must build alike, from public names alone.

`write.py` runs it with the package of an old commit, the tests with the present one: it names nothing that
only one of them has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nested_learning import optimizers as no
from nested_learning.continual import Learner, Level, stack_levels
from nested_learning.training.config import OptimConfig, TrainConfig
from nested_learning.training.data import DataConfig

FILES = Path(__file__).parent / "files"
SESSIONS = ("regression", "nested", "lm", "mixers")
TEXT = "tests/compat/files/text.txt"  # relative: the configuration of the run holds it

LEVELS = {
    "full": [
        Level(chunk_size=4, lr=0.3, rule="sgd"),
        Level(chunk_size=8, lr=0.1, rule="adam", gate_quantile=0.3),
        Level(chunk_size=16, lr=0.0, consolidate=0.2, decay=0.01),
    ],
    "rank": [
        Level(chunk_size=4, lr=0.3, rule="momentum", rank=2),
        Level(chunk_size=8, lr=0.1, rule="m3", layers=[0]),
    ],
    "form": [Level(chunk_size=4, lr=0.3, rule=no.MomentumMemory(0.8), clip=None, gate=0.1)],
}


def learner(levels: str) -> Learner:
    """A learner on a Llama whose weights are drawn name by name, not by transformers' initialisation."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return stack_levels(model, levels=LEVELS[levels], window=24, overlap=5)


def training_run(output: str | Path) -> TrainConfig:
    """The smallest run of which a checkpoint in the middle says something: 4 steps of 2 × 16 bytes."""
    return TrainConfig(
        preset="titans-tiny",
        model={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "cms_levels": [{"chunk_size": 8}],
            "cms_expansion": 2.0,
        },
        data=DataConfig(source=TEXT, block_size=16, max_validation_blocks=4),
        optim=OptimConfig(lr=1e-2),
        output=str(output),
        steps=4,
        batch_size=2,
        save_every=2,
        sample_tokens=0,
    )


# Optimizers -------------------------------------------------------------------------------------------------


def _multi_frequency(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return no.MultiFrequency(params, lambda groups: no.MemoryOptimizer(groups, no.AdamMemory(), lr=0.05))


def _delta_gd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """By hand-set gradients, without inputs: the rule of the other parameters."""
    optimizer = no.DeltaGD(params, lr=0.02, inner="momentum")
    layer = nn.Linear(1, 1)
    layer.weight = next(p for p in params if p.ndim > 1)
    return optimizer.attach(layer)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "gd": lambda p: no.MemoryOptimizer(p, no.GDMemory(), lr=0.05),
    "momentum": lambda p: no.MemoryOptimizer(p, no.MomentumMemory(), lr=0.02),
    "adam": lambda p: no.MemoryOptimizer(p, no.AdamMemory(), lr=0.05),
    "adagrad": lambda p: no.MemoryOptimizer(p, no.AdaGradMemory(), lr=0.5),
    "preconditioned": lambda p: no.PreconditionedMomentum(p, lr=0.02),
    "preconditioned-learned": lambda p: no.PreconditionedMomentum(p, lr=0.02, preconditioner="learned"),
    "delta": lambda p: no.DeltaMomentum(p, lr=0.1),
    "feature": lambda p: no.FeatureMomentum(p, lr=0.01),
    "orthogonal": lambda p: no.OrthogonalMomentum(p, lr=0.05),
    "m3": lambda p: no.M3(p, lr=0.1, frequency=3),
    "dmgd": lambda p: no.DeepMomentumGD(p, lr=0.05, rank=2, hidden_size=4),
    "dmgd-l2": lambda p: no.DeepMomentumGD(p, lr=0.05, objective="l2", shared_memory=False, hidden_size=4),
    "delta-gd": _delta_gd,
    "multi-frequency": _multi_frequency,
}


def parameters() -> list[nn.Parameter]:
    """A matrix and a bias, float32."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients of a quadratic and noise that depends on the number of the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for i, p in enumerate(params):
            p.grad = p.detach() - 0.1 * i + 0.3 * torch.randn(p.shape, generator=generator)
        optimizer.step()


# Trees of tensors as safetensors and JSON -------------------------------------------------------------------


def save_tree(tree: Any, path: Path) -> None:
    """Nested dicts, lists and tuples: tensors as safetensors, all else as JSON in the file's metadata."""
    tensors: dict[str, Tensor] = {}

    def plain(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().contiguous().clone()
            return {"tensor": name}
        if isinstance(node, Mapping):
            return {"items": [[key, plain(value)] for key, value in node.items()]}  # keys may be numbers
        if isinstance(node, tuple):
            return {"tuple": [plain(value) for value in node]}
        return [plain(value) for value in node] if isinstance(node, list) else node

    text = json.dumps(plain(tree), allow_nan=False)
    save_file(tensors, path, {"tree": text})


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = file.metadata()["tree"]

    def rich(node: Any) -> Any:
        if isinstance(node, list):
            return [rich(value) for value in node]
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return tensors[node["tensor"]]
        if "tuple" in node:
            return tuple(rich(value) for value in node["tuple"])
        return {key: rich(value) for key, value in node["items"]}

    return rich(json.loads(text))
