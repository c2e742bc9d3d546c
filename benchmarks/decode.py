"""Tokens per second of generation: `python -m benchmarks.decode`.

Greedy tokens, batch 1, after contexts of 128 and 16,384 tokens: hope-tiny against transformer-tiny with its
key-value cache. All pairs of model and context are interleaved one token at a time. A gate first: a model fed
token by token gives the logits of the whole sequence.

With `--against FOLDER` a token of each pair here against one of another commit.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import against, cases
from benchmarks.cases import Session
from benchmarks.gate import GateError
from benchmarks.harness import interleaved, parser, record, show
from nested_learning import HopeForCausalLM

MODELS = ("hope-tiny", "transformer-tiny")
CONTEXTS, QUICK_CONTEXTS = (128, 16_384), (8, 64)
GATE_TOKENS, QUICK_GATE_TOKENS = 70, 3  # 70: more than two chunks


@torch.no_grad()
def check(model: HopeForCausalLM, tokens: int) -> None:
    """Token by token against the whole sequence.

    Raises:
        GateError: the logits differ.
    """
    ids = torch.randint(256, (1, tokens))
    whole, cache, pieces = model(ids, use_cache=False).logits, None, []
    for token in ids.split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    error = float((torch.cat(pieces, dim=1) - whole).abs().max())
    if not error <= 1e-3:
        raise GateError(f"logits token by token differ from those of the whole sequence by {error:.1e}")


def measure(contexts: tuple[int, ...], tokens: int, gate_tokens: int) -> dict[str, Any]:
    """Tokens per second of each model after each context, and their ratio."""
    sessions: dict[str, Session] = {}
    for name in MODELS:
        model = cases.language_model(name)
        check(model, gate_tokens)
        sessions |= {f"{name} {context}": found for context, found in cases.sessions(model, contexts).items()}
    seconds = interleaved({name: session.next for name, session in sessions.items()}, tokens, warmup=4)
    rows = []
    for context in contexts:
        rate = {name: 1 / seconds[f"{name} {context}"] for name in MODELS}
        rows.append(
            {
                "context": context,
                **{f"{name}, tokens/s": value for name, value in rate.items()},
                "ratio": rate[MODELS[0]] / rate[MODELS[1]],
            }
        )
    show("generation, batch 1", rows)
    return {"tokens": tokens, "rows": rows}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__)
    against.add_option(options)
    given = options.parse_args(arguments)
    tokens = given.repeats or (2 if given.quick else 200)
    contexts, gate_tokens = (QUICK_CONTEXTS, QUICK_GATE_TOKENS) if given.quick else (CONTEXTS, GATE_TOKENS)
    if given.against is not None:
        for name in MODELS:
            check(cases.language_model(name), gate_tokens)
        case = ("decode", {"models": MODELS, "contexts": contexts})
        return record({"against": against.compare(given.against, [case], tokens, warmup=4)}, given.json)
    return record(measure(contexts, tokens, gate_tokens), given.json)


if __name__ == "__main__":
    main()
