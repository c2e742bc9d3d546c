import dataclasses
import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from nested_learning.training.data import DataConfig, build_data, byte_tokenizer


@pytest.fixture
def folder(tmp_path, prose):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i:02}.txt").write_text(prose(200, seed=i), encoding="utf-8")
    return tmp_path / "text"


def decoded(bundle, data, count):
    return bundle.tokenizer.decode(torch.cat([data[i]["input_ids"] for i in range(count)]))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_folder(folder, tokenizer):
    config = DataConfig(source=str(folder), tokenizer=tokenizer, bpe_vocab_size=300, block_size=32, seed=1)
    bundle = build_data(config, num_train_samples=500)
    assert len(bundle.train) == 500
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    held_out = decoded(bundle, bundle.validation, len(bundle.validation))
    parts = [part for part in held_out.split("<|endoftext|>") if part]
    assert len(parts) == 2  # a tenth of 20 files
    names = [name for name, text in texts.items() if any(text.startswith(part[:100]) for part in parts)]
    assert len(names) == 2

    summary = json.loads(json.dumps(bundle.summary))
    assert {name: summary[name] for name in dataclasses.asdict(config)} == dataclasses.asdict(config)
    train_bytes = sum(len(text.encode()) for name, text in texts.items() if name not in names)
    assert summary["train_bytes"] == train_bytes
    assert (summary["train_documents"], summary["validation_documents"]) == (18, 2)
    assert summary["epochs"] == 500 / (summary["train_tokens"] // 32)
    if tokenizer == "byte":
        assert summary["train_tokens"] == train_bytes + 18
        assert 0.99 < bundle.bytes_per_token < 1
    else:
        assert len(bundle.tokenizer) == summary["vocab_size"] == 300
        assert bundle.bytes_per_token > 1.3


def test_the_same_configuration_gives_the_same_samples(folder):
    config = DataConfig(source=str(folder), tokenizer="bpe", bpe_vocab_size=300, block_size=32)
    first, second = build_data(config, 64), build_data(config, 64)
    assert first.summary == second.summary
    assert all(torch.equal(first.train[i]["input_ids"], second.train[i]["input_ids"]) for i in range(64))


def test_a_saved_tokenizer(folder, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    config = DataConfig(source=str(folder), tokenizer=str(tmp_path / "saved"), block_size=32)
    saved, byte = build_data(config, 8), build_data(dataclasses.replace(config, tokenizer="byte"), 8)
    assert all(torch.equal(saved.train[i]["input_ids"], byte.train[i]["input_ids"]) for i in range(8))


def test_stdlib_is_the_default_and_quick_to_encode():
    bundle = build_data(DataConfig(), num_train_samples=10)
    assert bundle.summary["source"] == "stdlib"
    assert bundle.summary["python_version"]
    assert len(bundle.validation) == 512
    assert bundle.summary["train_tokens"] == bundle.summary["train_bytes"] + bundle.summary["train_documents"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_streamed_source(tmp_path, prose, tokenizer):
    texts = [prose(50, seed=i) for i in range(30)]
    rows = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    config = DataConfig(
        source=f"hf:{tmp_path}",
        tokenizer=tokenizer,
        bpe_vocab_size=300,
        text_column="body",
        block_size=16,
        num_held_out=10,
        max_validation_blocks=20,
        shuffle_blocks=4,
    )
    bundle = build_data(config, num_train_samples=12)
    samples = list(bundle.train)
    assert len(samples) == 12
    trained_on = "".join(texts[10:])
    for sample in samples:  # never from the rows held out; a block may begin and end inside a character
        block = bundle.tokenizer.decode(sample["input_ids"]).strip("\ufffd").split("<|endoftext|>")[0]
        assert block in trained_on
    assert len(bundle.validation) == 20
    assert texts[0].startswith(decoded(bundle, bundle.validation, 1).strip("\ufffd"))
    json.dumps(bundle.summary)


def test_too_short_text_is_refused_with_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(ValueError, match=r"validation text has 11 tokens.*block_size 64.*at most 11"):
        build_data(DataConfig(source=str(tmp_path / "a.txt"), block_size=64), 10)
    with pytest.raises(ValueError, match=r"training text has 91 tokens.*block_size 128"):
        build_data(DataConfig(source=str(tmp_path / "a.txt"), block_size=128), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "source must not be empty"),
        ({"block_size": 1}, "at least 2"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"validation_fraction": 0.0}, r"in \(0, 0\.5\], got 0\.0"),
        ({"validation_fraction": 0.6}, r"got 0\.6"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"seed": -1}, "seed"),
        ({"source": "hf:name", "max_bytes": 10}, "no effect"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.step


def run_trainer(bundle, folder, stop_at=None, resume=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, named: seen.append(named["input_ids"]), with_kwargs=True)
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=bundle.train,
        data_collator=default_data_collator,
        callbacks=[StopAt(stop_at)] if stop_at else None,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return torch.cat(seen)


@pytest.mark.parametrize("streamed", [False, True], ids=["packed", "streamed"])
def test_the_trainer_gets_every_sample_in_order_and_resumes(tmp_path, prose, streamed):
    (tmp_path / "data").mkdir()
    if streamed:
        rows = "".join(json.dumps({"text": prose(60, seed=i)}) + "\n" for i in range(20))
        (tmp_path / "data" / "train.jsonl").write_text(rows, encoding="utf-8")
        config = DataConfig(source=f"hf:{tmp_path / 'data'}", block_size=16, num_held_out=5, shuffle_blocks=8)
    else:
        (tmp_path / "data" / "a.txt").write_text(prose(300), encoding="utf-8")
        config = DataConfig(source=str(tmp_path / "data" / "a.txt"), block_size=16)
    bundle = build_data(config, num_train_samples=24)
    expected = torch.stack([sample["input_ids"] for sample in bundle.train])
    assert torch.equal(run_trainer(bundle, tmp_path / "whole"), expected)
    assert torch.equal(run_trainer(bundle, tmp_path / "run", stop_at=4), expected[:16])
    assert torch.equal(run_trainer(bundle, tmp_path / "run", resume=True), expected[16:])
