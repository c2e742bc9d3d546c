"""How many functions of the package a call walks through: what a reader has to follow.

    python -m tests.house.walk [NAME]    # the figures of CONTRIBUTING; with a name the functions too

Distinct (file, qualified name) pairs, counted by sys.setprofile in the second call, on one thread. Lambdas
and comprehensions belong to the function they stand in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import nested_learning
from nested_learning import HopeForCausalLM
from nested_learning.layers import DeltaNet
from nested_learning.models.presets import preset

ROOT = Path(nested_learning.__file__).parent
_INNER = ("<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")

Walk = set[tuple[str, str]]


def walk(call: Callable[[], object]) -> Walk:
    """The package's functions in the second of two calls, as (file, qualified name)."""
    call()
    found: Walk = set()
    own = str(ROOT)

    def seen(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(own) and code.co_name not in _INNER:
            name = getattr(code, "co_qualname", f"{code.co_name}:{code.co_firstlineno}")  # from Python 3.11
            found.add((str(Path(code.co_filename).relative_to(ROOT)), name))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
        torch.set_num_threads(threads)
    return found


def hope() -> HopeForCausalLM:
    """hope-tiny with one layer of width 32 and two heads."""
    torch.manual_seed(0)
    return HopeForCausalLM(preset("hope-tiny", num_hidden_layers=1, hidden_size=32, num_heads=2))


def forward() -> Walk:
    """Through a forward pass of Hope with labels."""
    model, ids = hope(), torch.randint(0, 256, (2, 64))
    return walk(lambda: model(ids, labels=ids))


def backward() -> Walk:
    """Through a training step's forward and backward pass."""
    model, ids = hope(), torch.randint(0, 256, (2, 64))
    with torch.autograd.set_multithreading_enabled(False):
        return walk(lambda: model(ids, labels=ids).loss.backward())


def layer() -> Walk:
    """Through one layer: DeltaNet(32, 2)."""
    deltanet, x = DeltaNet(32, 2), torch.randn(2, 64, 32)
    return walk(lambda: deltanet(x))


def token() -> Walk:
    """Through one generated token, read with the cache of those before it."""
    model, ids = hope().eval(), torch.randint(0, 256, (2, 64))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        return walk(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))


WALKS: dict[str, Callable[[], Walk]] = {
    "forward": forward,
    "backward": backward,
    "layer": layer,
    "token": token,
}


def main(names: list[str]) -> None:
    for name in names or WALKS:
        found = WALKS[name]()
        print(f"{name}: {len(found)} functions in {len({file for file, _ in found})} files")
        if names:
            print("\n".join(f"  {file}: {function}" for file, function in sorted(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
