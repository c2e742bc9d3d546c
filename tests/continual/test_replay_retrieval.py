"""Retrieval over what was read, as a baseline and beside the levels."""

from __future__ import annotations

import copy
import math
import re
import sys

import pytest
import torch

from nested_learning.continual import Level, Replay, stack_levels
from nested_learning.continual.replaying.retrieval import PASSAGE, Retriever, _joined
from tests.continual.test_invariances import MODEL
from tests.continual.test_replay_learning import store_of
from tests.continual.tiny_models import byte_llama, random_ids

TEXTS = {
    "anna": "Anna lives in Varnholm. Her cat is called Miezi.\n",
    "bread": "Bread is made of flour, water and salt. It is baked.\n",
    "ben": "Ben lives in Lissabon. His dog is called Rex.\n",
    "ships": "A ship sails across the sea to the lighthouse.\n",
}


@pytest.fixture(scope="module")
def model():
    return byte_llama(16, 24, 1)


@pytest.fixture
def learner(model):
    pytest.importorskip("bm25s")
    learner = stack_levels(*model, levels=[Level(32, 0.1)], replay=Replay(piece=64))
    for source, text in TEXTS.items():
        learner.observe(text, source=source)
    learner.observe("x" * (32 - learner.memory.rows[0].position % 32))  # complete the segment
    return learner


def by_hand(passages, query, k1=1.5, b=0.75):
    """BM25 as Lucene has it, without the constant factor k1 + 1."""
    words = [re.findall(r"\w+", text.lower()) for text in passages]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        score = 0.0
        for term in re.findall(r"\w+", query.lower()):
            n, tf = sum(term in each for each in words), own.count(term)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(own) / mean))
        scores.append(score)
    return scores


def test_the_best_passage_comes_first_and_has_the_score_of_the_formula(learner):
    found = learner.retrieve("Where does Anna live, in Varnholm?", 60)
    assert [p.source for p in found.passages] == ["anna"]
    assert found.passages[0].text == TEXTS["anna"]
    assert found.text == TEXTS["anna"] + "\n"
    texts = [learner.tokenizer.decode(e.tokens.tolist()) for e in _joined(store_of(learner))]
    expected = by_hand(texts, "Where does Anna live, in Varnholm?")
    assert found.passages[0].score == pytest.approx(expected[0], rel=1e-5)


def test_as_many_as_fit_in_the_order_in_which_they_were_read(learner):
    found = learner.retrieve("the dog of Ben; Anna; called", 120)
    assert [p.source for p in found.passages] == ["anna", "ben"]
    assert found.passages[1].score > found.passages[0].score
    assert learner.tokenizer.decode(found.ids.tolist()) == found.text
    assert len(found.ids) <= 120
    assert [p.source for p in learner.retrieve("the dog of Ben; Anna; called", 90).passages] == ["ben"]
    (cut,) = learner.retrieve("Lissabon", 11).passages
    assert cut.text == TEXTS["ben"][:10]


def test_nothing_where_no_word_is_shared(learner):
    found = learner.retrieve("Quantum chromodynamics", 100)
    assert not found.passages
    assert found.ids.shape == (0,)
    assert not learner.retrieve("...", 100).passages


def test_a_forgotten_source_is_not_found(learner):
    assert learner.retrieve("Anna", 100).passages
    learner.forget("anna")
    assert not learner.retrieve("Anna", 100).passages
    assert [p.source for p in learner.retrieve("Ben", 100).passages] == ["ben"]


def test_the_same_again_from_a_copy_and_from_a_file(learner, model, tmp_path):
    learner.memory.save(tmp_path / "m")
    loaded = stack_levels(*model, levels=[Level(32, 0.1)], replay=Replay(piece=64))
    loaded.memory.load(tmp_path / "m")
    first = learner.retrieve("Ben and the sea", 200)
    for other in (learner, loaded, copy.deepcopy(learner)):
        found = other.retrieve("Ben and the sea", 200)
        assert [(p.start, p.score) for p in found.passages] == [(p.start, p.score) for p in first.passages]


def test_by_row_and_without_a_tokenizer():
    pytest.importorskip("bm25s")
    learner = stack_levels(MODEL, levels=[Level(8, 0.1)], replay=Replay(piece=8))
    ids = torch.stack([torch.arange(8), torch.arange(8) + 30])
    learner.observe(ids, source=["a", "b"])
    assert [p.source for p in learner.retrieve(torch.tensor([3, 31]), 8, row=0).passages] == ["a"]
    found = learner.retrieve(torch.tensor([3, 31]), 8, row=1)
    assert [p.source for p in found.passages] == ["b"]
    assert found.ids.tolist() == list(range(30, 38))
    assert found.passages[0].text is None
    assert found.text == ""


