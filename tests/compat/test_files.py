"""Files that an earlier commit wrote load, and mean the same: see tests/compat/write.py."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nested_learning import HopeCache
from nested_learning.optimizers import matrix
from nested_learning.training.run import train
from tests.compat import cases

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MOST_BYTES = 400_000


@pytest.fixture(autouse=True)
def newton_schulz_in_bfloat16(monkeypatch):
    """The files were written where "auto" means bfloat16; their figures are to be met on every CPU."""
    monkeypatch.setattr(matrix, "bfloat16_is_slow", lambda device: False)


def model_and_expected(name):
    model = AutoModelForCausalLM.from_pretrained(cases.FILES / f"model-{name}").eval()
    return model, load_file(cases.FILES / f"expected-{name}.safetensors")


def test_the_manifest_names_the_commit_and_every_file():
    manifest = json.loads((cases.FILES / "manifest.json").read_text())
    assert len(manifest["ref"]) == 40
    found = {p for p in cases.FILES.rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert {str(p.relative_to(cases.FILES)): p.stat().st_size for p in found} == manifest["bytes"]
    assert sum(manifest["bytes"].values()) < MOST_BYTES


@pytest.mark.parametrize("name", cases.SESSIONS)
@torch.no_grad()
def test_a_model_answers_as_it_did(name):
    """Layer by layer, so that a failure names the first one that differs."""
    model, expected = model_and_expected(name)
    out = model(expected["ids"], attention_mask=expected["mask"], use_cache=False, output_hidden_states=True)
    real = expected["mask"].bool()
    mixers = ["embedding", *model.config.layer_mixers]
    for mixer, now, then in zip(mixers, out.hidden_states, expected["hidden"], strict=True):
        torch.testing.assert_close(now[real], then[real], **CLOSE, msg=lambda m, mixer=mixer: f"{mixer}: {m}")
    torch.testing.assert_close(out.logits[real], expected["logits"][real], **CLOSE)


@pytest.mark.parametrize("name", cases.SESSIONS)
@torch.no_grad()
def test_a_session_goes_on_in_the_middle_of_a_chunk(name):
    model, expected = model_and_expected(name)
    cache = HopeCache.load(cases.FILES / f"session-{name}.safetensors", model)
    assert cache.get_seq_length() == 11
    assert cache.tokens_seen.tolist() == expected["mask"][:, :11].sum(1).tolist()
    ids = expected["ids"]
    assert cache.is_prefix_of(ids)
    logits = model(ids[:, 11:16], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected["session"], **CLOSE)
    torch.testing.assert_close(logits, expected["logits"][:, 11:16], **CLOSE)


@pytest.mark.parametrize("levels", cases.LEVELS)
def test_a_memory_goes_on_in_the_middle_of_its_chunks(levels, tmp_path):
    learner = cases.learner(levels)
    with pytest.warns(RuntimeWarning, match="without checksums"):
        learner.memory.load(shutil.copy(cases.FILES / f"memory-{levels}.safetensors", tmp_path))
    expected = load_file(cases.FILES / f"expected-memory-{levels}.safetensors")
    more = expected["more"]
    torch.testing.assert_close(learner.logits(more[:1], row=0), expected["logits"], **CLOSE)
    torch.testing.assert_close(learner.observe(more), expected["surprise"], **CLOSE)
    assert {write.outcome for write in learner.writes} >= {"written"}


def test_an_interrupted_run_goes_on_with_the_losses_of_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # the run names its text relative to the root
    folder = tmp_path / "run"
    shutil.copytree(cases.FILES / "run", folder)
    with pytest.warns(RuntimeWarning, match="checkpoint-2 is of a version without manifests"):
        result = train(cases.training_run(folder), resume=True).result
    expected = json.loads((cases.FILES / "expected-run.json").read_text())
    for kind, curve in expected.items():
        assert [step for step, _ in result["losses"][kind]] == [step for step, _ in curve]
        assert [loss for _, loss in result["losses"][kind]] == pytest.approx([y for _, y in curve], abs=1e-5)


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_the_state_of_an_optimizer_goes_on(name):
    saved = cases.load_tree(cases.FILES / "optimizers.safetensors")[name]
    params = cases.parameters()
    optimizer = cases.OPTIMIZERS[name](params)
    with torch.no_grad():
        for now, then in zip(params, saved["parameters"], strict=True):
            now.copy_(then)
    optimizer.load_state_dict(copy.deepcopy(saved["state"]))
    cases.run(optimizer, params, range(3, 5))
    for now, then in zip(params, saved["expected"], strict=True):
        torch.testing.assert_close(now.detach(), then, **CLOSE)
