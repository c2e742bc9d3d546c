"""Language modelling and its ablations: text, scores, one trial, claims."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nested_learning.evals import find_method, find_task
from nested_learning.evals.fit import Diverged
from nested_learning.evals.methods.models import MODELS, Size
from nested_learning.evals.rows import MethodRow
from nested_learning.evals.task import TUNING_SEED
from nested_learning.evals.tasks.language import text as texts_of
from nested_learning.evals.tasks.language.ablations import HOPE, ROWS, VARIANTS
from nested_learning.training.data import byte_tokenizer

END = 256
TRANSFORMER, DELTANET = MODELS[0], MODELS[2]


@pytest.fixture
def files(tmp_path):
    """A text of one document, and a folder of twelve."""
    (tmp_path / "one.txt").write_text("".join(f"{n} is {n * n}\n" for n in range(3000)))
    many = tmp_path / "many"
    many.mkdir()
    for n in range(12):
        (many / f"{n}.txt").write_text(f"document {n}\n" + "abcdefgh" * (40 + 10 * n))
    return [str(tmp_path / "one.txt"), str(many)]


def trial(files, name="language", **changed):
    options = {"texts": files, "length": 96, "documents": 3, **changed}
    return find_task(name).at("smoke", **options)


def test_the_parts_of_a_text_have_no_text_in_common(files):
    one, many = (texts_of.split_text(source, 1 << 20) for source in files)
    whole = np.concatenate([part.ids[part.ids != END] for part in (one.train, one.tuning, one.test)])
    expected = np.frombuffer(Path(files[0]).read_bytes(), np.uint8)
    assert np.array_equal(whole, expected)  # in order: 90 %, 5 %, 5 %
    assert len(one.train.ids) == pytest.approx(0.9 * len(expected), abs=2)
    names = [
        {bytes(document.astype(np.uint8)).split(b"\n")[0] for document in np.split(part.ids, ends + 1)[:-1]}
        for part in (many.train, many.tuning, many.test)
        for ends in [np.flatnonzero(part.ids == END)]
    ]
    assert len(names[0]) == 11
    assert not names[0] & (names[1] | names[2])


def test_equal_shares_of_every_text_in_an_order_by_seed(files):
    texts = {source: texts_of.split_text(source, 1 << 20) for source in files}
    samples = [texts_of.training_samples(texts, 32, 12, seed) for seed in (0, 0, 1)]
    first, again, other = (torch.stack([data[i]["input_ids"] for i in range(12)]) for data in samples)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    numbers = [bool((row == ord("\n")).sum() > 1) for row in first]  # lines of the first text are short
    assert numbers == [True, False] * 6
    with pytest.raises(IndexError):
        samples[0][12]


def test_documents_by_position_come_from_all_texts(files):
    texts = {source: texts_of.split_text(source, 1 << 20) for source in files}
    found = texts_of.long_documents(texts, 200, 2)
    assert [len(document) for document in found] == [200, 200]
    assert bytes(found[0][:40].astype(np.uint8)) in Path(files[0]).read_bytes()
    assert bytes(found[1][-40:].astype(np.uint8)) in b"abcdefgh" * 6
    assert not texts_of.long_documents(texts, 1 << 20, 2)


def test_the_bits_of_frequencies(tmp_path):
    """Half of all bytes are a, half b: a bit each, and the end of a document is next to free."""
    path = tmp_path / "ab.txt"
    path.write_text("ab" * 20_000)
    text = texts_of.split_text(str(path), 1 << 20)
    assert texts_of.unigram_bits({"ab": text})["ab"] == pytest.approx(1.0, abs=0.02)


def test_a_run_scores_what_the_model_gives(files):
    """Losses by hand, of the model that the task trains."""
    task = trial(files[:1], documents=1)
    method = TRANSFORMER.at({"lr": 1e-3})
    contender = task._trained(method, 3, task._texts())
    figures = task.run(method, 3)
    text = texts_of.split_text(files[0], task.options.max_bytes).test
    blocks = texts_of.held_out_blocks(text, task.options.block, task.options.blocks)
    ids = torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))])
    with torch.no_grad():
        logits = contender.model.eval()(ids).logits
        nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        document = torch.from_numpy(text.ids[: task.options.length].astype(np.int64))[None]
        losses = torch.nn.functional.cross_entropy(
            contender.model(document).logits[0, :-1], document[0, 1:], reduction="none"
        )
    bits = nats.item() / (text.num_bytes / len(text.ids)) / math.log(2)
    assert figures["bits_per_byte"] == figures["one"] == pytest.approx(bits, rel=1e-5)
    assert figures["carried"] == pytest.approx(losses.mean().item() / math.log(2), rel=1e-4)
    assert figures["carried@32"] == pytest.approx(losses[31:63].mean().item() / math.log(2), rel=1e-4)
    assert figures["empty@16"] == pytest.approx(losses[15:31].mean().item() / math.log(2), rel=1e-4)
    assert figures["empty"] != figures["carried"]
    assert figures["parameters"] == sum(p.numel() for p in contender.model.parameters())


def test_a_run_is_the_same_again_and_tuning_reads_other_text(files):
    task = trial(files)
    method = DELTANET.at({"lr": 1e-3})
    first, again = task.run(method, 1), task.run(method, 1)
    seconds = ("seconds", "training_seconds")
    assert {k: v for k, v in first.items() if k not in seconds} == {
        k: v for k, v in again.items() if k not in seconds
    }
    tuned = task.tune(method, 1)
    assert set(tuned) == {"bits_per_byte", "one", "many"}
    assert tuned["one"] != first["one"]
    assert tuned["bits_per_byte"] == pytest.approx((tuned["one"] + tuned["many"]) / 2)
    assert TUNING_SEED not in range(task.options.seeds)


def test_a_loss_that_is_not_finite_ends_the_run(files):
    with pytest.raises(Diverged, match="learning rate of 1e\\+30"):
        trial(files, steps=6).run(TRANSFORMER.at({"lr": 1e30}), 0)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTED_LEARNING_DATA", str(tmp_path))
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path))
    task = find_task("language").at("small")
    assert "NESTED_LEARNING_DATA" in task.missing()
    assert "wikitext2_valid.txt" in task.note()
    assert task.constants() == {"uniform": {"tinyshakespeare": 8.0, "stdlib": 8.0, "bits_per_byte": 8.0}}
    assert find_task("language").at("smoke", texts=["stdlib"]).missing() is None


def test_two_texts_of_one_name_are_refused(files):
    with pytest.raises(ValueError, match="different names"):
        trial([files[0], files[0]]).run(TRANSFORMER, 0)


def test_wikitext_is_measured_where_it_is(files, monkeypatch, tmp_path):
    (tmp_path / texts_of.WIKITEXT).write_text(" = Heading = \n" + "words , words .\n" * 40)
    monkeypatch.setenv("NESTED_LEARNING_DATA", str(tmp_path))
    assert 4 < trial(files[:1]).run(TRANSFORMER, 0)["wikitext2"] < 9


def test_claims_are_decided_by_loss():
    def rows(**bits):
        return {
            name.replace("_", "-"): MethodRow(
                name.replace("_", "-"),
                figures={
                    seed: {"bits_per_byte": value + 0.1 * seed + 0.001 * seed * value} for seed in range(3)
                },
            )
            for name, value in bits.items()
        }

    claims = {(claim.order[0], claim.order[2]): claim for claim in find_task("language").at("small").claims()}
    claim = claims["hope", "gated-deltanet"]
    assert claim.judge(rows(hope=2.0, titans=2.1, gated_deltanet=2.2, transformer=2.3)).verdict == "holds"
    assert claim.judge(rows(hope=2.0, titans=2.3, gated_deltanet=2.2, transformer=2.1)).verdict == "does not"
    assert claim.judge(rows(hope=2.0, titans=2.1)).verdict == "cannot be told here"
    found = {claim.order: claim.source for claim in find_task("ablations").at("small").claims()}
    assert found[("hope-static-q", HOPE)] == "Table 6"
    assert found[(HOPE, "hope-no-retention")] == "Table 6"


def test_each_ablation_lacks_one_thing_at_equal_size():
    size = Size(len(byte_tokenizer()), 256, layers=1)
    built = {method.name: method.new_model(size, 0) for method in VARIANTS}
    systems = {name: model.model.layers[0].mixer.system for name, model in built.items()}
    whole = systems[HOPE]
    assert whole.generated == ("k", "v", "q", "eta", "alpha")
    assert whole.momentum
    assert whole.rule[whole.architecture.output].erase
    changed = {
        "hope-no-momentum": ("momentum", False),
        "hope-static-k": ("generated", ("v", "q", "eta", "alpha")),
        "hope-static-v": ("generated", ("k", "q", "eta", "alpha")),
        "hope-static-q": ("generated", ("k", "v", "eta", "alpha")),
    }
    for name, (field, value) in changed.items():
        others = [each for each in ("momentum", "generated") if each != field]
        assert getattr(systems[name], field) == value
        assert all(getattr(systems[name], other) == getattr(whole, other) for other in others)
        assert systems[name].rule == whole.rule
    assert not systems["hope-no-dgd"].rule[whole.architecture.output].erase
    assert systems["hope-no-dgd"].generated == whole.generated
    assert systems["hope-no-retention"].retention.decay == "none"
    assert systems["hope-no-retention"].generated == ("k", "v", "q", "eta")
    assert systems["hope-no-cms"] == whole
    assert [len(built[name].config.cms_levels) for name in (HOPE, "hope-no-cms")] == [2, 1]
    counts = [model.num_parameters() for model in built.values()]
    assert max(counts) <= 1.01 * min(counts)
    assert set(ROWS) == set(built)
    assert all(find_method(name) in VARIANTS for name in built)
