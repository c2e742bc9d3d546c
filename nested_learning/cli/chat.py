"""`nested-learning chat`."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_learning._checks import check_text
from nested_learning.cli.chat_config import ChatConfig
from nested_learning.cli.level_flags import (
    add_anchor_flags,
    add_level_flags,
    chosen_flags,
    gives_levels,
    levels_and_starts,
)
from nested_learning.cli.output import human_bytes, say
from nested_learning.cli.parsing import new_parser, parse

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from nested_learning.cli.dialogue import Dialogue
    from nested_learning.cli.hope_dialogue import HopeDialogue
    from nested_learning.continual import Level
    from nested_learning.continual.replaying.sources import KnownSource
    from nested_learning.continual.starts.starts import Starts

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
OF_LEARNERS = (
    "compile",
    "background",
    "fisher",
    "replay",
    "replay_share",
    "replay_choose",
    "source",
    "retrieve",
)
DESCRIPTION = """\
Talk with a pretrained model that learns from the conversation.

MODEL is a folder written by save_pretrained, or a name that transformers can download. What the model
learns goes into deltas on its MLPs, level by level, never into the model: --memory keeps them in one file,
from conversation to conversation. The file is locked while the chat runs and saved at its end. Without any
flag of the levels they are those of the file, or for a new one those of `Learner.auto`: one level with Adam,
of rank 8, whose file stays small. With one of them, the others have the defaults below.

A Hope model (a folder, the --output folder of a run, or a trained model of the package) has memories itself:
to learn is to read, and the file is a session of `nested-learning generate`.

in the chat:
  /surprise   how surprising each token of your last message was, in nats
  /undo       take back your last message, the answer, and what was learned from them
  /reset      forget everything: the memory and the conversation
  /save       write the memory file now; `/save FILE` writes another one
  /sources    what is kept under which name, with --replay
  /source     `/source NAME` names what is said from now on
  /forget     `/forget NAME` takes what was said under a name out of the memory; the conversation begins anew
  /quit       save and leave; so does the end of the input

examples:
  nested-learning chat --model SmolLM2-135M-Instruct --memory anna.safetensors
  nested-learning chat --model my-model --chunk_sizes 64 512 --level_lr 0.3 0.1 --layers all 'last third'
