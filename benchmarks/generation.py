"""Time and memory of generation, which ought to be constant: `python -m benchmarks.generation`.

For each preset, milliseconds per generated token after contexts of 128 and 16,384 tokens, interleaved one
token at a time in one process, medians, and the bytes of the two caches. Hope's are equal, the Transformer's
grow. With `--against FOLDER` a token here against one of another commit.
"""

from __future__ import annotations

from typing import Any

from benchmarks import against, cases
from benchmarks.harness import interleaved, parser, record, show

CONTEXTS, QUICK_CONTEXTS = (128, 16_384), (8, 64)


def measure(name: str, contexts: tuple[int, ...] = CONTEXTS, tokens: int = 200) -> dict[str, Any]:
    """Time `tokens` greedy tokens of a randomly initialised preset after each context, batch 1."""
    sessions = cases.sessions(cases.language_model(name), contexts)
    bytes_before = {context: session.cache.nbytes() for context, session in sessions.items()}
    seconds = interleaved({str(context): session.next for context, session in sessions.items()}, tokens, 0)
    milliseconds = {context: 1e3 * seconds[str(context)] for context in contexts}
    return {
        "model": name,
        "batch": 1,
        "tokens_timed": tokens,
        "milliseconds_per_token": milliseconds,
        "ratio_of_time": milliseconds[max(contexts)] / milliseconds[min(contexts)],
        "cache_bytes": bytes_before,
        "cache_bytes_after": {context: session.cache.nbytes() for context, session in sessions.items()},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--model", nargs="+", default=["hope-tiny", "transformer-tiny"], help="presets")
    against.add_option(options)
    given = options.parse_args(arguments)
    contexts = QUICK_CONTEXTS if given.quick else CONTEXTS
    tokens = given.repeats or (2 if given.quick else 200)
    if given.against is not None:
        case = ("decode", {"models": given.model, "contexts": contexts})
        return record({"against": against.compare(given.against, [case], tokens, warmup=4)}, given.json)
    results = [measure(name, contexts, tokens) for name in given.model]
    rows = [
        {
            "model": result["model"],
            **{f"ms per token after {c}": result["milliseconds_per_token"][c] for c in contexts},
            "ratio": result["ratio_of_time"],
            **{f"cache bytes after {c}": result["cache_bytes"][c] for c in contexts},
        }
        for result in results
    ]
    show("generation, batch 1", rows)
    return record({"results": results}, given.json)


if __name__ == "__main__":
    main()
