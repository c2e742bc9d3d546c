"""Is generation constant in time and memory: `python -m benchmarks.generation`.

For each preset, milliseconds per generated token after contexts of 128 and 16,384 tokens, interleaved one
token at a time in one process, medians, and the bytes of the two caches. Hope's are equal; the Transformer's
grow.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nested_learning import HopeCache, HopeForCausalLM
from nested_learning.models.presets import preset
from nested_learning.training.report import hardware, versions

CONTEXTS = (128, 16_384)


@torch.no_grad()
def measure(name: str, contexts: tuple[int, ...] = CONTEXTS, tokens: int = 200) -> dict[str, Any]:
    """Time `tokens` greedy tokens of a randomly initialised preset after each context, batch 1."""
    torch.manual_seed(0)
    model = HopeForCausalLM(preset(name)).eval()
    ids = torch.randint(0, 256, (1, max(contexts)))
    caches: dict[int, HopeCache] = {}
    for context in contexts:
        cache = None
        for piece in ids[:, :context].split(2048, dim=1):
            cache = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        assert cache is not None
        caches[context] = cache
    bytes_before = {context: cache.nbytes() for context, cache in caches.items()}
    seconds: dict[int, list[float]] = {context: [] for context in contexts}
    newest = {context: ids[:, context - 1 : context] for context in contexts}
    for _ in range(tokens):
        for context in contexts:
            start = time.perf_counter()
            logits = model(newest[context], past_key_values=caches[context]).logits
            newest[context] = logits[:, -1].argmax(-1, keepdim=True)
            seconds[context].append(time.perf_counter() - start)
    milliseconds = {context: 1e3 * median(times) for context, times in seconds.items()}
    return {
        "model": name,
        "batch": 1,
        "tokens_timed": tokens,
        "milliseconds_per_token": milliseconds,
        "ratio_of_time": milliseconds[max(contexts)] / milliseconds[min(contexts)],
        "cache_bytes": bytes_before,
        "cache_bytes_after": {context: cache.nbytes() for context, cache in caches.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["hope-tiny", "transformer-tiny"], help="presets")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    result = {
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
        "results": [measure(name) for name in arguments.model],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
