"""Verdicts against hand-made rows, intervals against the definition and against SciPy."""

import pytest

from nested_learning.evals import Ahead, MethodRow, Reaches
from nested_learning.evals.claims import DOES_NOT, HOLDS, UNTOLD, interval, t_quantile


def rows(**values):
    return {
        name: MethodRow(name, {}, {s: {"x": v} for s, v in enumerate(each)}) for name, each in values.items()
    }


def verdict(order, figures, **options):
    return Ahead("", "", "x", order, **options).judge(rows(**figures)).verdict


def test_interval():
    # mean 2, s = 1, n = 3: 2 ± 4.3027 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48415, 2 + 2.48415), abs=1e-4)
    assert interval([1.0]) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.70620474),
        (2, 4.30265273),
        (3, 3.18244631),
        (10, 2.22813885),
        (20, 2.08596345),
        (21, 2.07961384),
        (30, 2.04227246),
        (60, 2.00029782),
        (120, 1.97993041),
        (149, 1.97601318),
        (1000, 1.96233908),
    ],
)
def test_quantiles_are_those_of_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-8)


def test_quantiles_are_those_of_student():
    stats = pytest.importorskip("scipy.stats")
    for freedom in [*range(1, 400), 1000, 9999]:
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-9)


def test_intervals_of_many_pairs():
    half = 2.04227246 / 31**0.5 * (sum((n - 15) ** 2 for n in range(31)) / 30) ** 0.5
    assert interval([float(n) for n in range(31)]) == pytest.approx((15 - half, 15 + half))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], HOLDS),  # the differences agree although the values vary
        ([0.8, 0.7, 0.6], [0.9, 0.8, 0.7], DOES_NOT),
        ([0.9, 0.5, 0.7], [0.6, 0.7, 0.6], UNTOLD),
        ([0.9], [0.1], UNTOLD),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], UNTOLD),
    ],
)
def test_a_pair(a, b, expected):
    assert verdict(("a", "b"), {"a": a, "b": b}) == expected
    opposite = {HOLDS: DOES_NOT, DOES_NOT: HOLDS, UNTOLD: UNTOLD}[expected]
    assert verdict(("a", "b"), {"a": a, "b": b}, higher=False) == opposite


def test_differences_are_paired_by_seed():
    a = MethodRow("a", {}, {0: {"x": 1.0}, 1: {"x": 2.0}, 2: {"x": 3.0}})
    b = MethodRow("b", {}, {2: {"x": 2.9}, 1: {"x": 1.9}, 0: {"x": 0.9}, 3: {"x": 100.0}})
    assert Ahead("", "", "x", ("a", "b")).judge({"a": a, "b": b}).verdict == HOLDS


def test_a_chain():
    high, middle, low = [0.9, 0.9, 0.91], [0.5, 0.51, 0.5], [0.1, 0.1, 0.11]
    noisy = [0.1, 0.9, 0.5]
    figures = {"h": high, "m": middle, "l": low, "n": noisy}
    assert verdict(("h", "m", "l"), figures) == HOLDS
    assert verdict(("h", "l", "m"), figures) == DOES_NOT
    assert verdict(("h", "m", "n"), figures) == UNTOLD
    assert verdict(("m", "h", "n"), figures) == DOES_NOT  # one pair on the other side decides
    assert verdict(("h", "missing"), figures) == UNTOLD


def test_baselines_at_chance_tell_nothing():
    ours, theirs = [0.9, 0.9, 0.91], [0.1, 0.12, 0.11]
    figures = {"a": ours, "b": theirs, "c": [0.5, 0.5, 0.51]}
    assert verdict(("a", "b"), figures) == HOLDS
    assert verdict(("a", "b"), figures, chance=0.11) == UNTOLD
    assert verdict(("a", "b"), figures, chance=0.05) == HOLDS
    assert verdict(("a", "c", "b"), figures, chance=0.11) == HOLDS  # not every baseline is at chance


def test_a_figure_that_is_reached():
    found = rows(all=[1.0, 1.0, 1.0], some=[1.0, 0.99, 1.0], none=[0.5, 0.4, 0.3])

    def judge(name, **options):
        return Reaches("", "", name, {"x": 1.0}, **options).judge(found).verdict

    assert (judge("all"), judge("some"), judge("none"), judge("absent")) == (HOLDS, UNTOLD, DOES_NOT, UNTOLD)
    assert judge("none", higher=False) == HOLDS


def test_the_figures_behind_a_verdict_are_told():
    because = Ahead("", "", "x", ("a", "b")).judge(rows(a=[1.0, 2.0, 3.0], b=[0.5, 1.0, 1.5])).because
    assert because == "a − b +1 [-0.2421, +2.242], 3 seeds"
