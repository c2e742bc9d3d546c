"""Is generation constant in time and memory: `python -m benchmarks.generation`.

For each preset, milliseconds per generated token after contexts of 128 and 16,384 tokens, interleaved one
token at a time in one process, medians, and the bytes of the two caches. Hope's are equal; the Transformer's
grow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved, parser, record, show
from nested_learning import HopeCache, HopeForCausalLM
from nested_learning.models.presets import preset

CONTEXTS, QUICK_CONTEXTS = (128, 16_384), (8, 64)


class Session:
    """A model that has read a context [1, S] and goes on greedily, one token a call."""

    @torch.no_grad()
    def __init__(self, model: HopeForCausalLM, context: Tensor) -> None:
        cache = None
        for piece in context.split(2048, dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        assert isinstance(cache, HopeCache)
        self.model, self.cache, self.newest = model, cache, context[:, -1:]

    @torch.no_grad()
    def next(self) -> None:
        logits = self.model(self.newest, past_key_values=self.cache).logits
        self.newest = logits[:, -1].argmax(-1, keepdim=True)


def measure(name: str, contexts: tuple[int, ...] = CONTEXTS, tokens: int = 200) -> dict[str, Any]:
    """Time `tokens` greedy tokens of a randomly initialised preset after each context, batch 1."""
    torch.manual_seed(0)
    model = HopeForCausalLM(preset(name)).eval()
    ids = torch.randint(0, 256, (1, max(contexts)))
    sessions = {context: Session(model, ids[:, :context]) for context in contexts}
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
    given = options.parse_args(arguments)
    contexts = QUICK_CONTEXTS if given.quick else CONTEXTS
    tokens = given.repeats or (2 if given.quick else 200)
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
