"""Each benchmark runs, writes what it printed, and refuses to time a layer that is wrong."""

from __future__ import annotations

import json
from importlib import import_module, metadata

import pytest
import torch

from benchmarks import gate
from benchmarks.harness import interleaved
from nested_learning.layers import SelfModifyingTitans, Titans

RUNS = [
    ("decode",),
    ("generation",),
    ("gpu", "all", "--device", "cpu", "--plain", "--only", "self_modifying_titans", "attention"),
    ("in_context",),
    ("layers",),
    ("memory_step",),
    ("precision",),
    ("pretrained_speed",),
    ("profile",),
    ("roofline",),
    ("scaling", "attention"),
    ("serve",),
    ("start",),
    ("user_switching",),
    pytest.param(("scaling", "length"), marks=pytest.mark.slow),  # starts four fresh processes,
    pytest.param(("scaling", "linear"), marks=pytest.mark.slow),  # two
]


def numbers(tree):
    """All numbers in nested dicts and lists."""
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, (list, tuple)):
        return [n for value in tree for n in numbers(value)]
    return [tree] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_quick_run(run, tmp_path):
    name, *arguments = run
    if name == "serve":
        pytest.importorskip("uvicorn")
    file = tmp_path / "figures.json"
    figures = import_module(f"benchmarks.{name}").main([*arguments, "--quick", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["threads"] == torch.get_num_threads()
    assert numbers(written) == numbers(json.loads(json.dumps(figures)))
    assert all(value >= 0 for value in numbers(written))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        import_module("benchmarks.gpu").main(["--check"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_peers(tmp_path):
    peers = import_module("benchmarks.peers")
    try:
        metadata.version(peers.PEER)
    except metadata.PackageNotFoundError:
        with pytest.raises(SystemExit) as stopped:
            peers.main(["--quick"])
        assert stopped.value.code == 2
        return
    rows = peers.main(["--quick"])["rows"]
    assert {row["layer"] for row in rows} >= {"titans", "self_modifying_titans"}


def test_a_missing_peer_is_named(monkeypatch, capsys):
    peers = import_module("benchmarks.peers")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.metadata, "version", missing)
    with pytest.raises(SystemExit) as stopped:
        peers.main(["--quick"])
    assert stopped.value.code == 2
    assert "titans-pytorch" in capsys.readouterr().err


@pytest.mark.parametrize("layer", [Titans, SelfModifyingTitans])
def test_the_gate_stops_a_wrong_layer(layer, monkeypatch):
    torch.manual_seed(0)
    built = layer(16, num_heads=2, chunk_size=4)
    gate.equals_oracle(built, 9)
    gate.equals_itself_token_by_token(built, 16, 9)
    forward = type(built).forward

    def wrong(self, x, *others):
        y, state = forward(self, x, *others)
        return (y * 1.01 if x.dtype == torch.float32 else y), state

    monkeypatch.setattr(type(built), "forward", wrong)
    with pytest.raises(gate.GateError, match="y differs"):
        gate.equals_oracle(built, 9)
    with pytest.raises(gate.GateError, match="y differs"):
        gate.equals_itself_token_by_token(built, 16, 9)


def test_works_are_called_in_turn():
    calls: list[str] = []
    interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warmup=1)
    assert calls == list("ababab")
