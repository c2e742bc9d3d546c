"""Hope with heads for labels: transformers' generic classes over HopeModel."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nested_learning.models.hope import HopeForSequenceClassification, HopeForTokenClassification
from nested_learning.training.data.tokenizers import byte_tokenizer
from tests.models.small_models import CASES, small_config, small_model

PAD = 30
AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "answer": AutoModelForQuestionAnswering,
}


def classifier(kind, mixers, **fields):
    torch.manual_seed(0)
    config = small_config(mixers, pad_token_id=PAD, num_labels=3, **fields)
    return AUTO[kind].from_config(config).double().eval()


@pytest.fixture
def rows():
    """Texts of 6, 9 and 4 tokens, none of them padding."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, PAD, (n,), generator=generator) for n in (6, 9, 4)]


def padded(rows, side):
    """Ids and mask [3, 9]."""
    batch = []
    for row in rows:
        missing = 9 - len(row)
        batch.append(F.pad(row, (missing, 0) if side == "left" else (0, missing), value=PAD))
    ids = torch.stack(batch)
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("case", "update"),
    [*((case, "none") for case in CASES), ("attention", "regression"), ("attention", "lm")],
)
def test_padding_on_either_side_changes_no_text(case, rows, side, update):
    model = classifier("sequence", CASES[case], cms_update=update)
    assert isinstance(model, HopeForSequenceClassification)
    ids, mask = padded(rows, side)
    got = model(ids, attention_mask=mask).logits
    for row, tokens in enumerate(rows):
        alone = model(tokens[None])
        torch.testing.assert_close(got[row], alone.logits[0], rtol=0, atol=1e-11)
        # The oracle: the head on the last output of the base model.
        last = model.model(tokens[None]).last_hidden_state[:, -1]
        torch.testing.assert_close(alone.logits, last @ model.score.weight.T)
    assert not torch.allclose(got[0], got[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_classified_alike_in_a_padded_batch(mixers, rows, side):
    model = classifier("token", mixers)
    assert isinstance(model, HopeForTokenClassification)
    ids, mask = padded(rows, side)
    got = model(ids, attention_mask=mask).logits
    for row, tokens in enumerate(rows):
        alone = model(tokens[None]).logits[0]
        torch.testing.assert_close(got[row, mask[row].bool()], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", AUTO)
def test_saved_and_loaded(tmp_path, rows, kind):
    model = classifier(kind, CASES["titans"], cms_update="regression").float()
    model.save_pretrained(tmp_path)
    loaded = AUTO[kind].from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    ids, mask = padded(rows, "left")
    assert torch.equal(loaded(ids, attention_mask=mask)[0], model(ids, attention_mask=mask)[0])


def test_a_language_model_becomes_a_classifier(tmp_path):
    base = small_model(CASES["titans"]).float()
    base.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    for name, value in base.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value)
    assert model.score.weight.shape == (5, 16)


def test_losses(rows):
    ids, mask = padded(rows, "left")
    model = classifier("sequence", ["attention"])
    labels = torch.tensor([2, 0, 1])
    out = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    token = classifier("token", ["attention"])
    labels = torch.randint(0, 3, (3, 9)).masked_fill(mask == 0, -100)
    out = token(ids, attention_mask=mask, labels=labels)
    expected = F.cross_entropy(out.logits[mask.bool()].float(), labels[mask.bool()])
    torch.testing.assert_close(out.loss.float(), expected)


def test_a_batch_without_a_padding_id_is_refused(rows):
    model = AutoModelForSequenceClassification.from_config(small_config(["attention"])).eval()
    assert model(rows[0][None]).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(torch.stack([rows[0], rows[0]]))


def test_updates_from_the_next_token_need_a_head_for_tokens(rows):
    model = classifier("sequence", ["attention"], cms_update="lm", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"no head.*tie_word_embeddings"):
        model(rows[0][None])


class _Texts(torch.utils.data.Dataset):
    """Sixteen texts of one length; the label says whether the last token is in the upper half."""

    def __init__(self):
        self.ids = torch.randint(0, PAD, (16, 8), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return 16

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": int(self.ids[row, -1] >= PAD // 2)}


def _train(tmp_path, rows, steps, **arguments):
    torch.manual_seed(0)
    config = small_config(["attention"], pad_token_id=PAD, num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config).double()
    given = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=steps,
        max_grad_norm=1e9,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = Trainer(model, given, train_dataset=_Texts(), eval_dataset=_Texts())
    trainer.train()
    return trainer


def test_the_trainer_fits_labels(tmp_path):
    trainer = _train(tmp_path, 16, 1, max_steps=15, learning_rate=1e-1)
    assert trainer.evaluate()["eval_loss"] < 0.3


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5}
    whole, parts = (_train(tmp_path, rows, 16 // rows, **options).model for rows in (16, 4))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_in_a_pipeline():
    tokenizer = byte_tokenizer()
    config = small_config(["attention"], vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    texts = ["short", "a longer text"]
    together = classify(texts, batch_size=2)
    for text, result in zip(texts, together, strict=True):
        alone = classify(text)[0]
        assert result["label"] == alone["label"]
        assert result["score"] == pytest.approx(alone["score"], abs=1e-6)
