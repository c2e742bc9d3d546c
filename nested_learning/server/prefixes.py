"""Which messages were learned: hashes of the beginnings of conversations, per user.

Clients send a whole conversation with each request. A message is learned once: what follows the longest
beginning that is known is new. System messages are never learned and do not count, as clients put the time of
day into them. White space around a message does not count either.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MOST = 10_000  # beginnings that are remembered of one user, the newest ones

Turn = tuple[str, str]  # role, "user" or "assistant", and text


def chain(owner: str, turns: Sequence[Turn]) -> list[str]:
    """A hash of each beginning of a conversation, the shortest first.

    Args:
        owner: a text of the user's own, so that equal messages of two users have different hashes.
        turns: the messages without those of the system.
    """
    last, hashes = owner, []
    for role, text in turns:
        digest = hashlib.blake2b(digest_size=16)
        for part in (last, role, text.strip()):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        last = digest.hexdigest()
        hashes.append(last)
    return hashes


@dataclass(frozen=True)
class ConversationPlace:
    """A request's place among the conversations.

    Args:
        known: number of its turns that are known.
        conversation: name of the conversation that it goes on with, or of a new one.
    """

    known: int
    conversation: str


@dataclass
class KnownPrefixes:
    """The beginnings of one user.

    Attributes:
        conversations: the conversation of each known beginning, oldest first.
        heads: the last beginning of each conversation that ends with a user's message.
    """

    conversations: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def place(self, turns: Sequence[Turn], hashes: Sequence[str]) -> ConversationPlace:
        """The place of a request. A conversation goes on only from its last message of the user: with an
        earlier one edited, another conversation begins."""
        known = next((n for n in range(len(hashes), 0, -1) if hashes[n - 1] in self.conversations), 0)
        ends = [h for h, (role, _) in zip(hashes[:known], turns, strict=False) if role == "user"]
        if known:
            conversation = self.conversations[hashes[known - 1]]
            if ends and self.heads.get(conversation) == ends[-1]:
                return ConversationPlace(known, conversation)
        return ConversationPlace(known, secrets.token_hex(8))

    def add(self, conversation: str, hashes: Sequence[str], head: str | None) -> None:
        """Remember beginnings; `head` is the last of them that ends with a user's message, if any does."""
        for new in hashes:
            self.conversations.setdefault(new, conversation)
        if head is not None:
            self.heads.pop(conversation, None)
            self.heads[conversation] = head
        for table in (self.conversations, self.heads):
            for oldest in list(table)[: max(0, len(table) - MOST)]:
                del table[oldest]

    def as_json(self) -> dict[str, Any]:
        return {"conversations": self.conversations, "heads": self.heads}
