"""The claim that a figure is kept under a harder condition, and reading in pieces with the state carried."""

from __future__ import annotations

import pytest
import torch

from nested_learning.evals import Keeps, MethodRow, find_method
from nested_learning.evals.carried import CarriedReader
from nested_learning.evals.methods.models import Size
from nested_learning.layers.attention.softmax import AttentionState
from nested_learning.models import HopeForCausalLM


def judged(*pairs: tuple[float, float], chance: float = 0.1) -> str:
    figures = {seed: {"short": short, "long": long} for seed, (short, long) in enumerate(pairs)}
    claim = Keeps("kept", "nowhere", "one", "short", "long", margin=0.02, chance=chance)
    return claim.judge({"one": MethodRow("one", {}, figures)}).verdict


def test_kept_is_decided_by_paired_differences() -> None:
    assert judged((1.0, 1.0), (0.9, 0.9), (0.8, 0.8)) == "holds"
    assert judged((0.5, 0.7), (0.5, 0.8), (0.5, 0.75)) == "holds"  # more than kept
    assert judged((1.0, 0.985), (1.0, 0.985)) == "holds"  # within the margin
    assert judged((1.0, 0.5), (1.0, 0.55), (1.0, 0.52)) == "does not"
    assert judged((1.0, 0.5), (1.0, 1.0), (1.0, 0.9)) == "cannot be told here"
    assert judged((1.0, 1.0)) == "cannot be told here"  # one seed
    assert judged((0.1, 0.1), (0.1, 0.1)) == "cannot be told here"  # nothing there to be kept
    assert Keeps("kept", "nowhere", "other", "a", "b").judge({}).verdict == "cannot be told here"


def small(name: str, layers: int = 1) -> HopeForCausalLM:
    model = find_method(name).new_model(Size(64, 32, width=16, layers=layers, chunk=8), seed=0)  # type: ignore[attr-defined]
    return model.eval()


@pytest.mark.parametrize("name", ["deltanet", "hope", "hope-attention-in-context"])
def test_pieces_with_the_state_carried_are_the_whole(name: str) -> None:
    model, ids = small(name, layers=2), torch.randint(64, (4, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
    reader = CarriedReader(model, piece=16, bound=100)
    assert torch.equal(reader.read(ids[:, :40])[:, 0], whole[:, 39].argmax(-1))
    branch = reader.rows(torch.tensor([2, 0]))
    assert torch.equal(branch.read(ids[[2, 0], 40:])[:, 0], whole[[2, 0], -1].argmax(-1))
    assert torch.equal(reader.read(ids[:, 40:41])[:, 0], whole[:, 40].argmax(-1))  # the branch left it alone
    assert torch.equal(reader.anew().read(ids)[:, 0], whole[:, -1].argmax(-1))


def test_attention_forgets_what_lies_behind_the_bound() -> None:
    model = small("transformer")
    first, second = torch.randint(64, (2, 32, 60), generator=torch.Generator().manual_seed(1))
    second[:, 20:] = first[:, 20:]
    for bound, same in ((30, True), (60, False)):
        readers = [CarriedReader(model, 10, bound) for _ in range(2)]
        for reader, ids in zip(readers, (first, second), strict=True):
            reader.read(ids[:, :50])
            (state,) = reader.cache.states.values()
            assert isinstance(state, AttentionState)
            assert state.key.shape[2] == min(bound, 50)
            assert int(state.positions.max()) == 49
        with torch.no_grad():
            logits = [model(first[:, 50:], past_key_values=reader.cache).logits[:, -1] for reader in readers]
        assert torch.allclose(*logits, atol=1e-6) is same
