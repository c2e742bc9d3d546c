"""The settings of `nested-learning chat`, in a module from which reading them imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nested_learning._checks import check_types, require, require_seed
from nested_learning.server.settings import COLDEST


@dataclass(kw_only=True)
class ChatConfig:
    """The conversation.

    Args:
        model: folder or name of a causal language model
        memory: file of the memory; without one, it is lost at the end
        learn_from_replies: learn from the model's own answers too
        max_new_tokens: longest answer
        temperature: divides the logits; 0 always takes the likeliest token
        top_p: sample among the likeliest tokens that together have this probability
        seed: of the sampling
        replay: tokens of what was said that are kept in the memory, to be learned again; 0 to keep none
        replay_share: share of kept tokens among those that are learned
        replay_choose: which are learned again: random, or those that were surprising (surprise)
        source: name under which is kept what is said; `/source NAME` changes it
        retrieve: tokens of what was said before that are looked up for a message and shown to the model; 0
            for none
        compile: run the model through torch.compile; the first windows take a while
    """

    model: str
    memory: str | None = None
    learn_from_replies: bool = False
    max_new_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    replay: int = 0
    replay_share: float = 0.25
    replay_choose: str = "random"
    source: str = "chat"
    retrieve: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "a whole number above 0")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or a positive number")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a probability above 0, at most 1")
        require_seed(self.seed)
        require(self.replay >= 0, "replay", self.replay, "0 or a number of tokens")
        require(
            self.replay_choose in ("random", "surprise"),
            "replay_choose",
            self.replay_choose,
            "'random' or 'surprise'",
        )
        require(self.source != "", "source", self.source, "a name")
        require(self.retrieve >= 0, "retrieve", self.retrieve, "0 or a number of tokens")
        if not self.replay:
            for name in ("replay_share", "replay_choose", "source"):
                got = getattr(self, name)
                if got != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f"--{name} {got} is about what is kept, but nothing is: give --replay TOKENS too"
                    )
        if self.retrieve and not self.replay:
            raise ValueError(
                f"--retrieve {self.retrieve} looks up what is kept, but nothing is: give --replay TOKENS too"
            )

    def generation(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature >= COLDEST:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **sampling}
