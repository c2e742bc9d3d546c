"""Files of every kind that the package writes, for tests/compat/test_files.py: written once by an old commit.

    git worktree add ../old 6ceedde    # in the root of this checkout, as is the next line
    PYTHONPATH=../old python tests/compat/write.py

The package comes from the old checkout, this script from the present one, so it uses public names alone. It
replaces tests/compat/files and says in manifest.json which commit wrote them. Do not run it again with a
later commit: then the files prove nothing about the earlier one. A file of a new kind gets a script of its
own, or an addition here that leaves the others alone.

A checkpoint is what the Trainer wrote but for training_args.bin: that is a pickle, holds the paths of the
machine, and nothing reads it.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cases
import torch
from safetensors.torch import save_file

import nested_learning
from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.training.report import versions
from nested_learning.training.run import train

CHUNKED = ("linear_attention", "retnet", "deltanet", "gated_deltanet", "oja", "ttt_linear", "ttt_mlp", "dla")
CHUNKED += ("titans", "moneta", "yaad", "memora")
PARTS = {"chunk_size": 4, "architecture": "swiglu", "objective": "huber", "momentum": True}
MIXER_OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"num_kv_heads": 1},
    "sliding_window_attention": {"window": 4},
    **{name: {"chunk_size": 4} for name in CHUNKED},
    "self_modifying_titans": {"chunk_size": 4, "projection_chunk_size": 8, "momentum": True},
    "memory": {"parts": PARTS},
    "mag": {"window": 4, "memory_options": {"chunk_size": 4}},
    "mal": {"window": 4, "memory_options": {"chunk_size": 4}},
    "mac": {"segment": 4},
}
TINY: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2}
SELF_MODIFYING = {"self_modifying_titans": {"chunk_size": 4}}
MODELS: dict[str, dict[str, Any]] = {
    "regression": {
        **TINY,
        "mixer_options": SELF_MODIFYING,
        "cms_levels": [
            {"chunk_size": 4, "rule": "dgd", "learn_lr": True},
            {"chunk_size": 8, "lr": 0.05, "rule": "momentum", "retention": 0.9},
        ],
        "cms_update": "regression",
        "cms_activation": "swiglu",
        "cms_expansion": 2.0,
    },
    "nested": {
        **TINY,
        "mixer": "deltanet",
        "mixer_options": {"deltanet": {"chunk_size": 4}},
        "cms_levels": [{"chunk_size": 4}, {"chunk_size": 8, "rule": "adam"}],
        "cms_variant": "nested",
        "cms_update": "regression",
        "cms_nested_gradient": "exact",
        "cms_expansion": 2.0,
    },
    "lm": {
        **TINY,
        "mixer_options": SELF_MODIFYING,
        "cms_levels": [{"chunk_size": 4}, {"chunk_size": 8, "rule": "adagrad", "heads": 2}],
        "cms_variant": "independent",
        "cms_update": "lm",
        "cms_expansion": 2.0,
    },
    "mixers": {
        **TINY,
        "num_hidden_layers": len(MIXER_OPTIONS),
        "mixer": list(MIXER_OPTIONS),
        "mixer_options": MIXER_OPTIONS,
        "cms_levels": [{"chunk_size": 8}],
        "cms_expansion": 1.0,
        "tie_word_embeddings": False,
    },
}


@torch.no_grad()
def write_models() -> None:
    """Model folders, what the models answer, and sessions that end in the middle of a chunk."""
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        model = HopeForCausalLM(HopeConfig(**fields)).eval()
        for parameter in model.parameters():  # away from ones and zeros, so that each is seen in the logits
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(cases.FILES / f"model-{name}")
        rows = 1 if name == "mixers" else 2  # its many layers make large files
        ids, mask = torch.randint(0, 32, (rows, 18)), torch.ones(rows, 18, dtype=torch.long)
        mask[-1, :2] = 0
        whole = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        cache = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True).past_key_values
        cache.save(cases.FILES / f"session-{name}.safetensors")
        after = model(ids[:, 11:16], past_key_values=cache)
        expected = {"ids": ids, "mask": mask, "logits": whole.logits, "session": after.logits}
        expected["hidden"] = torch.stack(whole.hidden_states)
        save_file(expected, cases.FILES / f"expected-{name}.safetensors")


def write_memories() -> None:
    """Memories of learners, each in the middle of all chunks, and the scores of the text that follows."""
    for name in cases.LEVELS:
        learner = cases.learner(name)
        rows = 2 if name == "full" else 1
        ids = torch.randint(0, 32, (rows, 29 + 12), generator=torch.Generator().manual_seed(1))
        learner.observe(ids[:, :29], learn_mask=ids[:, :29] > 5)
        learner.memory.save(cases.FILES / f"memory-{name}.safetensors")
        expected = {"more": ids[:, 29:].contiguous(), "logits": learner.logits(ids[:1, 29:], row=0)}
        expected["surprise"] = learner.observe(ids[:, 29:])
        save_file(expected, cases.FILES / f"expected-memory-{name}.safetensors")


def write_run() -> None:
    """A training run as it lies there when it is interrupted after step 2, and the losses of all steps."""
    sentence = "the memory learns what the gradient of its own surprise tells it to keep or to forget"
    words = sentence.split()
    lines = [" ".join(words[i * k % len(words)] for k in range(1, 6)) for i in range(40)]
    (cases.FILES / "text.txt").write_text("\n".join(lines) + "\n")
    folder = cases.FILES / "run"
    result = train(cases.training_run(folder.relative_to(Path.cwd()))).result
    assert result is not None
    (cases.FILES / "expected-run.json").write_text(json.dumps(result["losses"], indent=1) + "\n")
    checkpoint = "checkpoints/checkpoint-2"
    for path in sorted(folder.rglob("*"), reverse=True):
        kept = path.name == "config.yaml" or (checkpoint in str(path) and path.name != "training_args.bin")
        if path.is_file() and not kept:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write_optimizers() -> None:
    """States after three steps, and the parameters then and two steps later."""
    tree = {}
    for name, build in cases.OPTIMIZERS.items():
        params = cases.parameters()
        optimizer = build(params)
        cases.run(optimizer, params, range(3))
        at = {"parameters": [p.detach() for p in params], "state": optimizer.state_dict()}
        at = copy.deepcopy(at)  # the state's tensors are those that go on
        cases.run(optimizer, params, range(3, 5))
        tree[name] = {**at, "expected": [p.detach().clone() for p in params]}
    cases.save_tree(tree, cases.FILES / "optimizers.safetensors")


def main() -> None:
    package = Path(nested_learning.__file__).parent
    ref = subprocess.run(["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True)
    shutil.rmtree(cases.FILES, ignore_errors=True)
    cases.FILES.mkdir()
    write_models()
    write_memories()
    write_run()
    write_optimizers()
    for lock in cases.FILES.glob("*.lock"):
        lock.unlink()
    sizes = {
        str(path.relative_to(cases.FILES)): path.stat().st_size
        for path in sorted(cases.FILES.rglob("*"))
        if path.is_file()
    }
    manifest = {"ref": ref.stdout.strip(), "versions": versions(), "bytes": sizes}
    (cases.FILES / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(sizes)} files, {sum(sizes.values()):,} bytes, by {manifest['ref']}")


if __name__ == "__main__":
    main()
