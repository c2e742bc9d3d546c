"""The settings of `nested-learning serve`, in a module from which reading them imports nothing heavy."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from nested_learning._checks import check_types, require, require_folder_name

# Roles whose messages are learned, by the value of `learn`.
MODES: dict[str, frozenset[str]] = {
    "user": frozenset(("user",)),
    "assistant": frozenset(("assistant",)),
    "both": frozenset(("user", "assistant")),
    "none": frozenset(),
}
COLDEST = 1e-4  # a lower temperature takes the likeliest token: divided by it, logits would leave float32


@dataclass(kw_only=True)
class ServeSettings:
    """The server.

    Args:
        model: folder or name of a causal language model
        memories: folder of the users' memories; it is made where there is none
        host: address to listen on; other computers reach the server only if it is not a loopback address
        port: port to listen on; 0 for any free one, which is printed
        keys: file of hashed API keys; without one, the field `user` tells users apart, on loopback alone
        add_key: make a key for this user, print it once, add its hash to the file of --keys, and leave
        name: name of the model in the API; default: the last part of MODEL
        learn: turns of a conversation that are learned: user, assistant, both, or none
        max_tokens: longest answer where a request does not say
        temperature: divides the logits where a request does not say
        top_p: as above
        seed: makes answers of requests without a seed repeatable; default: another one each time
        duty: largest share of the time for learning that nobody waits for, while requests are there
        turn_tokens: tokens per turn of a user when more users get answers than weights are kept for
        prefill: most tokens of a prompt that one turn reads
        weights_mb: megabytes (2^20 bytes) for ready-made weights of users, between whom switching is free
        memory_mb: megabytes for loaded memories
        undo: conversations of a user that can be taken back; each is a file of the size of the memory
        most_users: users whose memories are loaded at once
        most_requests: requests in work at once; more get a 503
        most_requests_per_user: requests of one user in work at once; more get a 429
        most_body_kb: largest body of a request, in kilobytes (2^10 bytes); not of an imported memory
        most_new_tokens: longest answer that a request may ask for
        most_choices: most answers to one request (`n`)
        most_positions: tokens of a prompt and its answer where the model has no bound of its own (Hope)
        most_memory_tokens: tokens of a memory that keeps every one (Hope with softmax attention)
        most_lesson_tokens: longest text that one request may have learned or scored
        most_pending_tokens: tokens of one user that may wait to be learned
        grace: seconds that running requests get to end when the server is told to stop
    """

    model: str
    memories: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    add_key: str | None = None
    name: str | None = None
    learn: str = "user"
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    duty: float = 0.2
    turn_tokens: int = 16
    prefill: int = 512
    weights_mb: int = 4096
    memory_mb: int = 4096
    undo: int = 5
    most_users: int = 256
    most_requests: int = 64
    most_requests_per_user: int = 8
    most_body_kb: int = 1024
    most_new_tokens: int = 4096
    most_choices: int = 8
    most_positions: int = 8192
    most_memory_tokens: int = 32768
    most_lesson_tokens: int = 8192
    most_pending_tokens: int = 32768
    grace: float = 5.0

    def __post_init__(self) -> None:
        check_types(self)
        require_folder_name("memories", self.memories)
        require(self.learn in MODES, "learn", self.learn, f"one of {', '.join(MODES)}")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or a positive number")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a probability above 0, at most 1")
        require(0 < self.duty < 1, "duty", self.duty, "a share between 0 and 1")
        require(0 <= self.port < 2**16, "port", self.port, "a number from 0 to 65535")
        require(0 < self.grace <= 9, "grace", self.grace, "at most 9 seconds, above 0")
        require(self.undo >= 0, "undo", self.undo, "0 or a positive whole number")
        for name in ("weights_mb", "memory_mb", "max_tokens", "turn_tokens", "prefill"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number above 0")
        for name in (name for name in self.__dataclass_fields__ if name.startswith("most_")):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number above 0")
        require(
            self.add_key is None or self.keys is not None,
            "keys",
            self.keys,
            "a file for the key of --add_key",
        )

    @property
    def served_name(self) -> str:
        """Name of the model in the API."""
        return self.name or self.model.rstrip("/").rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether only this computer can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def trusts_user_field(self) -> bool:
        """Whether a request may say itself whose memory it is for."""
        return self.keys is None and self.is_local
