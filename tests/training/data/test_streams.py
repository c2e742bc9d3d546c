"""Documents in order for rows: what each row reads, and how whole documents are laid out for scoring."""

import numpy as np
import pytest
import torch

from nested_learning.training.data import DataConfig
from nested_learning.training.data.packing import IGNORED, TokenizedText
from nested_learning.training.data.streams import (
    CarriedDataset,
    DocumentBlocks,
    documents_of,
    first_tokens,
    within_blocks,
)

END = 0


def text(*lengths):
    """Documents of these lengths, END included, no two tokens alike but END."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    ids[np.cumsum(lengths) - 1] = END
    return TokenizedText(ids, len(ids))


def read(dataset, row, blocks):
    """The tokens, positions and labels of a row's first blocks."""
    samples = [dataset[block * dataset.rows + row] for block in range(blocks)]
    return (
        np.concatenate([s[key].numpy() for s in samples]) for key in ("input_ids", "position_ids", "labels")
    )


def test_documents_are_those_between_ends():
    ids = text(3, 1, 4).ids
    assert [d.tolist() for d in documents_of(ids, END)] == [[1, 2, 0], [0], [5, 6, 7, 0]]
    assert [d.tolist() for d in documents_of(ids[:5], END)] == [[1, 2, 0], [0], [5]]
    assert [d.tolist() for d in documents_of(ids, None)] == [ids.tolist()]


def test_rows_read_whole_documents_in_order_with_the_next_token_as_label():
    whole = text(7, 30, 5, 12, 9, 3, 20)
    dataset = CarriedDataset(whole, 8, rows=3, num_samples=3 * 12, seed=4, end_of_text=END)
    by_start = {int(d[0]): d for d in dataset.documents}
    started = []
    for row in range(3):
        ids, positions, labels = read(dataset, row, 12)
        assert len(ids) == 96
        assert positions[0] == 0
        for start in np.flatnonzero(positions == 0):
            document = by_start[int(ids[start])][: len(ids) - start]
            assert (ids[start : start + len(document)] == document).all()
            assert (positions[start : start + len(document)] == np.arange(len(document))).all()
            started.append(int(ids[start]))
        following = np.append(ids[1:], ids[-1])
        ends = np.append(positions[1:] == 0, False)
        assert (labels[:-1] == np.where(ends, IGNORED, following)[:-1]).all()
    assert set(started[:3]) <= set(by_start)


def test_rows_are_balanced_and_an_epoch_reads_each_document_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 200)
    dataset = CarriedDataset(
        text(*lengths), 16, rows=4, num_samples=4 * (lengths.sum() // 64), end_of_text=END
    )
    dataset[len(dataset) - 1]
    numbers = [n for row in dataset._numbers for n in row]
    assert max(np.bincount(numbers)) <= 2  # the second time only for what an epoch leaves of a row
    assert len(set(numbers)) >= 195
    ends = [end for end, _ in dataset._ends]
    assert max(ends) - min(ends) <= 40


def test_samples_depend_on_seed_and_index_alone():
    whole = text(*range(2, 60))
    one = CarriedDataset(whole, 8, 4, 400, seed=1, end_of_text=END)
    longer = CarriedDataset(whole, 8, 4, 4000, seed=1, end_of_text=END)
    longer[3999]
    for i in (0, 5, 399):
        assert all((one[i][key] == longer[i][key]).all() for key in one[i])
    other = CarriedDataset(whole, 8, 4, 400, seed=2, end_of_text=END)
    assert any((one[i]["input_ids"] != other[i]["input_ids"]).any() for i in range(8))
    assert one.fingerprint() == longer.fingerprint() != other.fingerprint()
    assert one.fingerprint() != CarriedDataset(whole, 8, 5, 400, seed=1, end_of_text=END).fingerprint()


def test_a_joined_text_is_cut_into_a_piece_per_row():
    whole = text(50, 50)
    dataset = CarriedDataset(whole, 10, rows=4, num_samples=8, end_of_text=None)
    begin = sorted(dataset[row]["input_ids"][0].item() for row in range(4))
    assert begin == [1, 26, 51, 76]
    with pytest.raises(
        ValueError, match=r"each of 4 rows .* has 2: set --batch_size to 2 or less, or .*joined"
    ):
        CarriedDataset(whole, 10, rows=4, num_samples=8, end_of_text=END)


def test_rows_that_would_have_no_document_cost_nothing():
    documents = documents_of(text(3, 40).ids, END)
    few, many = (list(DocumentBlocks(documents, 8, rows=rows)) for rows in (2, 10**12))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(few, many, strict=True) for name in a)


def test_blocks_have_every_token_of_every_document_once():
    whole = text(3, 40, 8, 17, 1, 16)
    documents = documents_of(whole.ids, END)
    for processes in (1, 2, 5):
        seen = {}
        steps = set()
        for index in range(processes):
            blocks = DocumentBlocks(documents, 8, rows=4, index=index, processes=processes)
            batches = list(blocks)
            steps.add(len(batches))
            widths = [len(batch["input_ids"]) for batch in batches]
            assert widths == sorted(widths, reverse=True)
            assert min(widths) >= 1
            for batch in batches:
                real = batch.get("attention_mask", batch["input_ids"] >= 0).bool()
                for key in zip(
                    *(batch[k][real].tolist() for k in ("input_ids", "position_ids", "shift_labels")),
                    strict=True,
                ):
                    seen[key] = seen.get(key, 0) + 1
        assert len(steps) == 1
        expected = [
            (int(d[t]), t, int(d[t + 1]) if t + 1 < len(d) else IGNORED)
            for d in documents
            for t in range(len(d))
        ]
        assert seen == {key: expected.count(key) for key in expected}
        assert len(blocks) == 1 + 5 + 1 + 3 + 1 + 2


def test_an_evaluation_takes_whole_documents_evenly_spaced():
    documents = documents_of(text(*[16] * 10).ids, END)
    assert within_blocks(documents, 8, None) == documents
    chosen = within_blocks(documents, 8, 9)
    assert [int(d[0]) for d in chosen] == [1, 33, 81, 113]
    [only] = within_blocks(documents, 8, 1)
    assert only.tolist() == documents[0][:8].tolist()


def test_scored_documents_are_as_long_as_asked_for():
    documents = documents_of(text(5, 9, 12).ids, END)
    assert [len(d) for d in first_tokens(documents, 9)] == [9, 9]
    with pytest.raises(ValueError, match=r"score_length is 13, .*longest of the 3 .* 12 tokens.*12 or less"):
        first_tokens(documents, 13)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"'hf:some' streams blocks that are shuffled.*--data PATH"):
        DataConfig(source="hf:some", carry_state=True)
    with pytest.raises(ValueError, match="score_length must be at least 2, got 1"):
        DataConfig(score_length=1)
