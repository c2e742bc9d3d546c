"""Try an installed nested_learning: `python smoke.py VERSION`, in an empty folder outside the repository.

Run by `python -m release build` with the Python of a fresh environment. Each step prints its name and
seconds; the first that fails ends the run with its traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TEXT = "the cat sat on the mat, the cat sat on the hat, and the hat sat on the cat. " * 4
# Loads a saved model by transformers alone: the saved folder's code finds the installed package.
WITHOUT_IMPORT = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("nested_learning."), type(model).__module__
"""


def command(*words: str) -> str:
    """What `nested-learning` of this environment prints."""
    program = Path(sys.executable).with_name("nested-learning")
    return output(str(program), *words)


def output(*words: str) -> str:
    """What a command prints on stdout."""
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def step_import(version: str) -> None:
    """The package is the installed one, has the version, and is imported without torch."""
    import nested_learning

    assert nested_learning.__version__ == version, nested_learning.__version__
    folder = Path(nested_learning.__file__).resolve().parent
    assert folder.is_relative_to(Path(sys.prefix).resolve()), f"imported from {folder}, not from {sys.prefix}"
    assert "torch" not in sys.modules
    assert (folder / "py.typed").is_file()


def step_command_line(version: str) -> None:
    """Help, version, info and levels."""
    assert "usage: nested-learning COMMAND" in command("--help")
    assert version in command("--version")
    assert "1,057,824" in command("info", "hope-tiny")
    assert json.loads(command("levels", "hope-tiny", "--optimizer", "m3", "--json"))


def step_model(version: str) -> None:
    """A preset learns in a step, writes text, and comes back from disk with the same logits and session."""
    import torch

    from nested_learning import HopeCache, HopeForCausalLM, preset
    from nested_learning.optimizers import build
    from nested_learning.training.data import byte_tokenizer

    torch.manual_seed(0)
    model = HopeForCausalLM(preset("hope-tiny"))
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    before = model(ids, labels=ids).loss
    optimizer = build("adamw", model, lr=3e-3)
    before.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(ids, labels=ids)
        assert after.loss < before, (after.loss, before)
        after.past_key_values.save("session.safetensors")
        assert model.generate(ids[:, :20], max_new_tokens=5, do_sample=False).shape == (1, 25)
        model.save_pretrained("saved")
        tokenizer.save_pretrained("saved")
        again = HopeForCausalLM.from_pretrained("saved").eval()
        torch.testing.assert_close(again(ids).logits, after.logits, rtol=0, atol=0)
        cache = HopeCache.load("session.safetensors", again)
        assert cache.tokens_seen.tolist() == [ids.shape[1]]
        assert again(ids[:, :1], past_key_values=cache).logits.isfinite().all()
    output(sys.executable, "-c", WITHOUT_IMPORT, "saved")


def step_learner(version: str) -> None:
    """A pretrained model that learns, and forgets again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nested_learning.continual import Level, stack_levels

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    learner = stack_levels(LlamaForCausalLM(config), levels=[Level(chunk_size=32, lr=1e-2, rule="adam")])
    ids = torch.arange(64).repeat(4)
    base = learner.perplexity(ids)
    with learner.adaptation_scope():
        learner.observe(ids)
        assert learner.perplexity(ids) < base
    assert learner.memory.is_empty


def step_train(version: str) -> None:
    """A run of two steps on the standard library, text from it, and the lens on it."""
    sizes = ("--block_size", "64", "--batch_size", "2", "--data.max_validation_blocks", "2")
    command("train", "--preset", "hope-tiny", "--data", "stdlib", "--steps", "2", *sizes, "--output", "run")
    made = json.loads(command("generate", "run", "--prompt", "def ", "--max_new_tokens", "5", "--json"))
    assert made, made
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    command("lens", "run", "--text", "text.txt", "--max_tokens", "200", "--output", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<script" in page, page[:500]
    assert "<style" in page, page[:500]


def step_eval(version: str) -> None:
    """A task of the evaluation, with its report on a page."""
    command("eval", "recall", "--budget", "smoke", "--output", "evals")
    assert "recall" in Path("evals/report.md").read_text(encoding="utf-8")
    assert "<html" in Path("evals/report.html").read_text(encoding="utf-8")


def step_packaged(version: str) -> None:
    """Every trained model that came with the package loads and predicts text better than chance."""
    import torch

    from nested_learning import pretrained
    from nested_learning.models.packaged import packaged_names

    for name in packaged_names():
        model, tokenizer = pretrained(name)
        ids = tokenizer("import os\nimport sys\n\n\ndef main():\n    ", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        assert loss < 0.8 * torch.tensor(float(model.config.vocab_size)).log(), (name, loss)
        print(f"  {name}: {loss:.2f} nats per token", flush=True)


STEPS: tuple[Callable[[str], None], ...] = (
    step_import,
    step_command_line,
    step_model,
    step_learner,
    step_train,
    step_eval,
    step_packaged,
)


def main(version: str) -> None:
    """All steps in their order."""
    assert not list(Path.cwd().glob("nested_learning*")), f"{os.getcwd()} has a package of its own"
    for step in STEPS:
        start = time.monotonic()
        step(version)
        print(f"  {step.__name__.removeprefix('step_')}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
