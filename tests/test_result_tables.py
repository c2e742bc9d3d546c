"""Cells of the tables on the page of results, of rows made by hand."""

from nested_learning.evals.rows import MethodRow
from website.tables import Difference, Means, ResultTable

ROWS = {
    "a": MethodRow("a", figures={0: {"x": 1.0, "y": 0.0}, 1: {"x": 1.0, "y": 0.5}, 2: {"x": 1.0, "y": 1.0}}),
    "b": MethodRow("b", figures={0: {"x": 0.5, "y": 0.1}, 1: {"x": 0.6, "y": 0.2}, 2: {"x": 0.7, "y": 0.6}}),
}
METHODS = ["a", "b", "absent"]
METHOD_HEADS = {"a": "first", "b": "second"}


def test_means_and_the_best_of_them() -> None:
    assert Means(("x",), best="highest").texts(ROWS, METHODS) == ["**1.000**", "0.600", ""]
    assert Means(("y",), decimals=2, best="lowest").texts(ROWS, METHODS) == ["0.50", "**0.30**", ""]
    assert Means(("x", "y"), decimals=2, exact=True).texts(ROWS, METHODS) == ["1 / 0.50", "0.60 / 0.30", ""]
    assert Means(("y",), best="highest").texts(ROWS, ["absent"]) == [""]
    assert Means(("z",)).texts(ROWS, METHODS) == ["–", "–", ""]


def test_differences_are_paired_and_have_an_interval() -> None:
    # of x: −0.5, −0.4, −0.3; t of two degrees of freedom is 4.3027, and 4.3027 · 0.1 / √3 = 0.2484
    assert Difference("x", "a").texts(ROWS, METHODS) == ["", "−0.400 [−0.648, −0.152]", ""]
    assert Difference("x", "a", less=True, decimals=2).texts(ROWS, ["b"]) == ["0.40 [0.15, 0.65]"]
    alone = {**ROWS, "b": MethodRow("b", figures={0: {"x": 0.5}})}
    assert Difference("x", "a").texts(alone, ["b"]) == [""]  # one seed has no interval


def test_methods_stand_beside_one_another_or_below() -> None:
    heads, cells = {"a": "first", "b": "second"}, {"X": Means(("x",), decimals=1)}
    across = ResultTable("t", "task", heads, cells, corner="c").text(ROWS)
    assert across == "| c | first | second |\n|---|---|---|\n| X | 1.0 | 0.6 |\n"
    below = ResultTable("t", "task", heads, cells, across=False).text(ROWS)
    assert below == "|  | X |\n|---|---|\n| first | 1.0 |\n| second | 0.6 |\n"


def test_a_table_may_be_of_some_seeds_alone() -> None:
    cells = {"Y": Means(("y",), decimals=1), "of a": Difference("y", "a", decimals=1)}
    text = ResultTable("t", "task", METHOD_HEADS, cells, seeds=(1, 2, 9)).text(ROWS)
    assert "| Y | 0.8 | 0.4 |" in text
    alone = {**ROWS, "b": MethodRow("b", figures={0: {"y": 9.0}})}
    assert "| Y | 0.8 | – |" in ResultTable("t", "task", METHOD_HEADS, cells, seeds=(1, 2)).text(alone)
