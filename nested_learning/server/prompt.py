"""A conversation as the ids that the model is to go on from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from nested_learning.training.data.tokenizers import CHAT_TEMPLATE

# Names before the messages, where the tokenizer has no chat template: "User: Hello\nAssistant:".
NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


def conversation_ids(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Ids of a conversation, by the tokenizer's chat template, or with names before the messages without one.

    Args:
        tokenizer: tokenizer of the model.
        messages: (role, text) of each: "system", "user" or "assistant".

    Raises:
        ValueError: the template does not take such a conversation.
    """
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": role, "content": text} for role, text in messages]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template says so by any exception of its own
            raise ValueError(f"the model's chat template does not take this conversation: {error}") from error
    else:
        text = "".join(f"{NAMES[role]}: {text}\n" for role, text in messages) + "Assistant:"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turn_ends(tokenizer: Any) -> tuple[str, ...]:
    """Texts before which an answer ends: where messages are told apart by names alone, the next user's name.

    Models that were trained on text alone go on with both parts of a conversation, and write no end.
    """
    by_names = getattr(tokenizer, "chat_template", None) in (None, "", CHAT_TEMPLATE)
    return (f"\n{NAMES['user']}:",) if by_names else ()


def newest_ids(tokenizer: Any, messages: Sequence[tuple[str, str]], room: int) -> list[int]:
    """Ids of a conversation whose oldest turns are left out until it has `room` tokens at most, or nothing
    but the last message is left; system messages stay. Fewer turns make no more tokens."""
    turns = [index for index, (role, _) in enumerate(messages) if role != "system"]
    # templates want a user's message first
    starts = [n for n in range(len(turns)) if not n or messages[turns[n]][0] == "user"]

    def ids_from(first: int) -> list[int]:
        dropped = set(turns[:first])
        kept = [message for index, message in enumerate(messages) if index not in dropped]
        return conversation_ids(tokenizer, kept)

    ids = ids_from(0)
    if len(ids) > room and len(starts) > 1:
        at = bisect_left(starts, True, 1, key=lambda first: len(ids_from(first)) <= room)
        ids = ids_from(starts[min(at, len(starts) - 1)])
    return ids


def fitting_ids(
    tokenizer: Any, messages: Sequence[tuple[str, str]], positions: int, for_answer: int
) -> list[int]:
    """Ids of a conversation whose oldest turns are left out until it fits; system messages and the last stay.

    Args:
        tokenizer, messages: as above.
        positions: most tokens that the model reads.
        for_answer: tokens of them that are for the answer.

    Raises:
        ValueError: the last message alone does not fit.
    """
    ids = newest_ids(tokenizer, messages, positions - for_answer)
    if len(ids) <= positions - for_answer:
        return ids
    raise ValueError(
        f"the last message has {len(ids)} tokens with its frame and the system's messages, but the model "
        f"reads {positions} positions, of which {for_answer} are for the answer; send a shorter one"
    )
