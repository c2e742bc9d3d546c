"""`generate` from rows of several documents, and with a mask of what is learned from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nested_learning import HopeCache, HopeForCausalLM
from tests.models.small_models import VOCAB, small_model

NEW = 5
MIXERS = {"memories": ["self_modifying_titans", "titans"], "hybrid": ["titans", "attention"]}
LEARNS: dict[str, Any] = {
    "cms_update": "regression",
    "cms_levels": [{"chunk_size": 2}, {"chunk_size": 4}],
}
FIRST, SECOND = 6, 5  # tokens of a row's two documents
SEQ_IDX = torch.tensor([[0] * FIRST + [1] * SECOND])
POSITIONS = torch.tensor([[*range(FIRST), *range(SECOND)]])
ENDS = torch.tensor([0, FIRST, FIRST + SECOND])
WAYS: dict[str, dict[str, Any]] = {
    "seq_idx": {"seq_idx": SEQ_IDX},
    "position_ids": {"position_ids": POSITIONS},
    "cu_seq_lens": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS},
    "one of the ends": {"cu_seq_lens_k": ENDS},
    "all": {"seq_idx": SEQ_IDX, "position_ids": POSITIONS, "cu_seq_lens_q": ENDS},
}
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 4},
    "chunks that end with a document": {"prefill_chunk_size": FIRST},
    "guesses": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(params=list(MIXERS))
def model(request: pytest.FixtureRequest) -> HopeForCausalLM:
    return small_model(MIXERS[request.param]).eval()


def tokens(rows: int = 1, length: int = FIRST + SECOND, seed: int = 0) -> Tensor:
    drawn = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    drawn[:, -2:] = drawn[:, -5:-3]  # something to look up
    return drawn


def continued(model: HopeForCausalLM, ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The new tokens and the logits that they were chosen by."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, **options, **kwargs)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1].float(), wanted[1].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("way", list(WAYS))
def test_what_is_generated_goes_on_with_the_last_document(model: HopeForCausalLM, way: str, how: str) -> None:
    ids = tokens()
    wanted = continued(model, ids[:, FIRST:], **HOW[how])
    assert_same(continued(model, ids, **WAYS[way], **HOW[how]), wanted)
    others = continued(model, ids, **HOW[how])
    assert not torch.allclose(others[1][:, 0], wanted[1][:, 0], atol=1e-4)  # the documents are seen at all


@pytest.mark.parametrize("how", ["greedy", "no cache", "beams", "chunks"])
def test_padded_rows_with_documents_of_their_own(model: HopeForCausalLM, how: str) -> None:
    ids = tokens(rows=2)
    seq_idx = torch.tensor([[0] * 4 + [1] * 7, [0] * 8 + [1] * 3])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 0
    for given in ({"attention_mask": mask}, {}):  # pad_token_id says the same
        got = continued(model, ids, seq_idx=seq_idx, **given, **HOW[how])
        each = got[0].shape[0] // 2
        for row, start in enumerate((4, 8)):
            rows = slice(row * each, (row + 1) * each)
            logits = slice(row * (len(got[1]) // 2), (row + 1) * (len(got[1]) // 2))
            alone = continued(model, ids[row : row + 1, start:], **HOW[how])
            assert_same((got[0][rows], got[1][logits]), alone)


@pytest.mark.parametrize("how", ["greedy", "chunks", "chunks that end with a document", "guesses"])
@pytest.mark.parametrize("all_ids", [False, True])
@pytest.mark.parametrize("way", ["seq_idx", "position_ids"])
def test_after_a_cache(model: HopeForCausalLM, way: str, all_ids: bool, how: str) -> None:
    """The first document goes on from the cache, the second knows nothing of it."""
    before, ids = tokens(length=7, seed=1), tokens()
    cache = model(before, use_cache=True).past_key_values
    first, second = ids[:, :FIRST], ids[:, FIRST:]
    model(first, past_key_values=(going_on := cache.clone()))  # the state that the first document ends with
    given, said = ids, torch.arange(7, 7 + FIRST)
    said = {"seq_idx": SEQ_IDX, "position_ids": torch.cat([said, torch.arange(SECOND)])[None]}[way]
    if all_ids:
        head = {"seq_idx": torch.zeros(1, 7, dtype=torch.long), "position_ids": torch.arange(7)[None]}
        given, said = torch.cat([before, ids], 1), torch.cat([head[way], said], 1)
    got = continued(model, given, past_key_values=cache.clone(), **{way: said}, **HOW[how])
    assert_same(got, continued(model, second, **HOW[how]))
    # one document that goes on
    one = {"seq_idx": torch.zeros(1, FIRST, dtype=torch.long), "position_ids": torch.arange(7, 13)[None]}
    got = continued(model, first, past_key_values=cache.clone(), **{way: one[way]}, **HOW[how])
    assert_same(got, continued(model, first, past_key_values=cache.clone(), **HOW[how]))
    assert going_on.get_seq_length() == 7 + FIRST


def test_documents_that_do_not_fit_are_refused(model: HopeForCausalLM) -> None:
    ids = tokens()
    with pytest.raises(ValueError, match=r"seq_idx must be .*\[1, 11\]"):
        continued(model, ids, seq_idx=SEQ_IDX[:, 1:])
    with pytest.raises(ValueError, match="disagree"):
        continued(model, ids, seq_idx=SEQ_IDX, position_ids=torch.arange(11)[None])
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k disagree"):
        continued(model, ids, cu_seq_lens_q=ENDS, cu_seq_lens_k=torch.tensor([0, 11]))


# -- what is learned from


LEARN = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1]])


def by_hand(
    model: HopeForCausalLM, ids: Tensor, mask: Tensor, learn: bool, cache: HopeCache | None = None
) -> tuple[Tensor, Tensor]:
    new, logits = [], []
    out = model(ids, learn_mask=mask, past_key_values=cache, use_cache=True)
    for _ in range(NEW):
        logits.append(out.logits[:, -1])
        new.append(logits[-1].argmax(-1, keepdim=True))
        mask = torch.full_like(new[-1], int(learn))
        out = model(new[-1], learn_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(new, 1), torch.stack(logits, 1)


@pytest.fixture
def learner() -> HopeForCausalLM:
    return small_model(MIXERS["hybrid"], **LEARNS).eval()


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("how", ["greedy", "no cache", "chunks", "guesses"])
def test_a_mask_of_what_is_learned(learner: HopeForCausalLM, how: str, learn: bool) -> None:
    ids = tokens()
    kwargs = {"learn_mask": LEARN, "learn_from_generated": learn, **HOW[how]}
    wanted = by_hand(learner, ids, LEARN, learn)
    assert_same(continued(learner, ids, **kwargs), wanted)
    everything = by_hand(learner, ids, torch.ones_like(LEARN), learn)
    assert not torch.allclose(everything[1], wanted[1], atol=1e-5)


@pytest.mark.parametrize("learn", [False, True])
def test_a_mask_for_beams_and_rows(learner: HopeForCausalLM, learn: bool) -> None:
    ids, mask = tokens(rows=2), torch.cat([LEARN, 1 - LEARN])
    kwargs = {"learn_from_generated": learn, "num_beams": 2}
    got = continued(learner, ids, learn_mask=mask, **kwargs)
    for row in range(2):
        alone = continued(learner, ids[row : row + 1], learn_mask=mask[row : row + 1], **kwargs)
        assert torch.equal(got[0][row : row + 1], alone[0])


@pytest.mark.parametrize("how", ["greedy", "chunks"])
def test_a_mask_after_a_cache(learner: HopeForCausalLM, how: str) -> None:
    before, ids = tokens(length=7, seed=1), tokens()
    cache = learner(before, use_cache=True).past_key_values
    wanted = by_hand(learner, ids, LEARN, False, cache.clone())
    assert_same(continued(learner, ids, learn_mask=LEARN, past_key_values=cache.clone(), **HOW[how]), wanted)


def test_an_assistant_gets_the_mask_that_it_has_a_use_for(
    learner: HopeForCausalLM, model: HopeForCausalLM
) -> None:
    ids = tokens()
    wanted = by_hand(learner, ids, LEARN, False)
    for assistant in (model, small_model(MIXERS["hybrid"], seed=1, **LEARNS).eval()):
        assert_same(continued(learner, ids, learn_mask=LEARN, assistant_model=assistant), wanted)


def test_masks_that_do_not_fit_are_refused(learner: HopeForCausalLM, model: HopeForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"learn_mask must be \[batch, tokens\] = \[1, 11\], got \[1, 10\]"):
        continued(learner, tokens(), learn_mask=LEARN[:, 1:])
    with pytest.raises(ValueError, match="CMS that learns in context"):
        continued(model, tokens(), learn_mask=LEARN)
