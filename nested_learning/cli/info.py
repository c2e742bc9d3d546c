"""`nested-learning info`."""

from __future__ import annotations

from typing import Any

from nested_learning._checks import shown
from nested_learning.cli.output import human_bytes, print_json, print_table
from nested_learning.cli.parsing import new_parser, parse

DESCRIPTION = """\
Show where a model's parameters are, at which frequency each part changes, and how much memory the state
of a running sequence takes. Nothing of the model's size is allocated.

MODEL is a preset, a training YAML (its keys `preset` and `model`), a folder written by save_pretrained, or
the --output folder of a completed run.

examples:
  nested-learning info hope-1.3b
  nested-learning info runs/first --batch 1 32 --tokens 1024 65536 --json
"""
MOST = {"batch": 10**12, "tokens": 10**8}  # longer texts make shapes that torch cannot count


def run(argv: list[str]) -> int:
    """Parse, look, print. Returns the exit code."""
    parser = new_parser("info", "MODEL ", DESCRIPTION)
    parser.add_argument("model", type=str, help="preset, training YAML, saved model or completed run")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences at a time")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[128, 2048, 16384], help="tokens read so far"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, alone on stdout")
    values = parse(parser, argv)
    for name, most in MOST.items():
        if not 1 <= min(values[name]) <= max(values[name]) <= most:
            raise ValueError(f"--{name} is {shown(values[name])}; expected whole numbers from 1 to {most:,}")
    result = info(values.model, values.batch, values.tokens)
    print_json(result) if values.json else _print(result)
    return 0


def info(name: str, batches: list[int], tokens: list[int]) -> dict[str, Any]:
    """Parameters by part and bytes of the state, as JSON holds them.

    Raises:
        ValueError: no such preset, an invalid YAML, or a folder without a Hope model.
    """
    from nested_learning.cli.anatomy import parts, state_bytes
    from nested_learning.training.models import any_config

    config = any_config(name)
    groups = parts(config)
    per_sequence = state_bytes(config, tokens)
    return {
        "model": name,
        "parameters": sum(part.parameters for part in groups),
        "parts": [
            {"part": part.name, "parameters": part.parameters, "updates": part.updates} for part in groups
        ],
        "state": [
            {"batch": batch, "tokens": length, "bytes": batch * per_sequence[length]}
            for length in per_sequence
            for batch in batches
        ],
        "config": config.to_dict(),
    }


def _print(result: dict[str, Any]) -> None:
    total = result["parameters"]
    rows = [
        (part["part"], f"{part['parameters']:,}", f"{part['parameters'] / total:.1%}", part["updates"])
        for part in result["parts"]
    ]
    rows.append(("all", f"{total:,}", "100.0%", ""))
    print_table(result["model"], ("part", "parameters", "share", "changes"), rows)
    batches = list(dict.fromkeys(entry["batch"] for entry in result["state"]))
    sizes = {(entry["batch"], entry["tokens"]): entry["bytes"] for entry in result["state"]}
    lengths = list(dict.fromkeys(entry["tokens"] for entry in result["state"]))
    print()
    print_table(
        "memory of the state (float32 model)",
        ("tokens read", *(f"batch {batch}" for batch in batches)),
        [(f"{length:,}", *(human_bytes(sizes[batch, length]) for batch in batches)) for length in lengths],
    )
