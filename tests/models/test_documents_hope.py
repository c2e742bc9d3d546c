"""Documents in a row, as callers of transformers say where they begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from nested_learning import HopeForCausalLM
from tests.models.small_models import VOCAB, small_model

LENGTHS = [5, 1, 7, 3]
MIXERS = {
    "self-modifying": ["self_modifying_titans", "self_modifying_titans"],
    "titans": ["titans", "gated_deltanet"],
    "attention": ["attention", "attention"],
    "hybrid": ["titans", "attention"],
    "mac": ["mac", "mag"],
    "mal": ["mal", "sliding_window_attention"],
}
CMS: dict[str, dict[str, Any]] = {
    "static": {},
    "regression": {"cms_update": "regression", "cms_levels": [{"chunk_size": 2}, {"chunk_size": 4}]},
    "lm": {"cms_update": "lm", "cms_levels": [{"chunk_size": 2}, {"chunk_size": 4}]},
}


def documents(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (1, n), generator=draw) for n in LENGTHS]


def starts() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


def positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def numbers() -> Tensor:
    return torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]


WAYS: dict[str, dict[str, Any]] = {
    "position_ids": {"position_ids": positions()},
    "seq_idx": {"seq_idx": numbers().int()},
    "cu_seq_lens": {"cu_seq_lens_q": starts().int(), "cu_seq_lens_k": starts().int(), "max_length_q": 7},
    "all": {"position_ids": positions(), "seq_idx": numbers(), "cu_seq_lens_k": starts(), "max_length_k": 7},
}


@pytest.mark.parametrize("cms", list(CMS))
@pytest.mark.parametrize("mixers", list(MIXERS))
def test_logits_gradients_and_cache_are_those_of_separate_rows(mixers: str, cms: str) -> None:
    model = small_model(MIXERS[mixers], **CMS[cms]).train()
    parts = documents()
    packed = torch.cat(parts, 1)
    weight = torch.randn(1, packed.shape[1], VOCAB, dtype=torch.float64)
    parameters = list(model.parameters())
    out = model(packed, use_cache=True, **WAYS["position_ids"])
    alone = [model(part, use_cache=True) for part in parts]
    wanted = torch.cat([a.logits for a in alone], 1)
    torch.testing.assert_close(out.logits, wanted, rtol=0, atol=1e-10)
    grads = [
        torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
        for logits in (out.logits, wanted)
    ]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10)
    following = packed[:, :4]
    model.eval()
    with torch.no_grad():
        after = model(following, past_key_values=out.past_key_values).logits
        expected = model(following, past_key_values=alone[-1].past_key_values).logits
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_to_say_it(way: str) -> None:
    model = small_model(MIXERS["hybrid"])
    packed = torch.cat(documents(), 1)
    wanted = torch.cat([model(part).logits for part in documents()], 1)
    torch.testing.assert_close(model(packed, **WAYS[way]).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixers", list(MIXERS))
@pytest.mark.parametrize("cms", list(CMS))
def test_torchs_default_device_changes_nothing(mixers: str, cms: str) -> None:
    model, ids = small_model(MIXERS[mixers], **CMS[cms]), torch.cat(documents(), dim=1)
    number, mask = numbers().repeat(3, 1), torch.ones(3, ids.shape[1], dtype=torch.long)
    given = {"input_ids": ids.repeat(3, 1), "seq_idx": number, "attention_mask": mask}
    mask[1, :2] = mask[2] = 0
    with torch.no_grad():
        first, second = (model(**given, use_cache=True) for _ in range(2))
        wanted = model(**given, past_key_values=first.past_key_values).logits
        with torch.device("meta"):  # stands for any that is not the model's
            assert torch.equal(model(**given).logits, first.logits)
            got = model(**given, past_key_values=second.past_key_values).logits
    assert torch.equal(got, wanted)


def test_positions_of_one_document_change_nothing() -> None:
    model = small_model(MIXERS["hybrid"])
    ids = torch.randint(VOCAB, (2, 9))
    plain = model(ids, use_cache=True)
    counted = model(ids, position_ids=torch.arange(9)[None], use_cache=True)
    assert torch.equal(plain.logits, counted.logits)
    further = torch.arange(9, 13)[None]
    a = model(ids[:, :4], past_key_values=plain.past_key_values).logits
    b = model(ids[:, :4], past_key_values=counted.past_key_values, position_ids=further).logits
    assert torch.equal(a, b)


@pytest.mark.parametrize("mixers", ["self-modifying", "hybrid", "mac"])
def test_a_stream_is_read_block_by_block(mixers: str) -> None:
    """Rows whose first token is not at position 0 go on with the cache, those at 0 start anew."""
    model = small_model(MIXERS[mixers])
    ids = torch.randint(VOCAB, (2, 12))
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]])
    whole = model(ids, position_ids=position_ids).logits
    cache, blocks = None, []
    for columns in (slice(0, 6), slice(6, 7), slice(7, 12)):
        out = model(
            ids[:, columns], position_ids=position_ids[:, columns], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        blocks.append(out.logits)
    torch.testing.assert_close(torch.cat(blocks, 1), whole, rtol=0, atol=1e-10)


def test_documents_with_padding_and_segments() -> None:
    model = small_model(MIXERS["hybrid"], segment_size=4)
    parts = documents()
    left, right = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    ids = torch.cat([left, *parts, right], 1)
    mask = torch.cat([left, torch.ones_like(positions()), right], 1)
    position_ids = torch.cat([left + 1, positions(), right], 1)
    wanted = torch.cat([model(part).logits for part in parts], 1)
    got = model(ids, attention_mask=mask, position_ids=position_ids, output_hidden_states=True)
    torch.testing.assert_close(got.logits[:, 2:-3], wanted, rtol=0, atol=1e-10)
    assert got.hidden_states is not None
    assert got.hidden_states[1].shape[:2] == ids.shape


def test_surprise_is_that_of_separate_rows() -> None:
    model = small_model(MIXERS["titans"])
    got = model(torch.cat(documents(), 1), output_surprise=True, **WAYS["seq_idx"]).surprise
    wanted = [model(part, output_surprise=True).surprise for part in documents()]
    for layer, surprise in enumerate(got):
        torch.testing.assert_close(surprise, torch.cat([w[layer] for w in wanted], 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixers", list(MIXERS))
def test_other_tokens_of_a_document_change_no_bit_of_the_next(mixers: str) -> None:
    model = small_model(MIXERS[mixers]).float()
    results = []
    for seed in (0, 1):
        ids = torch.cat([*documents(seed)[:2], *documents(0)[2:]], 1)
        x = model.model.embed_tokens(ids).detach().requires_grad_()
        out = model(inputs_embeds=x, use_cache=True, **WAYS["position_ids"])
        (g,) = torch.autograd.grad(out.logits[:, 6:].square().sum(), x)
        states = [t for state in out.past_key_values.states.values() for t in state.tensors()]
        assert torch.count_nonzero(g[:, :6]) == 0
        results.append([out.logits[:, 6:], g[:, 6:], *states])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_disagreement_is_refused() -> None:
    model = small_model(MIXERS["hybrid"])
    packed = torch.cat(documents(), 1)
    with pytest.raises(ValueError, match="disagree"):
        model(packed, position_ids=positions(), seq_idx=torch.zeros_like(numbers()))
    with pytest.raises(ValueError, match="disagree"):
        model(packed, cu_seq_lens_q=starts(), cu_seq_lens_k=starts()[[0, 2, 3, 4]])


class Rows(Dataset[dict[str, list[int]]]):
    """The documents, one an item."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = documents()[index][0].tolist()
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_trainer_with_a_flattening_collator(options: dict[str, bool], tmp_path: Any) -> None:
    """transformers' own: the loss of a step is that of the documents in rows of their own."""
    model = small_model(MIXERS["hybrid"]).train()
    total = sum(float(model(part, labels=part).loss.detach()) * (part.shape[1] - 1) for part in documents())
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        use_cpu=True, remove_unused_columns=False, train_sampling_strategy="sequential", disable_tqdm=True,
        learning_rate=0.0,
    )  # fmt: skip
    trainer = Trainer(model, args, DataCollatorWithFlattening(**options), Rows())
    loss = trainer.train().training_loss
    assert isinstance(model, HopeForCausalLM)
    assert loss == pytest.approx(total / (sum(LENGTHS) - len(LENGTHS)), abs=1e-6)


@pytest.mark.slow  # torch.compile takes 20 seconds
def test_compiled_models_read_documents_and_exported_programs_refuse_them() -> None:
    model = small_model(MIXERS["hybrid"])
    packed = torch.cat(documents(), 1)
    with torch.no_grad():
        wanted = model(packed, **WAYS["position_ids"]).logits
        got = torch.compile(model, backend="eager")(packed, **WAYS["position_ids"]).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        with pytest.raises(Exception, match=r"which a program of torch\.export cannot follow"):
            torch.export.export(model, (packed,), WAYS["position_ids"] | {"use_cache": False}, strict=False)
