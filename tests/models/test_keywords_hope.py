"""Keywords that callers of any transformers model pass, and the loss that some of them change."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from nested_learning.training.data.tokenizers import byte_tokenizer
from tests.models.small_models import CASES, VOCAB, small_model

EXACT = {"rtol": 0, "atol": 1e-11}


def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


# Keywords ---------------------------------------------------------------------------------------------------


def test_what_changes_nothing_is_taken(model, ids):
    given = {
        "cache_position": torch.arange(13),
        "is_causal": True,
        "output_attentions": False,
        "output_router_logits": False,
        "token_type_ids": None,
        "encoder_attention_mask": None,
        "some_other_models_own": 3,
    }
    assert torch.equal(logits_of(model, ids, **given), logits_of(model, ids))
    for name in ("last_hidden_state", "logits"):
        module = model.model if name == "last_hidden_state" else model
        out = module(ids, **given, return_dict=False)
        assert torch.equal(out[0], getattr(module(ids), name))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_attentions", True, "output_attentions"),
        ("token_type_ids", torch.ones(3, 13), "no token types"),
        ("is_causal", False, "from left to right"),
        ("encoder_hidden_states", torch.ones(3, 2, 16), "no cross-attention"),
        ("seq_idx", torch.zeros(3, 13), "seq_idx must be an integer tensor"),
        ("cu_seq_lens_q", torch.tensor([0, 13]), "cut one row into documents, but there are 3"),
    ],
)
def test_what_would_change_another_model_is_refused(ids, name, value, message):
    model = small_model(["attention"])
    for module in (model, model.model):
        with pytest.raises(ValueError, match=message):
            module(ids, **{name: value})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("atention_mask", "attention_mask"),
        ("past_key_value", "past_key_values"),
        ("input_embeds", "inputs_embeds"),
        ("label", "labels"),
        ("num_logits_to_keep", "logits_to_keep"),
    ],
)
def test_typos_are_noticed(ids, typo, meant):
    model = small_model(["attention"])
    with pytest.raises(TypeError, match=f"'{typo}'; did you mean '{meant}'"):
        model(ids, **{typo: torch.ones(3, 13)})


def test_positions_that_count_the_tokens_change_nothing(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 9:] = 0
    real = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits_of(model, ids, attention_mask=mask)
    for fill in (0, 1):
        positions = real.masked_fill(mask == 0, fill)
        got = logits_of(model, ids, attention_mask=mask, position_ids=positions)
        assert torch.equal(got, expected)
    whole = logits_of(model, ids)
    columns = torch.arange(13)[None]
    for positions in (columns, columns.expand(3, -1), columns + 7):
        assert torch.equal(logits_of(model, ids, position_ids=positions), whole)
    cache, parts = None, []
    for piece, positions in zip(ids.split([5, 1, 7], 1), columns.split([5, 1, 7], 1), strict=True):
        out = model(piece, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


def test_positions_that_jump_are_refused(ids):
    model = small_model(["attention"])
    jumping = torch.cat([torch.arange(6), torch.arange(3, 10)])[None]
    with pytest.raises(ValueError, match="start a document at 0"):
        model(ids, position_ids=jumping)
    with pytest.raises(ValueError, match=r"\[batch, tokens\] = \[3, 13\], got \[3, 12\]"):
        model(ids, position_ids=torch.arange(12).expand(3, -1))


@pytest.mark.parametrize("padded", [False, True])
def test_generating_with_positions(model, ids, padded):
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, position_ids=positions), expected)
    assert torch.equal(
        model.generate(ids, **options, position_ids=positions, use_cache=False, num_beams=1), expected
    )


def test_stop_strings_need_the_tokenizer_and_get_it():
    model = small_model(CASES["titans"], vocab_size=258)
    tokenizer = byte_tokenizer()
    ids = tokenizer("Hope", return_tensors="pt").input_ids
    free = model.generate(ids, max_new_tokens=12, do_sample=True)[0, 4:]
    assert len(free) == 12
    # Force the continuation, so that the string comes for certain.
    forced = iter(tokenizer("xy. and on").input_ids)

    def force(_, scores):
        wanted = torch.full_like(scores, -torch.inf)
        wanted[:, next(forced)] = 0
        return wanted

    got = model.generate(
        ids, max_new_tokens=10, stop_strings=["."], tokenizer=tokenizer, logits_processor=[force]
    )
    assert tokenizer.decode(got[0]) == "Hopexy."


# Losses -----------------------------------------------------------------------------------------------------


def test_labels_that_are_shifted_already(model, ids):
    labels = ids.clone()
    labels[0, :6] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=labels).loss
    for other in (labels, None, (labels + 1) % VOCAB):
        torch.testing.assert_close(model(ids, labels=other, shift_labels=shifted).loss, expected, **EXACT)
    # The last column has a label here, as where a row goes on elsewhere.
    assert find_labels(type(model)) == ["labels"]  # what Trainer's evaluation asks of a dataset
    logits = logits_of(model, ids)
    nll = -logits.log_softmax(-1).gather(2, ids[..., None]).sum()
    got = model(ids, shift_labels=ids, num_items_in_batch=50).loss
    torch.testing.assert_close(got, nll / 50, **EXACT)
    with pytest.raises(ValueError, match="`shift_labels` not at all"):
        model(ids, shift_labels=ids[:, :-1])
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, shift_labels=ids, logits_to_keep=1)


class _Rows(torch.utils.data.Dataset):
    """Eight rows whose numbers of labels differ."""

    def __init__(self, vocabulary):
        self.ids = torch.randint(0, vocabulary, (8, 12), generator=torch.Generator().manual_seed(0))
        self.labels = self.ids.clone()
        for row in range(8):
            self.labels[row, : row + 2] = -100

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"input_ids": self.ids[row], "labels": self.labels[row]}


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    """The Trainer gives the number of labels of all its small batches, so that their losses add up to one."""
    weights = []
    for rows, steps in ((8, 1), (2, 4)):
        model = small_model(["attention"]).train()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=1e9,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=_Rows(VOCAB)).train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert not torch.equal(weights[0][0], next(small_model(["attention"]).parameters()))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
