"""A conversation as the ids that the model is to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    turns = [index for index, (role, _) in enumerate(messages) if role != "system"]
    for first in range(len(turns)):
        dropped = set(turns[:first])
        kept = [message for index, message in enumerate(messages) if index not in dropped]
        if first and messages[turns[first]][0] != "user":  # templates want a user's message first
            continue
        ids = conversation_ids(tokenizer, kept)
        if len(ids) <= positions - for_answer:
            return ids
    raise ValueError(
        f"the last message has {len(ids)} tokens with its frame and the system's messages, but the model "
        f"reads {positions} positions, of which {for_answer} are for the answer; send a shorter one"
    )
