"""lm-eval on its command line, on a saved folder, with tasks of its three kinds made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nested_learning.training.data import byte_tokenizer
from tests.models.small_models import small_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Of several lengths, one beyond `MAX_LENGTH` with its answers.
QUESTIONS = [
    {"question": "one and two", "answers": ["yes", "no, never at all"], "gold": 0},
    {"question": "a", "answers": ["longer answers too", "b"], "gold": 1},
    {"question": "what is a longer question about, if not about itself?", "answers": ["x", "yz"], "gold": 0},
    {"question": "four four", "answers": ["five", "six"], "gold": 1},
    {"question": "the quick brown fox", "answers": ["jumps", "does not"], "gold": 0},
]
MAX_LENGTH = 64
NEW_TOKENS = 6
CHOICE = """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: answers
doc_to_target: gold
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answers[0]}} {{answers[1]}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = f"""
output_type: generate_until
doc_to_text: question
doc_to_target: "{{{{answers[0]}}}}"
generation_kwargs: {{until: ["<|endoftext|>"], max_gen_toks: {NEW_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"tiny_choice": CHOICE, "tiny_rolling": ROLLING, "tiny_generate": GENERATE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a model, its tokenizer, and the tasks."""
    path = tmp_path_factory.mktemp("lm_eval")
    tokenizer = byte_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = small_model(["titans", "attention"], vocab_size=len(tokenizer), **ids)
    model.save_pretrained(path / "saved")
    tokenizer.save_pretrained(path / "saved")
    data = path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
    for name, task in TASKS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}\n{source}{task}")
    return path


def evaluate(folder: Path, output: Path, *options: str) -> dict[str, list[dict]]:
    """Run the command in a process that knows the folder only; what it logged of each task, by document."""
    arguments = f"pretrained={folder / 'saved'},trust_remote_code=True,dtype=float64,max_length={MAX_LENGTH}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--device", "cpu"]
    command += ["--output_path", str(output), "--log_samples", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        command,
        cwd=output.parent,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for name in TASKS:
        (path,) = output.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return samples


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict[str, list[dict]]:
    """Results with batches of one row."""
    return evaluate(folder, tmp_path_factory.mktemp("runs") / "1", "--batch_size", "1")


def numbers(row: dict) -> list[float]:
    """Log-likelihoods of a document's requests."""
    return [
        float(response[0][0] if isinstance(response[0], list) else response[0]) for response in row["resps"]
    ]


@pytest.mark.parametrize("size", ["3", "auto"])
def test_batches_change_nothing(folder, alone, tmp_path, size):
    batched = evaluate(folder, tmp_path / "out", "--batch_size", size, "--max_batch_size", "8")
    for name in ("tiny_choice", "tiny_rolling"):
        for got, expected in zip(batched[name], alone[name], strict=True):
            assert numbers(got) == pytest.approx(numbers(expected), abs=1e-4)  # lm-eval goes through float32
    texts = [[row["resps"] for row in run["tiny_generate"]] for run in (batched, alone)]
    assert texts[0] == texts[1]


def test_the_numbers_are_the_models_own(folder, alone):
    from nested_learning import HopeForCausalLM

    model = HopeForCausalLM.from_pretrained(folder / "saved")
    tokenizer = byte_tokenizer()
    for row, question in zip(alone["tiny_choice"], QUESTIONS, strict=True):
        for got, answer in zip(numbers(row), question["answers"], strict=True):
            ids = torch.tensor(
                [f"{question['question']} {answer}".encode()[-MAX_LENGTH - 1 :]], dtype=torch.long
            )
            log_p = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
            assert got == pytest.approx(log_p[-len(f" {answer}") :].sum().item(), abs=1e-4)
    for row, question in zip(alone["tiny_rolling"], QUESTIONS, strict=True):
        text = f"{question['question']} {question['answers'][0]} {question['answers'][1]}".encode()
        if len(text) <= MAX_LENGTH:  # longer ones are cut into windows by lm-eval
            ids = torch.tensor([[tokenizer.eos_token_id, *text]])
            log_p = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
            assert numbers(row)[0] == pytest.approx(log_p.sum().item(), abs=1e-3)
    for row, question in zip(alone["tiny_generate"], QUESTIONS, strict=True):
        ids = torch.tensor([list(question["question"].encode())])
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert row["resps"][0][0] == tokenizer.decode(new, skip_special_tokens=True)


def test_questions_by_the_chat_template(folder, tmp_path):
    rows = evaluate(folder, tmp_path / "out", "--batch_size", "3", "--apply_chat_template")["tiny_generate"]
    for row, question in zip(rows, QUESTIONS, strict=True):
        prompt = row["arguments"]["gen_args_0"]["arg_0"]
        assert prompt == f"User: {question['question']}\nAssistant:"
