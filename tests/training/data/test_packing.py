import math

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import default_data_collator

from nested_learning import HopeConfig, HopeForCausalLM
from nested_learning.training.data import PackedDataset, ValidationDataset, bits_per_byte, byte_tokenizer
from nested_learning.training.data.packing import TokenizedText, sample_of, tokenize


def positions(num_tokens: int) -> TokenizedText:
    """Tokens whose ids are their positions, so that a block tells where it comes from."""
    return TokenizedText(np.arange(num_tokens, dtype=np.uint32), num_tokens)


sizes = st.integers(1, 17).flatmap(lambda t: st.tuples(st.just(t), st.integers(t, 12 * t)))


@given(sizes, st.integers(0, 5))
def test_an_epoch_covers_the_ring_in_disjoint_blocks(size, seed):
    block_size, num_tokens = size
    per_epoch = num_tokens // block_size
    data = PackedDataset(positions(num_tokens), block_size, 3 * per_epoch, seed)
    assert len(data) == 3 * per_epoch
    for epoch in range(3):
        blocks = [data[epoch * per_epoch + i]["input_ids"].tolist() for i in range(per_epoch)]
        for block in blocks:
            assert block == [(block[0] + t) % num_tokens for t in range(block_size)]
        seen = [token for block in blocks for token in block]
        assert len(seen) == len(set(seen)) == per_epoch * block_size  # fewer than block_size left out


def test_every_token_is_used_equally_often_in_the_long_run():
    data = PackedDataset(positions(103), 10, 4000, seed=1)  # 3 of 103 are left out of each epoch of 10 blocks
    counts = np.bincount(np.concatenate([data[i]["input_ids"].numpy() for i in range(4000)]), minlength=103)
    expected = 400 * 100 / 103
    assert np.abs(counts - expected).max() < 5 * math.sqrt(400 * (3 / 103))


def stack(data, indices):
    return torch.stack([data[i]["input_ids"] for i in indices])


def test_a_sample_is_a_function_of_seed_and_index():
    text = positions(1000)
    data = PackedDataset(text, 16, 500, seed=3)
    whole = stack(data, range(500))
    backwards = stack(PackedDataset(text, 16, 500, seed=3), reversed(range(500))).flip(0)
    longer = stack(PackedDataset(text, 16, 9999, seed=3), range(500))
    assert torch.equal(whole, backwards)
    assert torch.equal(whole, longer)
    other_seed = stack(PackedDataset(text, 16, 500, seed=4), range(62))
    assert not torch.equal(whole[:62], other_seed)
    assert not torch.equal(whole[:62], whole[62:124])  # another epoch


def test_samples_are_ready_for_a_causal_model():
    data = PackedDataset(TokenizedText(np.arange(60000, 60032, dtype=np.uint16), 32), 8, 4)
    batch = default_data_collator([data[i] for i in range(4)])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].min() >= 60000  # no overflow on the way from uint16
    sample = data[0]
    sample["labels"][0] = -100
    assert sample["input_ids"][0] != -100
    assert data[0]["labels"][0] != -100


