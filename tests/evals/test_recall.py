"""Recall: sequences against their definition and distribution, scores of models that are known, one run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nested_learning.evals.fit import IGNORED
from nested_learning.evals.registry import find_method
from nested_learning.evals.tasks.recall import Recall
from nested_learning.evals.tasks.recall.data import POWER, reassigned, recall_batch

V = 64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("updates", [0, 3])
def test_the_answer_to_a_key_is_the_value_it_was_given_last(updates: int) -> None:
    batch = recall_batch((50, 40), 6, V, generator(), updates)
    told = 2 * (6 + updates)
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        pairs = list(zip(ids[0:told:2], ids[1:told:2], strict=True))
        asked = [place for place, target in enumerate(targets) if target != IGNORED]
        assert all(place >= told and place % 2 == 0 for place in asked)
        assert sorted(ids[place] for place in asked) == sorted(key for key, _ in pairs[:6])
        assert len({key for key, _ in pairs[:6]}) == len({value for _, value in pairs[:6]}) == 6
        assert all(1 <= key < V // 2 <= value < V for key, value in pairs)
        assert all(targets[place] == dict(pairs)[ids[place]] for place in asked)
        assert all(value != dict(pairs[:6])[key] for key, value in pairs[6:])


def test_keys_values_and_noise_are_uniform() -> None:
    batch = recall_batch((6000, 32), 4, 16, generator())
    counts = torch.bincount(batch.ids[:, 0:8:2].flatten(), minlength=16)[1:8]
    assert torch.all((counts - 24_000 / 7).abs() < 5 * (24_000 / 7) ** 0.5), counts
    counts = torch.bincount(batch.ids[:, 1:8:2].flatten(), minlength=16)[8:]
    assert torch.all((counts - 24_000 / 8).abs() < 5 * (24_000 / 8) ** 0.5), counts
    noise = torch.bincount(batch.ids[:, 9::2].flatten(), minlength=16)  # the second token of every slot
    assert torch.all((noise - 72_000 / 16).abs() < 5 * (72_000 / 16) ** 0.5), noise


def test_the_first_pair_is_asked_where_the_power_law_says() -> None:
    rows = 20_000
    batch = recall_batch((rows, 32), 4, V, generator())
    slots = torch.arange(1, 13, dtype=torch.float64)
    expected = slots ** (POWER - 1)
    expected /= expected.sum()  # the first pair's slot is drawn first, from the whole law
    is_first = (batch.ids == batch.ids[:, :1]) & (batch.targets != IGNORED)
    found = torch.bincount((is_first.int().argmax(1) - 8) // 2, minlength=12) / rows
    assert torch.all((found - expected).abs() < 5 * (expected / rows).sqrt()), (found, expected)


def test_values_told_again_are_uniform_over_the_others() -> None:
    batch = recall_batch((9000, 16), 2, 16, generator(), updates=1)
    again = batch.ids[:, 4] == batch.ids[:, 0]
    assert abs(again.float().mean() - 0.5) < 0.03  # either key
    shift = (batch.ids[again, 5] - batch.ids[again, 1]) % 8
    counts = torch.bincount(shift, minlength=8)
    assert counts[0] == 0
    share = again.sum() / 7
    assert torch.all((counts[1:] - share).abs() < 5 * share**0.5), counts


@pytest.mark.parametrize(("length", "pairs", "updates"), [(14, 4, 0), (17, 4, 0), (16, 3, 4), (16, 0, 0)])
def test_sequences_without_room_are_refused(length: int, pairs: int, updates: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens with {pairs} pairs"):
        recall_batch((2, length), pairs, V, generator(), updates)


def test_more_keys_than_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="8 keys of 7 ids"):
        recall_batch((2, 64), 8, 16, generator())


class Lookup(nn.Module):
    """A memory that writes down the pairs: of two values of a key, the first or the last."""

    def __init__(self, pairs: int, updates: int, last: bool) -> None:
        super().__init__()
        self.told, self.last = 2 * (pairs + updates), last

    def forward(self, ids: Tensor) -> SimpleNamespace:
        logits = torch.zeros(*ids.shape, V)
        for row, tokens in enumerate(ids.tolist()):
            pairs = list(zip(tokens[0 : self.told : 2], tokens[1 : self.told : 2], strict=True))
            value = dict(pairs if self.last else reversed(pairs))
            for place, token in enumerate(tokens):
                logits[row, place, value.get(token, 0)] = 1
        return SimpleNamespace(logits=logits)


def test_who_remembers_the_last_value_is_right_and_who_remembers_the_first_is_stale() -> None:
    task = Recall.at("smoke", test_size=20, vocab_size=V)
    for last, score in ((True, (1.0, 0.0)), (False, (0.0, 1.0))):
        found = task._score(Lookup(4, 2, last), generator(), 32, 4, 2)  # type: ignore[attr-defined]
        assert found == score
    assert task._score(Lookup(4, 0, False), generator(), 32, 4) == (1.0, 0.0)  # type: ignore[attr-defined]


def test_reassigned_keys_by_hand() -> None:
    batch = recall_batch((30, 24), 4, V, generator(1), updates=2)
    asked, stale = reassigned(batch, 4, 2)
    assert asked.sum(1).tolist() == [2] * 30
    for row, place in asked.nonzero().tolist():
        ids = batch.ids[row].tolist()
        first = dict(zip(ids[0:8:2], ids[1:8:2], strict=True))
        assert stale[row, place] == first[ids[place]]
        assert stale[row, place] != batch.targets[row, place]


def test_a_run_learns_and_says_how_large_the_state_is() -> None:
    task = Recall.at(
        "smoke", steps=80, batch_size=32, vocab_size=8, train=[(8, 2)], test=[(8, 2)], test_size=200,
        forgetting=0.0,
    )  # fmt: skip
    method = find_method("transformer").at({"lr": 1e-2})
    figures = task.run(method, 3)
    assert figures["accuracy@2"] > 1.5 * task.constants()["any value"]["accuracy@2"]
    assert "forgetting" not in figures
    # keys and values of 8 tokens in two layers of width 16, float32, and the places of the tokens
    assert figures["state bytes"] == 2 * (2 * 8 * 16 * 4 + 8 * 8)


def test_keys_are_told_again_after_the_plain_part_of_the_training() -> None:
    task = Recall.at("smoke", steps=8, train=[(32, 4)], forgetting=1.0, plain=0.75)
    changed = []
    for _, batch in zip(range(8), task._batches(0), strict=False):  # type: ignore[attr-defined]
        first = batch.ids[:, :8].unflatten(1, (4, 2))
        asked = batch.targets != IGNORED
        of_key = (batch.ids[:, :, None] == first[:, None, :, 0]) & asked[..., None]
        values = (of_key * first[:, None, :, 1]).sum(-1)[asked]
        changed.append(int((values != batch.targets[asked]).sum()))
    assert changed[:6] == [0] * 6
    assert changed[6:] == [2 * 8] * 2  # half of the keys of each sequence


def test_a_run_repeats_itself_and_another_seed_is_another_run() -> None:
    task = Recall.at("smoke", steps=2, test_size=4)
    method = find_method("deltanet").at({"lr": 1e-2})
    first, again, other = (task.run(method, seed) for seed in (3, 3, 4))
    assert first.pop("seconds") > 0
    assert again.pop("seconds") > 0
    assert first == again
    assert first["loss"] != other["loss"]


def test_without_mlps_hope_is_its_mixer_and_has_no_row() -> None:
    names = [method.name for method in Recall.at("small").methods()]
    assert "hope" not in names
    assert "self-modifying-titans" in names
    hope = find_method("hope")
    assert "mixer alone" in str(Recall.at("small").accepts(hope))
    assert Recall.at("small", mlp=True).accepts(hope) is None


@pytest.mark.parametrize("budget", ["smoke", "small", "full"])
def test_every_segment_of_every_budget_has_room(budget: str) -> None:
    Recall.at(budget)._check()  # type: ignore[attr-defined]
