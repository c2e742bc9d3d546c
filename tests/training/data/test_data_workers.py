"""Datasets in worker processes of a DataLoader, by fork and by spawn: the samples of no process at all."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from nested_learning.training.data import StreamedDataset, byte_tokenizer
from nested_learning.training.data.packing import PackedDataset, ValidationDataset, tokenize
from nested_learning.training.data.streaming import TextStream

TEXTS = [f"document {i}: " + "naïve " * (i % 7) for i in range(23)]
STARTS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


def samples(data, **options):
    loader = DataLoader(data, batch_size=3, **options)
    return torch.cat([batch["input_ids"] for batch in loader])


@pytest.mark.parametrize("start", STARTS)
def test_packed_and_validation_data(start):
    text = tokenize(byte_tokenizer(), TEXTS)
    for data in (PackedDataset(text, 8, num_samples=40, seed=1), ValidationDataset(text, 8, max_blocks=20)):
        expected = samples(data)
        found = samples(data, num_workers=2, multiprocessing_context=start)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("start", STARTS)
def test_a_stream_in_one_worker(start):
    def data():
        rows = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3)
        return StreamedDataset(TextStream(rows, "text", "test data"), byte_tokenizer(), 8, 40, 1, 16)

    expected = samples(data())
    assert torch.equal(samples(data(), num_workers=1, multiprocessing_context=start), expected)
    with pytest.raises(ValueError, match="got 2 workers"):
        samples(data(), num_workers=2, multiprocessing_context=start)
