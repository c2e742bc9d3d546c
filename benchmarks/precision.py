"""bfloat16 autocast against float32: `python -m benchmarks.precision [speed|loss|all]`.

- `speed`: tokens per second of a training step of one Hope block of width 512 with embedding and head.
- `loss`: validation loss of the same model after 200 steps in either precision, from the same weights on the
  same batches, and their ratio; validated in the precision that it was trained in.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from benchmarks.harness import interleaved, parser, record, show
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.training.compare import Contender, batches
from nested_learning.training.config import OptimConfig
from nested_learning.training.data import DataConfig, build_data

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Size:
    width: int = 512
    heads: int = 8
    chunk: int = 64
    batch: int = 8  # sequences in a timed step
    tokens: int = 512
    steps: int = 200  # optimizer steps of the training
    train_batch: int = 2
    train_tokens: int = 256
    validation_batches: int = 40


QUICK = Size(
    width=32,
    heads=2,
    chunk=8,
    batch=1,
    tokens=16,
    steps=2,
    train_batch=2,
    train_tokens=16,
    validation_batches=1,
)


def new_model(size: Size, bf16: bool, seed: int, ids: int = 256) -> HopeForCausalLM:
    """One Hope block with embedding (`ids` rows) and head; its forward pass is under autocast if `bf16`."""
    torch.manual_seed(seed)
    config = HopeConfig(
        vocab_size=ids,
        hidden_size=size.width,
        num_hidden_layers=1,
        num_heads=size.heads,
        mixer_options={"self_modifying_titans": {"chunk_size": size.chunk}},
    )
    model = HopeForCausalLM(config).train()
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(model.forward)  # type: ignore[method-assign]
    return model


def speed(size: Size, repeats: int) -> dict[str, Any]:
    """Tokens per second of a training step."""
    models = {"float32": new_model(size, False, 0), "bf16 autocast": new_model(size, True, 0)}
    ids = torch.randint(256, (size.batch, size.tokens))

    def step(model: HopeForCausalLM) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    seconds = interleaved({name: lambda m=model: step(m) for name, model in models.items()}, repeats)
    rows = [
        {
            "precision": name,
            "forward + backward, tokens/s": ids.numel() / value,
            "of float32": seconds["float32"] / value,
        }
        for name, value in seconds.items()
    ]
    show(f"precision, {size}", rows)
    return {"repeats": repeats, "rows": rows}


def loss(size: Size, source: str, seeds: list[int], lr: float) -> dict[str, Any]:
    """Validation loss after training."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        losses = _train(size, source, seed, lr)
        rows.append({"seed": str(seed), **losses, "of float32": losses["bf16"] / losses["float32"]})
    mean = {name: fmean(row[name] for row in rows) for name in ("float32", "bf16")}
    rows.append({"seed": "mean", **mean, "of float32": mean["bf16"] / mean["float32"]})
    show(f"validation loss, nats per byte, {source}, lr {lr}, {size}", rows)
    return {"source": source, "lr": lr, "rows": rows}


def _train(size: Size, source: str, seed: int, lr: float) -> dict[str, float]:
    blocks = size.validation_batches * size.train_batch
    data = DataConfig(source=source, block_size=size.train_tokens, seed=seed, max_validation_blocks=blocks)
    bundle = build_data(data, size.steps * size.train_batch)
    optim, ids = OptimConfig(lr=lr, schedule="linear"), len(bundle.tokenizer)
    contenders = [
        Contender(name, new_model(size, name == "bf16", seed, ids), optim, size.steps)
        for name in ("float32", "bf16")
    ]
    for batch in batches(bundle.train, size.train_batch, CPU):
        for contender in contenders:
            contender.step(batch)
    validation = list(batches(bundle.validation, size.train_batch, CPU))
    found = {contender.name: contender.validate(validation) for contender in contenders}
    diverged = [name for name, value in found.items() if value is None]
    if diverged:
        raise ValueError(f"training in {', '.join(diverged)} diverged at seed {seed}; lower --lr from {lr}")
    return {name: value for name, value in found.items() if value is not None}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("question", choices=["speed", "loss", "all"], nargs="?", default="all")
    options.add_argument("--data", default="stdlib", help="text for `loss`: a file, or a source")
    options.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of `loss`")
    options.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of `loss`; default: 0 1 2"
    )
    given = options.parse_args(arguments)
    size = QUICK if given.quick else Size()
    figures: dict[str, Any] = {"size": vars(size)}
    if given.question in ("speed", "all"):
        figures["speed"] = speed(size, given.repeats or (1 if given.quick else 10))
    if given.question in ("loss", "all"):
        figures["loss"] = loss(size, given.data, given.seeds[:1] if given.quick else given.seeds, given.lr)
    return record(figures, given.json)


if __name__ == "__main__":
    main()
