"""Every architecture of the table in docs/continual.md, tiny and random: exact, learns, undone, saved."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from nested_learning.continual import Level, stack_levels
from tests.continual.architectures import DENSE, EXPERTS, FUSED, RECURRENT, VOCAB, tiny

FAST = {"mistral", "phi3", "gpt_oss", "qwen3_next", "mamba"}
IDS = torch.randint(3, VOCAB, (37,), generator=torch.Generator().manual_seed(0))
REFUSED = {
    "minimax": "does not read with transformers' cache.*MiniMax uses cache of its own",
    "recurrent_gemma": "does not go on from the cache it is given: .* keeps its state in its modules",
    "bamba": "does not go on from the cache it is given",
    "rwkv": "takes no cache",
    "xlstm": "no layers with attention or recurrence",
    "dbrx": "no MLP of linear maps",
}
WORKS = [name for name in DENSE | FUSED | EXPERTS | RECURRENT if name not in REFUSED]


def slow(names):
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def learner_on(model, **options):
    levels = [Level(8, 0.3), Level(16, 0.1, rank=2, rule="adam")]
    return stack_levels(model, levels=levels, window=32, overlap=4, **options)


@pytest.mark.parametrize("name", slow(WORKS))
def test_architecture(name, tmp_path):
    model = tiny(name)
    with torch.no_grad():
        base = model(input_ids=IDS[None], use_cache=False).logits
    still = stack_levels(model, levels=[Level(8, 0.0)], window=40)
    expected = cross_entropy(base[0, :-1], IDS[1:], reduction="none")
    torch.testing.assert_close(still.observe(IDS)[1:], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(still.logits(IDS[None]), base)

    learner = learner_on(model)
    text = IDS[:16].repeat(2)
    before = learner.perplexity(text)
    with learner.adaptation_scope():
        learner.observe(text)
        assert learner.perplexity(text) < 0.95 * before
    assert torch.equal(learner.logits(IDS[None]), base)

    with learner.adaptation_scope():  # in pieces as in one
        whole = learner.observe(IDS[:30])
        deltas = learner.memory.diff()
    pieces = torch.cat([learner.observe(piece) for piece in IDS[:30].split([5, 1, 13, 9, 2])])
    torch.testing.assert_close(pieces, whole, equal_nan=True, rtol=1e-4, atol=1e-4)
    for key, delta in learner.memory.diff().items():
        assert torch.equal(delta, deltas[key])

    learner.memory.save(tmp_path / "memory.safetensors")
    loaded = learner_on(model)
    loaded.memory.load(tmp_path / "memory.safetensors")
    assert torch.equal(loaded.observe(IDS), learner.observe(IDS))
    for key, delta in learner.memory.diff().items():
        assert torch.equal(delta, loaded.memory.diff()[key])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        stack_levels(tiny(name), levels=[Level(8, 0.1)])


def test_hope_models_are_refused():
    from nested_learning.models import HopeConfig, HopeForCausalLM

    config = HopeConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="keeps memories of its own in a HopeCache"):
        stack_levels(HopeForCausalLM(config), levels=[Level(8, 0.1)])


def test_the_guide_names_them_all():
    """The table of docs/continual.md has each by the name of its configuration, `model_type`."""
    with open("docs/continual.md") as guide:
        named = set(re.findall(r"`([a-z0-9_]+)`", guide.read().split("## Which models")[1].split("\n## ")[0]))
    assert named >= {*WORKS, *REFUSED}
