"""The cost of learning in context: `python -m benchmarks.in_context [cms|continual|all]`.

- `cms`: a Hope model whose CMS learns in context by each of its rules, relative to a static one: a training
  step and reading.
- `continual`: `observe` of a Llama with three levels on all MLPs, relative to a forward and a
  backward pass of the same model over the same tokens, for several windows, in float32 and bfloat16.

With `--against FOLDER` the same works here against those of another commit.
"""

from __future__ import annotations

from typing import Any

from benchmarks import against, cases
from benchmarks.cases import RULES
from benchmarks.harness import interleaved, parser, record, show

CMS = {"batch": 4, "tokens": 512, "width": 128, "heads": 4, "layers": 4, "fast": 64, "slow": 256}
QUICK_CMS = {"batch": 1, "tokens": 32, "width": 16, "heads": 2, "layers": 1, "fast": 8, "slow": 16}
LLAMA = {"width": 576, "mlp": 1536, "layers": 5, "heads": 9, "ids": 8192, "chunk": 512}
QUICK_LLAMA = {"width": 32, "mlp": 64, "layers": 1, "heads": 2, "ids": 64, "chunk": 16}
PASSES = ("training step", "reading")


def cms(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Time of a training step and of reading, for each rule, relative to a static CMS."""
    works = cases.cms(shape)
    seconds = {
        each: interleaved({rule: works[f"{rule}, {each}"] for rule in RULES}, repeats) for each in PASSES
    }
    rows = [
        {
            "cms_update": name,
            **{f"{each}, s": seconds[each][name] for each in PASSES},
            **{f"{each}, of none": seconds[each][name] / seconds[each]["none"] for each in PASSES},
        }
        for name in RULES
    ]
    show(f"a CMS that learns in context, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def readings(shape: dict[str, int]) -> list[dict[str, Any]]:
    """Arguments of `cases.continual`: each precision without a context, with a short and with a long one."""
    windows = (shape["chunk"] + 1, 2 * shape["chunk"], 4 * shape["chunk"])
    return [
        {"shape": shape, "dtype": dtype, "window": window}
        for dtype in ("float32", "bfloat16")
        for window in windows
    ]


def continual(shape: dict[str, int], repeats: int) -> dict[str, Any]:
    """Rate of `observe` relative to a plain forward and backward pass, all gradients, no optimizer."""
    rows = []
    for reading in readings(shape):
        # warm-up and repeats fill the largest window, so that the median is that of windows in use
        seconds = interleaved(cases.continual(**reading), repeats, warmup=2)
        rows.append(
            {
                "dtype": reading["dtype"],
                "window": reading["window"],
                "plain, tokens/s": shape["chunk"] / seconds["plain"],
                "observe, tokens/s": shape["chunk"] / seconds["observe"],
                "of plain": seconds["plain"] / seconds["observe"],
            }
        )
    show(f"observing with three levels, {shape}", rows)
    return {"shape": shape, "repeats": repeats, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("question", choices=["cms", "continual", "all"], nargs="?", default="all")
    against.add_option(options)
    given = options.parse_args(arguments)
    repeats = given.repeats or (1 if given.quick else 7)
    shape, llama = (QUICK_CMS, QUICK_LLAMA) if given.quick else (CMS, LLAMA)
    asked = ("cms", "continual") if given.question == "all" else (given.question,)
    if given.against is not None:
        works = {
            "cms": [("cms", {"shape": shape})],
            "continual": [("continual", reading) for reading in readings(llama)],
        }
        chosen = [case for question in asked for case in works[question]]
        return record({"against": against.compare(given.against, chosen, repeats, warmup=2)}, given.json)
    figures: dict[str, Any] = {}
    if "cms" in asked:
        figures["cms"] = cms(shape, repeats)
    if "continual" in asked:
        figures["continual"] = continual(llama, repeats)
    return record(figures, given.json)


if __name__ == "__main__":
    main()
