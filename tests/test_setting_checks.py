"""Fields of settings against their annotations, also those that a third party may write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal, NewType, Protocol, TypeVar

import pytest

from nested_learning._checks import check_types, expected, fits

Metres = NewType("Metres", float)
AnyKind = TypeVar("AnyKind")


class Shouts(Protocol):
    def shout(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (tuple[int, ...], [(), [1], (1, 2, 3)], [1, ("a",), (1, 2.5), "12"]),
        (tuple[int, str], [(1, "a"), [1, "a"]], [(1,), ("a", 1), (1, "a", 2)]),
        (tuple, [(), [1, "a"]], [1, "ab", {}]),
        (Sequence[float], [[], (1, 2.5)], ["12", ["a"], [float("nan")], {1.0: 2}]),
        (Sequence, [[], ("a", 1)], ["ab", 1]),
        (list[tuple[int, ...]], [[], [(1, 2), [3]]], [[1], [("a",)]]),
        (Mapping[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "b"}, [("a", 1)]]),
        (dict[str, list[int]], [{"a": [1]}], [{"a": 1}, {"a": ["b"]}]),
        (dict, [{}, {1: 2}], [[], 1]),
        (tuple[Literal["a", "b"], ...] | None, [None, ["a", "b"]], [["c"], "a"]),
        (Metres, [1, 2.5], ["1", True]),
        (AnyKind, [1, "a", True, None], []),
        (Shouts, [1, "a", True, None], []),
        (Any, [1, "a", True, None], []),
        (type(None), [None], [0, False, ""]),
    ],
)
def test_values_of_a_kind(kind, good, bad):
    assert [value for value in good if not fits(value, kind)] == []
    assert [value for value in bad if fits(value, kind)] == []
    assert expected(kind)


def test_kinds_in_words():
    number = expected(int)
    assert expected(tuple[int, ...]) == expected(Sequence[int]) == f"a list, each of it {number}"
    assert expected(tuple[int, int]) == f"2 values, each {number}"
    assert expected(tuple[int, str]) == f"2 values: {number}, text"
    assert expected(Mapping[str, int]) == expected(dict)


def test_an_annotation_of_nothing_is_named_with_its_class():
    options = make_dataclass("Lost", [("length", int), ("depth", "Nowhere")])(1, 2)
    with pytest.raises(ValueError, match=r"annotations of Lost cannot be read \(depth: Nowhere: .*'Nowhere'"):
        check_types(options)


def test_a_message_says_how_the_field_is_set():
    @dataclass
    class Plain:
        length: int = "a"  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"^length is 'a'; .* Set --length accordingly\.$"):
        check_types(Plain())
    with pytest.raises(ValueError, match=r"^x\.length is 'a'; .* Set --option t\.x\.length=… accordingly\.$"):
        check_types(Plain(), "x.", "--option t.{}=…")
