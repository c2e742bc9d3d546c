"""Where documents begin, from every way to say it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nested_learning.layers.token_inputs import find_documents

X = torch.zeros(2, 6, 3)
ROW = torch.zeros(1, 6, 3)


def starts(
    x: Tensor, real: Tensor | None = None, given: bool = False, **said: Tensor
) -> list[list[int]] | None:
    """[row, column] of each document's first token."""
    found = find_documents(x, real, given, **said)
    if found is None:
        return None
    places = found.tokens[found.starts]
    return [[int(p) // x.shape[1], int(p) % x.shape[1]] for p in places]


def test_all_ways_say_the_same() -> None:
    wanted = [[0, 0], [0, 2], [0, 5]]
    assert starts(ROW, documents=torch.tensor([[7, 7, 3, 3, 3, 7]])) == wanted
    assert starts(ROW, position_ids=torch.tensor([[0, 1, 0, 1, 2, 0]])) == wanted
    assert starts(ROW, cu_seq_lens_q=torch.tensor([0, 2, 5, 6], dtype=torch.int32)) == wanted
    assert starts(ROW, cu_seq_lens_q=torch.tensor([0, 2, 2, 5, 6])) == wanted
    both = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]), "cu_seq_lens_q": torch.tensor([0, 2, 5, 6])}
    assert starts(ROW, **both) == wanted


def test_one_document_a_row_is_nothing_to_do() -> None:
    positions = torch.arange(6)[None]
    assert starts(X, position_ids=positions) is None
    assert starts(X, position_ids=positions + 4, given=True) is None
    assert starts(X, documents=torch.tensor([[1] * 6, [2] * 6])) is None
    assert starts(X, documents=torch.tensor([[1] * 6, [2] * 6]), given=True) is None


def test_position_zero_starts_anew_where_there_is_a_state() -> None:
    found = find_documents(X, None, True, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]]))
    assert found is not None
    assert found.goes_on(True).tolist() == [False, True]


def test_padding_is_ignored() -> None:
    real = torch.tensor([[False, False, True, True, True, True], [True, True, False, True, True, False]])
    positions = torch.tensor([[1, 0, 0, 1, 2, 0], [0, 1, 0, 2, 0, 0]])
    assert starts(X, real, position_ids=positions) == [[0, 2], [0, 5], [1, 0], [1, 4]]
    numbers = torch.tensor([[5, 6, 0, 0, 0, 1], [0, 0, 9, 0, 1, 2]])
    assert starts(X, real, documents=numbers) == [[0, 2], [0, 5], [1, 0], [1, 4]]
    assert starts(X, torch.zeros(2, 6, dtype=torch.bool), documents=numbers) is None


@pytest.mark.parametrize(
    ("x", "said", "message"),
    [
        (X, {"position_ids": torch.zeros(2, 5, dtype=torch.long)}, r"\[2, 6\].*got torch.int64 \[2, 5\]"),
        (X, {"documents": torch.zeros(2, 6)}, "integer tensor"),
        (X, {"documents": [[0] * 6] * 2}, "got list"),
        (X, {"cu_seq_lens_q": torch.tensor([0, 6])}, "there are 2"),
        (ROW, {"cu_seq_lens_q": torch.tensor([0, 4])}, "rise from 0 to the number of tokens 6"),
        (ROW, {"cu_seq_lens_q": torch.tensor([0, 5, 3, 6])}, "rise"),
        (
            ROW,
            {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])},
            "disagree",
        ),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, said: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_documents(x, None, False, **said)
