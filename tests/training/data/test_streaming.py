import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from nested_learning.training.data import StreamedDataset, byte_tokenizer, streaming
from nested_learning.training.data.streaming import TextStream, open_stream
from nested_learning.training.data.tokenizers import encode_documents

TOKENIZER = byte_tokenizer()
TEXTS = [f"document {i}: " + "naïve " * (i % 7) for i in range(23)] + ["", "x"]
T = 8


def make_stream(texts=TEXTS, num_shards=3) -> TextStream:
    rows = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    return TextStream(rows.to_iterable_dataset(num_shards=num_shards), "text", "test data")


def make(num_samples=100, seed=0, shuffle_blocks=16, **stream) -> StreamedDataset:
    return StreamedDataset(make_stream(**stream), TOKENIZER, T, num_samples, seed, shuffle_blocks)


def blocks_of(data) -> torch.Tensor:
    return torch.stack([sample["input_ids"] for sample in data])


def expected_blocks(num_blocks) -> torch.Tensor:
    """Independent of the class: the texts over and over, cut into blocks in order."""
    one_pass = encode_documents(TOKENIZER, [t for t in TEXTS if t]).astype(np.int64)
    return torch.from_numpy(np.resize(one_pass, num_blocks * T).reshape(num_blocks, T))


def test_without_shuffle_it_is_the_packed_text_over_and_over():
    data = make(num_samples=200, shuffle_blocks=1)  # about three passes
    assert torch.equal(blocks_of(data), expected_blocks(200))
    sample = next(iter(data))
    assert torch.equal(sample["labels"], sample["input_ids"])
    assert sample["input_ids"].dtype == torch.int64


def test_windows_hold_the_same_blocks_in_another_order():
    blocks = blocks_of(make(num_samples=96))
    plain = expected_blocks(96)
    assert not torch.equal(blocks, plain)
    for start in range(0, 96, 16):
        rows = [sorted(part[start : start + 16].tolist()) for part in (blocks, plain)]
        assert rows[0] == rows[1]
    assert torch.equal(blocks, blocks_of(make(num_samples=96)))
    assert torch.equal(blocks, blocks_of(make(num_samples=150))[:96])
    assert not torch.equal(blocks, blocks_of(make(num_samples=96, seed=1)))


def test_every_iteration_is_the_same():
    data = make(num_samples=40)
    assert torch.equal(blocks_of(data), blocks_of(data))
    next(iter(data))  # an iteration that is given up
    assert len(blocks_of(data)) == 40


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("seen", [0, 1, 15, 16, 17, 31, 32, 99, 100])
def test_resumes_at_the_exact_block(seen, num_shards):
    whole = blocks_of(make(num_shards=num_shards))
    first = make(num_shards=num_shards)
    iterator = iter(first)
    for _ in range(seen):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    second = make(num_shards=num_shards)
    second.load_state_dict(state)
    assert second.state_dict() == state
    rest = [sample["input_ids"] for sample in second]
    assert len(rest) == 100 - seen
    assert not rest or torch.equal(torch.stack(rest), whole[seen:])
    assert torch.equal(blocks_of(second), whole)  # the iteration after the resumed one is a whole one


def test_a_state_of_other_settings_is_refused():
    state = make(seed=1).state_dict()
    with pytest.raises(ValueError, match="with seed 1, the dataset has 0"):
        make().load_state_dict(state)


def test_skipping_batches_resumes_too():
    whole = [batch["input_ids"] for batch in DataLoader(make(), 4)]
    rest = [batch["input_ids"] for batch in skip_first_batches(DataLoader(make(), 4), 9)]
    assert torch.equal(torch.stack(whole[9:]), torch.stack(rest))


def test_sharded_processes_see_together_the_batches_of_one():
    whole = [batch["input_ids"] for batch in DataLoader(make(96), 8)]
    shards = []
    for rank in range(2):
        shard = IterableDatasetShard(make(96), batch_size=4, num_processes=2, process_index=rank)
        shards.append([batch["input_ids"] for batch in DataLoader(shard, 4)])
    together = [torch.cat(parts) for parts in zip(*shards, strict=True)]
    assert torch.equal(torch.stack(together), torch.stack(whole))


def test_one_worker_may_read_and_several_are_refused(monkeypatch):
    whole = blocks_of(make(24))
    one = [batch["input_ids"] for batch in DataLoader(make(24), 8, num_workers=1)]
    assert torch.equal(torch.cat(one), whole)
    monkeypatch.setattr(streaming, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    with pytest.raises(ValueError, match=r"got 2 workers.*dataloader_num_workers"):
        list(make(24))


def test_bytes_per_token_of_what_was_read():
    data = make(num_samples=1, shuffle_blocks=1)
    with pytest.raises(ValueError, match="once a block has been read"):
        _ = data.bytes_per_token
    list(data)
    assert data.bytes_per_token == len(TEXTS[0]) / (len(TEXTS[0]) + 1)


def test_a_stream_without_text_ends_in_an_error():
    with pytest.raises(ValueError, match="no text in column 'text'"):
        list(make(texts=["", ""], num_shards=1))


@pytest.mark.parametrize(("column", "message"), [("id", "holds a int"), ("body", "does not exist.*id, text")])
def test_a_wrong_column_is_named(column, message):
    stream = TextStream(make_stream().rows, column, "test data")
    with pytest.raises(ValueError, match=message):
        list(stream.once())


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_validation_is_the_split_of_that_name(tmp_path):
    write_rows(tmp_path / "train.jsonl", ["a", "b"])
    write_rows(tmp_path / "validation.jsonl", ["c"])
    stream, held_out = open_stream(f"hf:{tmp_path}", "text", 1)
    assert list(stream.once()) == ["a", "b"]
    assert list(held_out) == ["c"]


def test_or_the_first_rows(tmp_path):
    write_rows(tmp_path / "train.jsonl", list("abcde"))
    stream, held_out = open_stream(f"hf:{tmp_path}", "text", 2)
    assert list(stream.once()) == ["c", "d", "e"]
    assert list(held_out) == ["a", "b"]


def test_sources_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="names no data set"):
        open_stream("hf:", "text", 1)
    write_rows(tmp_path / "test.jsonl", ["a"])
    with pytest.raises(ValueError, match="no split 'train'; it has 'test'"):
        open_stream(f"hf:{tmp_path}", "text", 1)

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"no route to host.*--data PATH"):
        open_stream("hf:some/corpus:small", "text", 1)
