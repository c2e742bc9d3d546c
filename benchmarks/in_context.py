"""What learning in context costs: `python -m benchmarks.in_context [cms|continual|all]`.

- `cms`: a Hope model whose CMS learns in context by each of its rules, relative to a static one: a training
  step and reading.
- `continual`: `observe` of a Llama with three levels on all MLPs, relative to a forward and a
  backward pass of the same model over the same tokens, for several windows, in float32 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import interleaved, parser, record, show
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.continual import Level, stack_levels

CMS = {"batch": 4, "tokens": 512, "width": 128, "heads": 4, "layers": 4, "fast": 64, "slow": 256}
QUICK_CMS = {"batch": 1, "tokens": 32, "width": 16, "heads": 2, "layers": 1, "fast": 8, "slow": 16}
RULES: dict[str, dict[str, Any]] = {
    "none": {"cms_update": "none"},
    "regression": {"cms_update": "regression"},
    "lm, first order": {"cms_update": "lm", "cms_meta_gradient": "first_order"},
    "lm, exact": {"cms_update": "lm", "cms_meta_gradient": "exact"},
}
LLAMA = {"width": 576, "mlp": 1536, "layers": 5, "heads": 9, "ids": 8192, "chunk": 512}
QUICK_LLAMA = {"width": 32, "mlp": 64, "layers": 1, "heads": 2, "ids": 64, "chunk": 16}


def cms(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Time of a training step and of reading, for each rule, relative to a static CMS."""
    ids = torch.randint(256, (shape["batch"], shape["tokens"]))

    def build(options: dict[str, Any]) -> HopeForCausalLM:
        torch.manual_seed(0)
        config = HopeConfig(
            vocab_size=256,
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_heads=shape["heads"],
            mixer="titans",
            mixer_options={"titans": {"chunk_size": shape["fast"]}},
            cms_levels=[{"chunk_size": shape["fast"]}, {"chunk_size": shape["slow"]}],
            **options,
        )
        return HopeForCausalLM(config)

    def train(model: HopeForCausalLM) -> None:
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    @torch.no_grad()
    def read(model: HopeForCausalLM) -> None:
        model.eval()
        model(input_ids=ids)

    models = {name: build(options) for name, options in RULES.items()}
    works = {"training step": train, "reading": read}
    seconds = {
        what: interleaved({n: lambda m=m, work=work: work(m) for n, m in models.items()}, repeats)
        for what, work in works.items()
    }
    rows = [
        {
            "cms_update": name,
            **{f"{what}, s": seconds[what][name] for what in works},
            **{f"{what}, of none": seconds[what][name] / seconds[what]["none"] for what in works},
        }
        for name in RULES
    ]
    show(f"a CMS that learns in context, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def continual(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Rate of `observe` relative to a plain forward and backward pass, all gradients, no optimizer."""
    rows = []
    chunk = shape["chunk"]
    for dtype in (torch.float32, torch.bfloat16):
        for window in (chunk + 1, 2 * chunk, 4 * chunk):
            plain, observe = _reader(shape, dtype, window)
            # as many chunks as fill the largest window, so that the median is that of windows in use
            seconds = interleaved({"plain": plain, "observe": observe}, repeats, warmup=2)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "window": window,
                    "plain, tokens/s": chunk / seconds["plain"],
                    "observe, tokens/s": chunk / seconds["observe"],
                    "of plain": seconds["plain"] / seconds["observe"],
                }
            )
    show(f"observing with three levels, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def _reader(
    shape: dict[str, int], dtype: torch.dtype, window: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["ids"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=8 * shape["chunk"],
    )
    model = LlamaForCausalLM(config).to(dtype)
    chunk = shape["chunk"]
    levels = [Level(chunk_size=factor * chunk, lr=0.01) for factor in (1, 4, 16)]
    learner = stack_levels(LlamaForCausalLM(config).to(dtype), None, levels=levels, window=window)
    ids = torch.randint(shape["ids"], (1, chunk))

    def plain() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, list(model.parameters()))

    def observe() -> None:
        learner.observe(ids)

    return plain, observe


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("question", choices=["cms", "continual", "all"], nargs="?", default="all")
    given = options.parse_args(arguments)
    repeats = given.repeats or (1 if given.quick else 7)
    figures: dict[str, Any] = {}
    if given.question in ("cms", "all"):
        figures["cms"] = cms(QUICK_CMS if given.quick else CMS, repeats)
    if given.question in ("continual", "all"):
        figures["continual"] = continual(QUICK_LLAMA if given.quick else LLAMA, repeats)
    return record(figures, given.json)


if __name__ == "__main__":
    main()
