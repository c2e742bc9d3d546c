"""Tokens per second of generation, plain and compiled: `python -m benchmarks.decode`.

Greedy tokens, batch 1, after contexts of 128 and 16,384 tokens: hope-tiny against transformer-tiny with its
key-value cache, each as it is and through torch.compile (`get_compiled_call`, as `generate` uses it with a
`compile_config`; attention's lengths are symbols). All are interleaved one token at a time. A gate first: a
model fed token by token, either way, gives the logits of the whole sequence.

Then how long a process takes to its first two compiled tokens, from nothing and from the compiler's cache on
disk, each in a process of its own.

With `--against FOLDER` a token of each pair here against one of another commit: both plainly, then compiled
here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import CompileConfig

from benchmarks import against, cases
from benchmarks.cases import Session
from benchmarks.gate import GateError
from benchmarks.harness import interleaved, parser, record, show
from nested_learning import HopeForCausalLM

MODELS = ("hope-tiny", "transformer-tiny")
CONTEXTS, QUICK_CONTEXTS = (128, 16_384), (8, 64)
GATE_TOKENS, QUICK_GATE_TOKENS = 70, 3  # 70: more than two chunks
PROMPT = 128  # tokens before the first compiled one


@torch.no_grad()
def check(model: HopeForCausalLM, tokens: int, compiled: bool = False) -> None:
    """Token by token against the whole sequence.

    Raises:
        GateError: the logits differ.
    """
    ids = torch.randint(256, (1, tokens))
    whole, cache, pieces = model(ids, use_cache=False).logits, None, []
    call = model.get_compiled_call(CompileConfig()) if compiled else model
    for token in ids.split(1, dim=1):
        out = call(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    error = float((torch.cat(pieces, dim=1) - whole).abs().max())
    if not error <= 1e-3:
        how = "compiled" if compiled else "token by token"
        raise GateError(f"logits {how} differ from those of the whole sequence by {error:.1e}")


def measure(contexts: tuple[int, ...], tokens: int, gate_tokens: int, compiled: bool) -> dict[str, Any]:
    """Tokens per second of each model after each context, and their ratio."""
    ways = {"plain": False, "compiled": True} if compiled else {"plain": False}
    sessions: dict[str, Session] = {}
    for name in MODELS:
        model = cases.language_model(name)
        for way, through in ways.items():
            check(model, gate_tokens, through)
            found = cases.sessions(model, contexts, through)
            sessions |= {f"{name} {way} {context}": session for context, session in found.items()}
    seconds = interleaved({name: session.next for name, session in sessions.items()}, tokens, warmup=4)
    rows = []
    for context in contexts:
        rate = {(name, way): 1 / seconds[f"{name} {way} {context}"] for name in MODELS for way in ways}
        fastest = {name: max(rate[name, way] for way in ways) for name in MODELS}
        rows.append(
            {
                "context": context,
                **{f"{name} {way}, tokens/s": value for (name, way), value in rate.items()},
                "ratio, plain": rate[MODELS[0], "plain"] / rate[MODELS[1], "plain"],
                "ratio of the fastest": fastest[MODELS[0]] / fastest[MODELS[1]],
            }
        )
    show("generation, batch 1", rows)
    return {"tokens": tokens, "rows": rows}


@torch.no_grad()
def first_tokens(name: str) -> dict[str, float]:
    """Seconds of the first two compiled tokens of a process, and how often the caches on disk had a graph."""
    from torch._dynamo.utils import counters

    model = cases.language_model(name)
    session = Session(model, torch.randint(0, 256, (1, PROMPT)), compiled=True)
    start = time.perf_counter()
    session.next()
    session.next()
    seconds = time.perf_counter() - start
    hits, misses = (
        counters["inductor"][f"fxgraph_cache_{what}"] + counters["aot_autograd"][f"autograd_cache_{what}"]
        for what in ("hit", "miss")
    )
    return {"seconds": seconds, "hits": hits, "misses": misses}


def compile_times() -> list[dict[str, Any]]:
    """Rows of `first_tokens` with an empty cache and with the one that was filled so."""
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "filled"):
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.decode", "--first", name],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                rows.append({"model": name, "cache": cache, **json.loads(done.stdout.splitlines()[-1])})
    show("first two compiled tokens of a process", rows)
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    options.add_argument("--first", metavar="MODEL", help="time the first compiled tokens of this process")
    options.add_argument("--plain", action="store_true", help="leave torch.compile out")
    against.add_option(options)
    given = options.parse_args(arguments)
    if given.first is not None:
        print(json.dumps(first := first_tokens(given.first)))
        return first
    tokens = given.repeats or (2 if given.quick else 200)
    contexts, gate_tokens = (QUICK_CONTEXTS, QUICK_GATE_TOKENS) if given.quick else (CONTEXTS, GATE_TOKENS)
    compiled = not (given.plain or given.quick)
    if given.against is not None:
        for name in MODELS:
            check(cases.language_model(name), gate_tokens)
        names = ["decode", *(["decode_compiled"] if compiled else [])]
        works = [(case, {"models": MODELS, "contexts": contexts}) for case in names]
        return record({"against": against.compare(given.against, works, tokens, warmup=4)}, given.json)
    figures = measure(contexts, tokens, gate_tokens, compiled)
    if compiled:
        figures["compiling"] = compile_times()
    return record(figures, given.json)


if __name__ == "__main__":
    main()