def test_passages_are_neighbouring_examples_of_one_text():
    learner = stack_levels(MODEL, levels=[Level(8, 0.1)], replay=Replay(piece=60))
    learner.observe(random_ids(320), source="a")
    learner.observe(random_ids(40), source="b")
    found = [(p.start, len(p), p.source) for p in _joined(store_of(learner))]
    assert found == [(0, 120, "a"), (120, 120, "a"), (240, 80, "a"), (320, 40, "b")]
    assert PASSAGE == 128


class TestBeforeAPrompt:
    def test_generation_reads_what_was_retrieved(self, learner):
        """As if the passages were written out; they are not returned."""
        prompt = "Where does Ben live?"
        found = learner.retrieve(prompt, 60)
        ids = torch.tensor(learner.tokenizer(prompt)["input_ids"])
        with learner.active() as model:
            whole = model.generate(torch.cat([found.ids, ids])[None], max_new_tokens=5, do_sample=False)[0]
        options = {"max_new_tokens": 5, "do_sample": False, "retrieve": 60}
        answer = learner.generate(ids, **options)
        assert torch.equal(answer, torch.cat([ids, whole[len(found.ids) + len(ids) :]]))
        expected = learner.tokenizer.decode(answer[len(ids) :], skip_special_tokens=True)
        assert learner.generate(prompt, **options) == expected
        report = learner.generate(ids, return_dict_in_generate=True, **options)
        assert torch.equal(report.sequences[0], answer)
        assert torch.equal(learner.generate(ids[None], **options)[0], answer)

    def test_behind_the_token_that_begins_a_document(self, learner, monkeypatch):
        seen = []
        real = type(learner.model).generate
        monkeypatch.setattr(
            type(learner.model), "generate", lambda m, ids, **o: seen.append(ids) or real(m, ids, **o)
        )
        monkeypatch.setattr(learner, "tokenizer", copy.deepcopy(learner.tokenizer))
        learner.tokenizer.bos_token = "Q"
        bos = learner.tokenizer.bos_token_id
        assert bos == ord("Q")
        ids = torch.tensor([bos, *b"Where does Ben live?"])
        learner.generate(ids, max_new_tokens=2, do_sample=False, retrieve=60)
        passages = learner.retrieve(ids, 60).ids
        assert torch.equal(seen[0][0], torch.cat([ids[:1], passages, ids[1:]]))

    def test_it_is_not_learned_again(self, learner):
        before = learner.memory.rows[0].position
        answer = learner.generate(
            torch.tensor(list(b"Where does Ben live?")),
            max_new_tokens=3,
            do_sample=False,
            retrieve=60,
            learn=True,
        )
        assert learner.memory.rows[0].position == before + len(answer) == before + 23

    def test_scores_of_a_text_with_a_context(self, learner):
        text, context = "Ben lives in Lissabon.", learner.retrieve("Ben", 60).ids
        found = learner.score(text, context=context)
        assert len(found) == len(text)
        ids = torch.tensor(list(text.encode()))
        assert torch.equal(found, learner.score(torch.cat([context, ids]))[len(context) :])
        assert torch.equal(learner.score([text, text], context="a b")[1], learner.score(text, context="a b"))
        empty = learner.retrieve("Quantum", 60).ids
        assert torch.equal(learner.score(text, context=empty)[1:], learner.score(text)[1:])


class TestRefused:
    def test_what_makes_no_sense(self, learner):
        for tokens in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match="tokens must be"):
                learner.retrieve("Ben", tokens)
        with pytest.raises(ValueError, match="row must be"):
            learner.retrieve("Ben", 10, row=1)
        with pytest.raises(ValueError, match="retrieve takes one sequence"):
            learner.generate(random_ids(2, 5), retrieve=10)

    def test_where_nothing_is_kept(self):
        learner = stack_levels(MODEL, levels=[Level(8, 0.1)])
        with pytest.raises(ValueError, match="keeps nothing of what it read"):
            learner.retrieve(torch.arange(3), 10)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bm25s", None)
        with pytest.raises(ValueError, match=r"pip install 'nested-learning-torch\[retrieval\]'"):
            Retriever(None)
