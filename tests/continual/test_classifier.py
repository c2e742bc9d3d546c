"""The classifier's sums against those of all examples at once, whatever the order; its files."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_learning.continual import Level, stack_levels
from nested_learning.continual.labels.class_head import ClassHead, HeadSettings, RandomFeatures
from tests.continual.tiny_models import VOCAB, random_ids, tiny_model
from tests.damage import check_refusal, damaged_content, read_file, write_checked

LEVELS = [Level(4, 0.3), Level(8, 0.1)]
KERNEL = {"kind": "kernel lda", "width": 40, "first": 12}


def examples(count=30, size=6, classes=4, seed=0):
    """Features around different means, with one dimension that is large for all, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = [f"class {i % classes}" for i in range(count)]
    centres = torch.randn(classes, size, generator=generator, dtype=torch.float64) * 2
    x = torch.randn(count, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = x + centres[[i % classes for i in range(count)]]
    x[:, 0] += 1e4
    return x, labels


def textbook(x, labels, query, shrinkage):
    """Log-densities of Gaussians with the classes' means and one covariance, by torch.distributions."""
    names = list(dict.fromkeys(labels))
    means = torch.stack([x[[i for i, each in enumerate(labels) if each == name]].mean(0) for name in names])
    centred = x - means[[names.index(label) for label in labels]]
    covariance = centred.T @ centred / len(x)
    scale = covariance.trace() / len(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * scale * torch.eye(len(covariance)).double()
    found = [torch.distributions.MultivariateNormal(m, covariance).log_prob(query) for m in means]
    return torch.stack(found, 1)


class TestTheHead:
    @pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 11, 2, 10]])
    @pytest.mark.parametrize(("kind", "shrinkage"), [("lda", 0.1), ("lda", 0.9), ("means", 0.3)])
    def test_is_discriminant_analysis_of_all_examples(self, pieces, kind, shrinkage):
        x, labels = examples()
        head, start = ClassHead(HeadSettings(kind, shrinkage=shrinkage)), 0
        for piece in pieces:
            head.learn(x[start : start + piece], labels[start : start + piece])
            start += piece
        query = examples(seed=1)[0]
        expected = textbook(x, labels, query, 1.0 if kind == "means" else shrinkage)
        found = head.scores(query)
        assert head.labels == list(dict.fromkeys(labels))
        torch.testing.assert_close(found.softmax(1), expected.softmax(1), rtol=1e-6, atol=1e-9)

    def test_kernel_lda_is_it_on_random_features(self):
        x, labels = examples()
        head = ClassHead(HeadSettings(**KERNEL))
        for start in range(0, 30, 7):  # past the first 12 in the middle of a piece
            head.learn(x[start : start + 7], labels[start : start + 7])
        query = examples(seed=1)[0]
        z, q = head.mapped.of(x), head.mapped.of(query)
        expected = textbook(z, labels, q, 0.1).softmax(1)
        torch.testing.assert_close(head.scores(query).softmax(1), expected, rtol=1e-6, atol=1e-9)
        assert head.waiting is None

    def test_random_features_approximate_the_kernel(self):
        x, _ = examples()
        settings = HeadSettings("kernel lda", width=20_000, bandwidth=0.7)
        z = RandomFeatures.fitted(x, settings).of(x)
        scaled = (x - x.mean(0)) / x.std(0, correction=0)
        distances = torch.cdist(scaled, scaled)
        median = torch.pdist(scaled).median()
        expected = torch.exp(-(distances**2) / (2 * (0.7 * median) ** 2))
        torch.testing.assert_close(z @ z.T, expected, rtol=0, atol=0.03)

    @pytest.mark.parametrize("kind", ["means", "lda", "kernel lda"])
    def test_the_order_does_not_matter(self, kind):
        """Of "kernel lda" beyond the first examples; the order of new labels is that of the columns."""
        x, labels = examples(60)
        mixed = list(range(12, 60))
        random.Random(0).shuffle(mixed)
        query, found = examples(seed=1)[0], []
        for order in (range(60), [*range(12), *mixed]):
            head = ClassHead(HeadSettings(**{**KERNEL, "kind": kind}))
            for place in order:
                head.learn(x[place : place + 1], [labels[place]])
            found.append(head.scores(query))
        torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("kind", ["means", "lda", "kernel lda"])
    def test_a_single_example_of_each_class_is_enough(self, kind):
        x, labels = examples(4)
        head = ClassHead(HeadSettings(kind, width=40))
        for place in range(4):
            head.learn(x[place : place + 1], [labels[place]])
            assert head.scores(x[: place + 1]).argmax(1).tolist() == list(range(place + 1))

    def test_asking_early_changes_nothing(self):
        x, labels = examples()
        asked, silent = ClassHead(HeadSettings(**KERNEL)), ClassHead(HeadSettings(**KERNEL))
        for place in range(30):
            for head in (asked, silent):
                head.learn(x[place : place + 1], [labels[place]])
            asked.scores(x)
        assert torch.equal(asked.scores(x), silent.scores(x))

    def test_of_curved_classes(self):
        """A ring around a blob has the same mean: a linear boundary fails, the kernel's does not."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(400, 2, generator=generator, dtype=torch.float64)
        x[::2] = x[::2] / x[::2].norm(dim=1, keepdim=True) * 4
        labels = ["ring", "blob"] * 200
        right = {}
        for kind in ("lda", "kernel lda"):
            head = ClassHead(HeadSettings(kind, shrinkage=0.01, width=200))
            head.learn(x[:300], labels[:300])
            found = head.scores(x[300:]).argmax(1)
            right[kind] = float((found == torch.tensor([0, 1] * 50)).double().mean())
        assert right["lda"] < 0.7
        assert right["kernel lda"] > 0.9


def texts_of(label, count, seed):
    """Ids of texts of some tokens alone."""
    generator = torch.Generator().manual_seed(seed)
    low = {"low": 0, "high": VOCAB // 2}[label]
    return [torch.randint(low, low + 6, (20 + i % 4,), generator=generator) for i in range(count)]


@pytest.fixture(scope="module")
def learner():
    return stack_levels(tiny_model(), levels=LEVELS)


class TestTheClassifier:
    def test_learns_and_predicts(self, learner):
        for kind in ("means", "lda", "kernel lda"):
            classifier = learner.classifier(kind, depth=0.0, width=300)
            classifier.learn(texts_of("low", 40, 0), ["low"] * 40)
            for text in texts_of("high", 40, 1):
                classifier.learn(text, "high")
            queries = [*texts_of("low", 5, 2), *texts_of("high", 5, 3)]
            assert classifier.predict(queries) == ["low"] * 5 + ["high"] * 5
            assert classifier.predict(queries[7]) == "high"
            assert classifier.labels == ["low", "high"]
            scores = classifier.scores(queries)
            assert scores.shape == (10, 2)
            torch.testing.assert_close(classifier.scores(queries[3]), scores[3], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("depth", "pooling", "layer"), [(0.0, "mean", 0), (0.5, "last", 1), (1, "mean", 2)]
    )
    def test_its_features_are_hidden_states(self, learner, depth, pooling, layer):
        text = random_ids(9)
        classifier = learner.classifier("means", depth=depth, pooling=pooling)
        classifier.learn([text[:4], text], ["short", "long"])
        with torch.no_grad():
            states = learner.model(text[None], output_hidden_states=True).hidden_states[layer][0]
        expected = states.mean(0) if pooling == "mean" else states[-1]
        torch.testing.assert_close(classifier.head.sums.means[1], expected)

    def test_with_what_a_row_has_learned(self):
        learner = stack_levels(tiny_model(), levels=LEVELS)
        base = learner.classifier("means")
        base.learn(random_ids(9), "a")
        learner.observe(random_ids(2, 30))
        after, mine = learner.classifier("means"), learner.classifier("means", row=1)
        for classifier in (after, mine):
            classifier.learn(random_ids(9), "a")
        assert torch.equal(after.head.sums.means, base.head.sums.means)
        with learner.active(row=1) as model, torch.no_grad():
            states = model(random_ids(9)[None], output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(mine.head.sums.means[0], states.mean(0))
        assert (mine.head.sums.means - base.head.sums.means).abs().max() > 1e-6
        with pytest.raises(ValueError, match="row must be from 0 to 1"):
            learner.classifier(row=2)

    @pytest.mark.parametrize(
        ("work", "message"),
        [
            (lambda c: c.predict(random_ids(5)), "no label was learned yet"),
            (lambda c: c.learn(random_ids(5), 3), "text as the label"),
            (lambda c: c.learn(random_ids(5), ""), "text as the label"),
            (lambda c: c.learn([random_ids(5), random_ids(5)], "ab"), "text as the label"),
            (lambda c: c.learn([random_ids(5), random_ids(5)], ["a"]), r"1 label\(s\) for 2 example\(s\)"),
            (lambda c: c.learn(random_ids(65), "a"), "65 tokens, the model 64 positions"),
            (lambda c: c.learn("text", "a"), "no tokenizer"),
        ],
    )
    def test_refuses_what_makes_no_sense(self, learner, work, message):
        classifier = learner.classifier()
        with pytest.raises(ValueError, match=message):
            work(classifier)
        assert classifier.labels == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "svm"}, "kind must be one of means, lda, kernel lda"),
            ({"depth": 1.5}, "depth must be"),
            ({"pooling": "max"}, "pooling must be"),
            ({"shrinkage": 0.0}, "shrinkage must be"),
            ({"width": 0}, "width must be"),
            ({"bandwidth": 0.0}, "bandwidth must be"),
            ({"first": 0}, "first must be"),
            ({"seed": -1}, "seed must be"),
            ({"colour": 1}, "options of a classifier are kind, shrinkage"),
        ],
    )
    def test_refuses_settings(self, learner, arguments, message):
        with pytest.raises(ValueError, match=message):
            learner.classifier(**arguments)


class TestFiles:
    @pytest.mark.parametrize(
        ("kind", "count"), [("means", 9), ("lda", 9), ("kernel lda", 4), ("kernel lda", 9)]
    )
    def test_learning_goes_on(self, learner, tmp_path, kind, count):
        options = {"kind": kind, "width": 30, "first": 10}
        first, second, loaded = (learner.classifier(**options) for _ in range(3))
        for classifier in (first, second):
            classifier.learn(texts_of("low", count, 0), ["low"] * count)
        first.save(tmp_path / "file")
        loaded.load(tmp_path / "file")
        for classifier in (second, loaded):
            classifier.learn(texts_of("high", count, 0), ["high"] * count)
        queries = texts_of("low", 4, 1)
        assert torch.equal(loaded.scores(queries), second.scores(queries))
        assert loaded.labels == ["low", "high"]

    def test_of_another_classifier(self, learner, tmp_path):
        classifier = learner.classifier()
        classifier.learn(random_ids(5), "a")
        classifier.save(tmp_path / "file")
        other_model = stack_levels(tiny_model(seed=1), levels=LEVELS)
        for other, message in (
            (other_model.classifier(), "on another base model"),
            (learner.classifier("means"), "with other settings"),
            (learner.classifier(depth=1.0), "with other features"),
            (learner.classifier(row=0), "with other features"),
        ):
            with pytest.raises(ValueError, match=message):
                other.load(tmp_path / "file")
            assert other.labels == []
        learner.memory.save(tmp_path / "memory")
        with pytest.raises(ValueError, match="not that of a classifier"):
            classifier.load(tmp_path / "memory")
        with pytest.raises(FileNotFoundError, match="no classifier file"):
            classifier.load(tmp_path / "none")
        assert classifier.labels == ["a"]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), labels=st.sampled_from([2, 4]))
    def test_a_damaged_one_is_refused_or_works(self, learner, tmp_path, data, labels):
        path = tmp_path / "file"
        classifier = learner.classifier("kernel lda", width=5, first=3)
        classifier.learn(texts_of("low", labels, 0), ["low", "high", "low", "low"][:labels])
        classifier.save(path)
        write_checked(path, *data.draw(damaged_content(*read_file(path))))
        other = learner.classifier("kernel lda", width=5, first=3)
        other.learn(random_ids(5), "mine")
        try:
            other.load(path)
        except ValueError as error:
            check_refusal(error, path)
            assert other.labels == ["mine"]
        else:
            assert other.scores(random_ids(5)).isfinite().all()
