"""A conversation with a learner: messages, answers, learning from them, and taking them back."""

from __future__ import annotations

import difflib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig

from nested_learning._precision import loading_dtype
from nested_learning._saved_models import load_causal_lm, load_tokenizer_of
from nested_learning.cli.turns import SpokenTurn, SpokenTurns, check_room
from nested_learning.continual import Learner, Snapshot
from nested_learning.continual.inputs import most_positions
from nested_learning.continual.replaying.sources import KnownSource
from nested_learning.models import PRESETS
from nested_learning.models.packaged import or_packaged, packaged_names
from nested_learning.server.prompt import newest_ids
from nested_learning.training.models import saved_folder

NOTES = "What was said before:"


def load_pretrained(name: str) -> tuple[Any, Any]:
    """(model on its device, tokenizer) of a folder, a run's too, of a trained model of the package or a name
    of the hub, in the precision it was saved in; in float32 where that is bfloat16, which this CPU has no
    instructions for.

    Raises:
        OSError: there is none.
        ValueError: it is no causal language model, not a whole one, has no tokenizer, or the name is one of
            this package, misspelt or without weights.
    """
    name = or_packaged(name)
    _check_not_ours(name)
    source = str(saved_folder(name)) if Path(name).is_dir() else name
    config = AutoConfig.from_pretrained(source)
    tokenizer = load_tokenizer_of(source)
    device = PartialState().device
    model = load_causal_lm(source, config, dtype=loading_dtype(config, device))
    return model.to(device).eval(), tokenizer


def _check_not_ours(name: str) -> None:
    """ValueError for a preset, and for a name close to one of ours: the hub is asked for minutes else."""
    if "/" in name or Path(name).exists():
        return
    trained = packaged_names()
    wanted = (
        "expected the folder of a saved model, a name of the hub or a trained model of the package "
        f"({', '.join(trained)})"
    )
    if name in PRESETS:
        raise ValueError(f"{name!r} is a preset, a model without trained weights; {wanted}")
    if near := difflib.get_close_matches(name, [*trained, *PRESETS], n=1, cutoff=0.85):
        raise ValueError(f"{name!r} is no folder; did you mean {near[0]!r}? Else {wanted}")


@dataclass
class Dialogue:
    """Answers messages and learns from them.

    A message is learned as plain text and a line break, after it was answered. The model sees as much of
    the conversation as fits into its positions; the rest remains in the memory alone.

    Args:
        learner: learner of one row.
        generation: keyword arguments of transformers' `generate`.
        learn_from_replies: learn from the answers as well.
        source: name under which a learner with replay keeps what is said.
        retrieve: most tokens of what was said before that a message is answered with; 0 for none. They
            stand in the message, within the model's own chat template.

    Raises:
        ValueError: an answer may take all the positions of the model.
    """

    learner: Learner
    generation: dict[str, Any]
    learn_from_replies: bool = False
    source: str = "chat"
    retrieve: int = 0
    _turns: SpokenTurns[Snapshot] = field(default_factory=SpokenTurns)

    def __post_init__(self) -> None:
        check_room(self._for_answer, most_positions(self.learner.model))

    def reply(self, message: str) -> str:
        """The answer to a message, which is learned then."""
        before = self.learner.memory.snapshot()
        try:
            self._turns.append(self._take_turn(message, before))
        except BaseException:  # an interruption too: half a turn must not reach the memory file
            self.learner.memory.restore(before)
            raise
        return self._turns[-1].reply

    def _take_turn(self, message: str, before: Snapshot) -> SpokenTurn[Snapshot]:
        prompt = self._prompt(message)
        ids = self.learner.generate(prompt, pad_token_id=self._padding(), **self.generation)
        reply = self.learner.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        tokens = torch.tensor(self._encode(f"{message}\n"))
        source = self.source if self.learner.replayer else None
        losses = self.learner.observe(tokens, source=source).tolist()
        if self.learn_from_replies and reply:
            self.learner.observe(f"{reply}\n", source=source)
        words = [self.learner.tokenizer.decode([token]) for token in tokens.tolist()]
        return SpokenTurn(before, message, reply, list(zip(words, losses, strict=True)))

    def surprise(self) -> list[tuple[str, float]]:
        """(token, next-token loss in nats) of the last message. ValueError if there is none."""
        return self._turns.last().surprise

    def undo(self) -> str:
        """Take back the last message, its answer and what was learned from them; returns the message."""
        turn = self._turns.last()
        self.learner.memory.restore(turn.before)
        self._turns.pop()
        return turn.message

    def reset(self) -> None:
        """Forget the memory and the conversation."""
        self.learner.memory.reset()
        self._turns.clear()

    def sources(self) -> list[KnownSource]:
        """The sources of what is kept. ValueError where nothing is."""
        if self.learner.replayer is None:
            raise ValueError("nothing is kept of what is said: start with --replay TOKENS")
        return self.learner.sources()

    def forget(self, source: str) -> str:
        """Forget a source and begin the conversation anew: its turns may show it. Returns a report.

        Raises:
            ValueError: there is no such source, or nothing is kept.
        """
        self.sources()
        report = self.learner.forget(source)
        self._turns.clear()
        return str(report)

    def name_source(self, source: str) -> None:
        """Keep what is said from now on under a name. ValueError where nothing is kept."""
        self.sources()
        self.source = source

    # The file of the memory ----------------------------------------------------------------------------

    @property
    def tokens_read(self) -> int:
        """Number of tokens that the memory was made of."""
        return self.learner.memory.rows[0].position

    def lock(self, path: str | os.PathLike[str]) -> AbstractContextManager[None]:
        """As `Memory.lock`."""
        return self.learner.memory.lock(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """As `Memory.load`."""
        self.learner.memory.load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As `Memory.save`."""
        self.learner.memory.save(path)

    @property
    def _for_answer(self) -> int:
        """Positions that are left for an answer."""
        return self.generation.get("max_new_tokens", 0)

    def _encode(self, text: str) -> list[int]:
        return self.learner.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _padding(self) -> int | None:
        tokenizer = self.learner.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _prompt(self, message: str) -> torch.Tensor:
        """Ids [T] of the conversation with the message, its oldest turns left out until it fits."""
        positions = most_positions(self.learner.model)
        room = positions - self._for_answer
        notes = self.learner.retrieve(message, self.retrieve).text if self.retrieve else ""
        shown = [f"{NOTES}\n{notes}\n{message}"] if notes else []
        turns = [pair for turn in self._turns for pair in (("user", turn.message), ("assistant", turn.reply))]
        for text in (*shown, message):
            ids = newest_ids(self.learner.tokenizer, [*turns, ("user", text)], room)
            if len(ids) <= room:
                return torch.tensor(ids)
        raise ValueError(
            f"the message has {len(ids)} tokens with its frame, but the model reads {positions} positions "
            f"and {positions - room} are for the answer; write a shorter one"
        )