def batches(data, batch_size, sampler=None, **options):
    loader = DataLoader(data, batch_size, sampler=sampler or SequentialSampler(data), **options)
    return [batch["input_ids"] for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_at_the_exact_batch(num_workers):
    data = PackedDataset(positions(500), 8, 200, seed=2)
    whole = batches(data, 4)
    fresh = PackedDataset(positions(500), 8, 200, seed=2)
    loader = DataLoader(fresh, 4, num_workers=num_workers)
    resumed = [batch["input_ids"] for batch in skip_first_batches(loader, 33)]
    assert len(whole) == 50
    assert torch.equal(torch.stack(whole[33:]), torch.stack(resumed))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_sharded_processes_see_together_the_batches_of_one(num_processes):
    data = PackedDataset(positions(500), 8, 96, seed=2)
    global_batches = batches(data, 8)
    per_process = []
    for rank in range(num_processes):
        sampler = BatchSampler(SequentialSampler(data), 8 // num_processes, drop_last=False)
        shard = BatchSamplerShard(sampler, num_processes, rank)
        per_process.append([batch["input_ids"] for batch in DataLoader(data, batch_sampler=shard)])
    together = [torch.cat(parts) for parts in zip(*per_process, strict=True)]
    assert torch.equal(torch.stack(together), torch.stack(global_batches))


@given(sizes)
def test_validation_is_consecutive_and_fixed(size):
    block_size, num_tokens = size
    data = ValidationDataset(positions(num_tokens), block_size)
    seen = stack(data, range(len(data))).flatten()
    assert torch.equal(seen, torch.arange(num_tokens // block_size * block_size))


@given(sizes, st.integers(1, 14))
def test_limited_validation_is_spread_evenly(size, limit):
    block_size, num_tokens = size
    total = num_tokens // block_size
    data = ValidationDataset(positions(num_tokens), block_size, limit)
    assert len(data) == min(total, limit)
    starts = [int(data[i]["input_ids"][0]) for i in range(len(data))]
    assert starts[0] == 0
    assert all(start % block_size == 0 for start in starts)
    gaps = np.diff([start // block_size for start in starts] + [total])
    assert set(gaps) <= {total // len(data), -(-total // len(data))}


@pytest.mark.parametrize(("kind", "limit"), [(PackedDataset, 10), (ValidationDataset, None)])
def test_too_short_text_is_refused_with_numbers(kind, limit):
    with pytest.raises(ValueError, match=r"63 tokens.*block_size 64.*at most 63"):
        kind(positions(63), 64, limit)
    assert len(kind(positions(64), 64, limit)[0]["input_ids"]) == 64


def test_indices_and_sizes_are_checked():
    data = PackedDataset(positions(64), 8, 5)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            data[index]
    assert len(list(data)) == 5
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        PackedDataset(positions(64), 8, 0)
    with pytest.raises(ValueError, match="max_blocks"):
        ValidationDataset(positions(64), 8, 0)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)  # uniform over bytes
    assert bits_per_byte(2 * math.log(2), 4.0) == pytest.approx(0.5)


def test_bytes_per_token_counts_ends_of_documents():
    text = tokenize(byte_tokenizer(), ["né", "abc"])
    assert text.ids.tolist() == [110, 195, 169, 256, 97, 98, 99, 256]
    assert text.bytes_per_token == 6 / 8
    assert PackedDataset(text, 4, 2).bytes_per_token == ValidationDataset(text, 4).bytes_per_token == 6 / 8


END = 9


def test_samples_mark_where_documents_begin():
    block = np.array([1, 2, END, 3, END, END, 4, 5], dtype=np.uint16)
    sample = sample_of(block, END)
    assert sample["input_ids"].tolist() == block.tolist()
    assert sample["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    # A block's first label is never counted, as nothing stands before it.
    assert sample["labels"].tolist() == [1, 2, END, -100, END, -100, -100, 5]
    joined = sample_of(block)
    assert joined["labels"].tolist() == block.tolist()
    assert "position_ids" not in joined


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "attention"])
def test_marked_documents_train_on_the_losses_of_separate_rows(mixer):
    """The loss of packed samples is that of each document in a row of its own, over the same labels."""
    config = HopeConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_heads=2, mixer=mixer)
    tiny_model = HopeForCausalLM(config).double().train()
    text = np.array([1, 2, 3, END, 4, 5, END, 6, 7, 8, 1, END], dtype=np.uint16)
    sample = {name: t[None] for name, t in sample_of(text, END).items()}
    packed = tiny_model(**sample).loss
    total = torch.zeros((), dtype=torch.float64)
    for document in ([1, 2, 3, END], [4, 5, END], [6, 7, 8, 1, END]):
        ids = torch.tensor([document])
        total += tiny_model(ids, labels=ids).loss * (len(document) - 1)
    torch.testing.assert_close(packed, total / 9, rtol=0, atol=1e-12)