"""


def run(argv: list[str]) -> int:
    """Parse, then talk until the input ends. Returns the exit code."""
    parser = new_parser("chat", "--model MODEL ", DESCRIPTION)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="learn and answer through torch.compile; the first windows take a while",
    )
    parser.add_class_arguments(ChatConfig, None, skip={"compile"})
    add_level_flags(parser, chunk_sizes=(32, 128, 512), level_lr=0.1)
    add_anchor_flags(parser)
    values = parse(parser, argv)
    config = ChatConfig(**{name: values[name] for name in ChatConfig.__dataclass_fields__})
    levels, starts = levels_and_starts(values, argv)

    from nested_learning.cli.conversation import is_hope

    dialogue: Dialogue | HopeDialogue
    if is_hope(config.model):
        given = chosen_flags(values, parser, argv, OF_LEARNERS)
        dialogue = _hope_dialogue(config, given, gives_levels(argv))
    else:
        own = levels if gives_levels(argv) else None
        dialogue = _learner_dialogue(config, values, own, starts)
    with _signals_as_exits(), _memory_file(dialogue, config.memory):
        talk(dialogue, config.memory)
    return 0


def _hope_dialogue(config: ChatConfig, given: Sequence[str], own_levels: bool) -> HopeDialogue:
    """A conversation with a Hope model. ValueError where options are given that are for other models."""
    from nested_learning.cli.conversation import load_model
    from nested_learning.cli.hope_dialogue import HopeDialogue
    from nested_learning.server.hope_mind import HopeMind

    if given or own_levels:
        raise ValueError(
            f"{config.model} is a Hope model, which has memories of its own and keeps no texts; leave out "
            f"{', '.join(f'--{name}' for name in given) or 'the flags of levels'}"
        )
    return HopeDialogue(
        HopeMind(*load_model(config.model)),
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.seed,
        config.learn_from_replies,
    )


def _learner_dialogue(
    config: ChatConfig, values: Namespace, levels: tuple[Level, ...] | None, starts: Starts | None
) -> Dialogue:
    """A conversation with a pretrained model that learns."""
    from accelerate.utils import set_seed

    from nested_learning.cli.dialogue import Dialogue, load_pretrained
    from nested_learning.continual import AUTO, Learner, Replay, reopen, stack_levels
    from nested_learning.continual.objectives.anchor_files import AnchorFiles
    from nested_learning.continual.replaying.retrieval import check_installed

    options: dict[str, Any] = {"compile": config.compile, "replay": None}
    if config.replay:
        piece = min(64, config.replay)
        settings = (config.replay, config.replay_share, config.replay_choose, piece, config.seed)
        options["replay"] = Replay(*settings)
    if config.retrieve:
        check_installed()
    files = AnchorFiles(values.background, values.fisher)
    set_seed(config.seed)
    model, tokenizer = load_pretrained(config.model)
    if levels is not None:
        options |= files.of(model, tokenizer, levels)
        learner = stack_levels(model, tokenizer, levels=levels, starts=starts, **options)
    elif config.memory is not None and Path(config.memory).is_file():
        learner = reopen(config.memory, model, tokenizer, **options, **files.of(model, tokenizer))
    else:
        learner = Learner.auto(model, tokenizer, **options, **files.of(model, tokenizer, AUTO.levels))
    return Dialogue(learner, config.generation(), config.learn_from_replies, config.source, config.retrieve)


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the block like an interruption, with their codes.

    Signals are a program's main thread's; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, frame: object) -> None:
        for each in heard:  # what is being saved then is saved whole
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in heard:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _memory_file(dialogue: Dialogue | HopeDialogue, path: str | None) -> Iterator[None]:
    """Load the memory, keep the file locked, and save it at the end, also after an interruption."""
    if path is None:
        yield
        return
    with dialogue.lock(path):
        if Path(path).exists():
            dialogue.load(path)
            say(f"{path}: {dialogue.tokens_read:,} tokens read so far")
        try:
            yield
        finally:
            say(_saved(dialogue, path))


def _saved(dialogue: Dialogue | HopeDialogue, path: str) -> str:
    """A report of saving the memory, which of a Hope model has no file where nothing was read."""
    dialogue.save(path)
    if not Path(path).exists():
        return f"the memory is empty: there is no {path}"
    return f"memory saved in {path} ({human_bytes(Path(path).stat().st_size)})"


def talk(dialogue: Dialogue | HopeDialogue, memory: str | None) -> None:
    """Answer the lines of stdin until /quit or their end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are told line by line
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            check_text(line, "the line")
            if line.startswith("/"):
                print(_command(dialogue, command, rest.strip(), memory))
            elif line:
                print(dialogue.reply(line), flush=True)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (ValueError, OSError, RuntimeError) as error:  # ends neither the chat nor what it has learned
            say(f"error: {error}")


def _command(dialogue: Dialogue | HopeDialogue, command: str, rest: str, memory: str | None) -> str:
    if command == "/surprise":
        return _surprise_table(dialogue.surprise())
    if command == "/undo":
        return f"taken back: {dialogue.undo()}"
    if command == "/reset":
        dialogue.reset()
        return "memory and conversation are empty"
    if command == "/save":
        path = rest or memory
        if path is None:
            raise ValueError("there is no memory file: give one, `/save FILE`, or start with --memory FILE")
        return _saved(dialogue, path)
    if command == "/sources":
        return _source_table(dialogue.sources())
    if command in ("/source", "/forget") and not rest:
        raise ValueError(f"{command} needs a name: {command} NAME")
    if command == "/source":
        dialogue.name_source(rest)
        return f"what is said from now on is kept as {rest}"
    if command == "/forget":
        return dialogue.forget(rest)
    raise ValueError(
        f"unknown command {command!r}. Known: /surprise, /undo, /reset, /save, /sources, /source NAME, "
        "/forget NAME, /quit."
    )


def _source_table(sources: list[KnownSource]) -> str:
    lines = [f"{s.tokens:8,}  {s.kept:8,}  {s.writes:6,}  {s.name or '(without a name)'}" for s in sources]
    return "\n".join(["  tokens      kept  writes  source", *lines])


def _surprise_table(surprises: list[tuple[str, float]]) -> str:
    lines = [f"{nats:6.2f}  {token!r}" for token, nats in surprises]
    known = [nats for _, nats in surprises if nats == nats]  # the very first token has no prediction
    mean = sum(known) / len(known) if known else float("nan")
    return "\n".join(["  nats  token", *lines, f"{mean:6.2f}  mean"])
