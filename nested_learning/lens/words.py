"""Texts of single tokens, which together are the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, hence tokens
UNKNOWN = "\ufffd"


def words(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token.

    A character of several tokens stands with the last of them, the others are empty. Without a tokenizer the
    texts are the ids.
    """
    if tokenizer is None:
        return tuple(f"{index} " for index in ids)
    found: list[str] = []
    before: list[
        int
    ] = []  # the tokens before `unfinished`: a decoder may drop the space of the first word it is given
    unfinished: list[int] = []
    for index in ids:
        unfinished.append(index)
        text = _decode(tokenizer, before + unfinished)
        start = _decode(tokenizer, before) if before else ""
        new = text[len(start) :] if text.startswith(start) else _decode(tokenizer, unfinished)
        if new.endswith(UNKNOWN) and len(unfinished) < LONGEST_CHARACTER:
            found.append("")
            continue
        found.append(new)
        before, unfinished = unfinished, []
    if unfinished:
        found[-1] = _decode(tokenizer, unfinished)
    return tuple(found)


def word(tokenizer: Any, index: int) -> str:
    """The text of a token by itself."""
    return str(index) if tokenizer is None else _decode(tokenizer, [index])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
