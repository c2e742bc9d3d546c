"""Where transformers goes by lists of names, Hope is treated as its own models are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments, pipeline
from transformers.modelcard import TrainingSummary
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pipelines import base
from transformers.utils.generic import can_return_loss, find_labels

from nested_learning import HopeForCausalLM
from nested_learning.training.data import byte_tokenizer
from tests.models.small_models import VOCAB, small_config


class Renamed(HopeForCausalLM):
    """Subclass of a user, whose name says nothing."""


CLASSES = [HopeForCausalLM, Renamed]


def model_of(cls: type[HopeForCausalLM]) -> HopeForCausalLM:
    torch.manual_seed(0)
    return cls(small_config(["titans", "attention"])).double()


@pytest.fixture
def rows() -> list[dict[str, torch.Tensor]]:
    """Four rows of 13 ids, with labels of which some do not count."""
    ids = torch.randint(0, VOCAB, (4, 13), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[1, 3:] = -100
    labels[2, :5] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def trainer(model: HopeForCausalLM, folder, rows, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def smoothed(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Sum over the labels that count of −(1 − ε) log p(label) − ε · mean over the vocabulary of log p."""
    log_p = F.log_softmax(logits[:, :-1], dim=-1)
    targets = labels[:, 1:]
    per_token = -(1 - epsilon) * log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    per_token = per_token - epsilon * log_p.mean(-1)
    return per_token[targets != -100].sum()


@pytest.mark.parametrize("cls", CLASSES)
def test_label_smoothing_predicts_the_next_token(cls, rows, tmp_path):
    model = model_of(cls)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    plain = model(**batch).loss
    count = (batch["labels"][:, 1:] != -100).sum()
    for epsilon, expected, tolerance in (
        (1e-9, plain, 1e-7),
        (0.1, smoothed(model(**batch).logits, batch["labels"], 0.1) / count, 1e-6),
    ):
        learner = trainer(model, tmp_path, rows, label_smoothing_factor=epsilon)
        got = learner.compute_loss(model, dict(batch), num_items_in_batch=count)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=0, check_dtype=False)


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2)])
def test_a_training_step_with_label_smoothing(rows, tmp_path, size, steps):
    """Trainer's step is plain descent on the formula, whatever the accumulation."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    expected = model_of(Renamed)
    count = (batch["labels"][:, 1:] != -100).sum()
    (smoothed(expected(input_ids=batch["input_ids"]).logits, batch["labels"], 0.2) / count).backward()
    torch.optim.SGD(expected.parameters(), lr=0.5).step()
    model = model_of(Renamed)
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    trainer(model, tmp_path, rows, label_smoothing_factor=0.2, **options).train()
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("cls", CLASSES)
def test_labels_are_counted_as_the_loss_counts_them(cls, rows, tmp_path):
    """Trainer leaves out a row's first label where it knows that the loss does: num_items_in_batch fits."""
    model = model_of(cls)
    learner = trainer(model, tmp_path, rows, per_device_train_batch_size=4)
    (batch,), count = learner.get_batch_samples(iter(learner.get_train_dataloader()), 1, torch.device("cpu"))
    assert int(count) == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, model(**batch).loss)


def test_evaluation_reports_the_models_loss(rows, tmp_path):
    """Trainer takes every argument with "label" in its name for one that a batch has to have."""
    assert find_labels(HopeForCausalLM) == ["labels"]
    assert not can_return_loss(HopeForCausalLM)
    model = model_of(HopeForCausalLM)
    metrics = trainer(model, tmp_path, rows, per_device_eval_batch_size=4).evaluate()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_pipelines_and_model_cards_know_the_model(cls, rows, tmp_path, monkeypatch):
    complaints: list[str] = []
    monkeypatch.setattr(base.logger, "error", complaints.append)
    model = model_of(cls)
    pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    assert not complaints
    assert TrainingSummary.from_trainer(trainer(model, tmp_path, rows)).tasks == "text-generation"


def test_the_list_has_each_name_once_and_the_model_type():
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hope"] == "HopeForCausalLM"  # what lm-eval asks
    # FSDP2's `fully_shard` gives a model a new class in this way.
    sharded = type("FSDPHopeForCausalLM", (FSDPModule, HopeForCausalLM), {})
    names = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert [names.count(cls.__name__) for cls in [*CLASSES, sharded]] == [1, 1, 1]
