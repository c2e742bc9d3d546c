"""TRL's trainers on Hope: supervised fine-tuning, preferences, rewards."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.models.hope import HopeForSequenceClassification
from nested_learning.training.data import byte_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

TEXTS = [
    f"{word} and {word} again. " * count for count, word in enumerate(["one", "two", "three", "four"], 1)
]
PREFERENCES = {
    "prompt": ["one ", "two ", "three ", "four "],
    "chosen": ["is good", "is good too", "good", "a good one"],
    "rejected": ["bad", "is worse than that", "no", "never"],
}


class Gradients(TrainerCallback):
    """Whether each parameter has had a gradient other than zero, and all were finite."""

    def __init__(self) -> None:
        self.finite, self.seen, self.names = True, set(), set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.names.add(name)
                if parameter.grad is not None:
                    self.finite &= bool(parameter.grad.isfinite().all())
                    if parameter.grad.any():
                        self.seen.add(name)


def model_of(mixers: list[str], **options) -> HopeForCausalLM:
    """Float32, with the special tokens of the byte tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=len(mixers),
        num_heads=2,
        mixer=mixers,
        mixer_options={name: {"chunk_size": 4} for name in mixers if name != "attention"},
        cms_expansion=2.0,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
        **options,
    )
    return HopeForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("saved"))
    model_of(["titans", "attention"]).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def options(folder, **more) -> dict:
    """Arguments that all configurations of TRL take."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
        **more,
    }


def run(trainer) -> list[dict]:
    """Logs of all steps of a training in which every trainable parameter gets finite gradients."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    assert gradients.finite
    assert gradients.names == gradients.seen
    return [log for log in trainer.state.log_history if "grad_norm" in log]


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor([[*text.encode(), byte_tokenizer().eos_token_id]])


def mean_loss(model: HopeForCausalLM, rows: list[torch.Tensor]) -> torch.Tensor:
    """Mean loss per predicted token of rows that are read one by one."""
    total = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows)
    return total / sum(row.shape[1] - 1 for row in rows)


@pytest.mark.parametrize("mixers", [["self_modifying_titans", "gated_deltanet"], ["titans", "attention"]])
def test_supervised_fine_tuning(mixers, tmp_path):
    """The first loss is the model's own, the losses fall, and nothing is left out."""
    model = model_of(mixers)
    expected = mean_loss(model, [tokens_of(text) for text in TEXTS]).item()
    arguments = trl.SFTConfig(**options(tmp_path, max_length=None))
    logs = run(trl.SFTTrainer(model, arguments, train_dataset=texts(), processing_class=byte_tokenizer()))
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]


def test_a_path_is_as_good_as_a_model(folder, tmp_path):
    by_path = run(trl.SFTTrainer(folder, trl.SFTConfig(**options(tmp_path)), train_dataset=texts()))
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**options(tmp_path)), train_dataset=texts(), processing_class=byte_tokenizer()
    )
    assert [log["loss"] for log in by_path] == [log["loss"] for log in run(trainer)]


def test_conversations_by_the_template_of_the_byte_tokenizer(folder, tmp_path):
    """Only the answers are learned from where that is asked for."""
    rows = [
        [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]
        for word in ("yes", "no", "perhaps", "never")
    ]
    arguments = trl.SFTConfig(**options(tmp_path, assistant_only_loss=True))
    trainer = trl.SFTTrainer(folder, arguments, train_dataset=Dataset.from_dict({"messages": rows}))
    labels = [row for batch in trainer.get_train_dataloader() for row in batch["labels"].tolist()]
    learned = sorted(bytes(i for i in row if 0 <= i < 256).decode() for row in labels)
    assert learned == [" never", " no", " perhaps", " yes"]
    logs = run(trainer)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]


def test_label_smoothing(folder, tmp_path):
    """As good as nothing of it is the plain loss."""
    losses = []
    for epsilon in (0.0, 1e-6):
        arguments = trl.SFTConfig(**options(tmp_path, label_smoothing_factor=epsilon))
        losses.append([log["loss"] for log in run(trl.SFTTrainer(folder, arguments, train_dataset=texts()))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_cms_that_learns_from_the_next_token(tmp_path):
    """TRL runs the model without its head and multiplies by the head's weights itself."""
    levels = [{"chunk_size": 4}, {"chunk_size": 8}]
    model = model_of(["attention"], cms_update="lm", cms_levels=levels)
    expected = mean_loss(model, [tokens_of(text) for text in TEXTS]).item()
    arguments = trl.SFTConfig(**options(tmp_path, max_length=None, max_steps=1))
    trainer = trl.SFTTrainer(model, arguments, train_dataset=texts(), processing_class=byte_tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_an_adapter(tmp_path):
    """LoRA on attention: the adapter alone is trained."""
    peft = pytest.importorskip("peft")
    model = model_of(["attention", "attention"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**options(tmp_path, max_steps=12, learning_rate=5e-2)),
        train_dataset=texts(),
        processing_class=byte_tokenizer(),
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj", "out_proj"], task_type="CAUSAL_LM"),
    )
    logs = run(trainer)
    assert logs[-1]["loss"] < 0.95 * logs[0]["loss"]
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if "lora" not in name
    }
    assert all(torch.equal(base[name], parameter) for name, parameter in before.items())


def test_preferences(folder, tmp_path):
    """DPO by path, with the saved model as the reference: ln 2 at the start, and the chosen answers win."""
    arguments = trl.DPOConfig(**options(tmp_path, max_steps=8))
    trainer = trl.DPOTrainer(folder, args=arguments, train_dataset=Dataset.from_dict(PREFERENCES))
    logs = run(trainer)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert logs[-1]["loss"] < 0.3
    assert logs[-1]["rewards/margins"] > 1.0


def test_preferences_with_a_model_of_a_reference(folder, tmp_path):
    """A model object and no reference: TRL loads the reference from where the model came from."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=byte_tokenizer(),
    )
    logs = run(trainer)
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logs[-1]["loss"] < 0.5


def test_single_opinions(folder, tmp_path):
    """KTO: 1/2 at the start, where the policy is the reference, and less later."""
    rows = {
        "prompt": PREFERENCES["prompt"],
        "completion": ["is good", "is worse than that", "good", "never"],
        "label": [True, False, True, False],
    }
    arguments = trl.KTOConfig(**options(tmp_path, max_steps=8))
    trainer = trl.KTOTrainer(
        folder, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=byte_tokenizer()
    )
    logs = run(trainer)
    assert logs[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert logs[-1]["loss"] < 0.4


def test_a_model_of_rewards(folder, tmp_path):
    """The first loss is that of texts read one by one, and what was chosen comes to score more."""
    pairs = Dataset.from_dict(PREFERENCES)
    arguments = trl.RewardConfig(**options(tmp_path / "run", max_steps=8))
    trainer = trl.RewardTrainer(folder, arguments, train_dataset=pairs, processing_class=byte_tokenizer())
    assert isinstance(trainer.model, HopeForSequenceClassification)
    with torch.no_grad():
        margins = [
            trainer.model(tokens_of(row["prompt"] + row["chosen"])).logits
            - trainer.model(tokens_of(row["prompt"] + row["rejected"])).logits
            for row in pairs
        ]
    logs = run(trainer)
    expected = -torch.nn.functional.logsigmoid(torch.cat(margins)).mean().item()
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    text = tokens_of("two is good")
    torch.testing.assert_close(again(text).logits, trainer.model.eval()(text).logits)


@pytest.mark.parametrize("way", ["GRPO", "RLOO"])
def test_rewards(way, folder, tmp_path):
    """With the share of bytes below 64 as the reward, the answers come to have more of them."""

    def reward(completion_ids, **kwargs) -> list[float]:
        return [sum(token < 64 for token in ids) / len(ids) for ids in completion_ids]

    arguments = getattr(trl, f"{way}Config")(
        **options(tmp_path, max_steps=16, per_device_train_batch_size=16, learning_rate=2e-2),
        num_generations=8,
        max_completion_length=6,
    )
    prompts = Dataset.from_dict({"prompt": ["one ", "two and ", "three ", "4"]})
    trainer = getattr(trl, f"{way}Trainer")(
        folder, args=arguments, train_dataset=prompts, reward_funcs=reward
    )
    logs = run(trainer)
    rewards = [log["reward"] for log in logs]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({}, id="padded"),
        pytest.param({"packing": True, "packing_strategy": "bfd", "max_length": 256}, id="bfd"),
        pytest.param({"padding_free": True, "max_length": None}, id="padding_free"),
    ],
)
@pytest.mark.parametrize("mixers", [["titans", "attention"], ["gated_deltanet", "self_modifying_titans"]])
def test_texts_in_one_row_are_as_in_rows_of_their_own(way, mixers, tmp_path):
    """The loss and every gradient are equal to those of separate rows."""
    model = model_of(mixers)
    loss = mean_loss(model, [tokens_of(text) for text in TEXTS])
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    arguments = trl.SFTConfig(**options(tmp_path, max_steps=1, **way))
    trainer = trl.SFTTrainer(model, arguments, train_dataset=texts(), processing_class=byte_tokenizer())
    (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    if way:
        assert list(batch["input_ids"].shape) == [1, sum(len(text) + 1 for text in TEXTS)]
    got = trainer.compute_loss(model, batch, num_items_in_batch=count)
    got.backward()
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
