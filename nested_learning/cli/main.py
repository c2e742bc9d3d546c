"""`nested-learning COMMAND …`: finds the command, calls it, turns bad input into a message and a code.

Exit codes: 0 done; 1 training diverged; 2 bad input; 130 and 143 interrupted by SIGINT and SIGTERM.
Nothing heavy is imported before a command is known, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from nested_learning import _progress
from nested_learning.cli.errors import DEBUG, message_of, unknown_command
from nested_learning.cli.output import QUIET

COMMANDS = {
    "train": "train a model on text; it is saved as a Hugging Face folder",
    "generate": "continue a prompt with a saved model; save and load the state of a conversation",
    "score": "bits per byte of a text under a trained model, by position, with and without its carried state",
    "info": "parameters per part and level, and the memory a running sequence needs",
    "levels": "a model and its optimizer as a nested system: who learns what, how often, from whom",
    "lens": "a page on what a model does with a text: surprise, memories, writes, what was learned",
    "chat": "talk with a pretrained model that learns from the conversation and keeps its memory in a file",
    "serve": "the same for many users over HTTP, with the interface of OpenAI's clients",
    "export": "write a memory file as a plain checkpoint of transformers, or as a LoRA adapter",
    "adapt": "continue the pre-training of a model while levels of its MLPs learn in context",
    "compare": "train several presets on the same batches, side by side, and tabulate the results",
    "eval": "the paper's questions: methods on tasks, tables, figures, and a verdict on each claim",
}
# How threads of OpenMP wait for each other; read once, when torch is loaded.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def usage() -> str:
    lines = "\n".join(f"  {name:<10}{help}" for name, help in COMMANDS.items())
    return (
        "usage: nested-learning COMMAND [options]\n\n"
        "Nested Learning in PyTorch: train Hope models and generate from them.\n\n"
        f"commands:\n{lines}\n\n"
        "`nested-learning COMMAND --help` lists the options of a command; --quiet shows no progress bars.\n"
        f"Set {DEBUG}=1 to see the full traceback of an error."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    wait_asleep()
    delay_bars()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        _close_stdout()
        return 0


def open_streams() -> None:
    """Stand-ins for streams that the caller has closed (`>&-`): nothing to read, and nobody who reads."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def wait_asleep() -> None:
    """Let torch's threads wait asleep, not spinning, unless the environment says how they are to wait.

    A spinning thread takes the core from the one it waits for, where another program keeps a core busy.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def delay_bars() -> None:
    """Let bars of other libraries too, of downloads and of weights being loaded, appear after a while."""
    if "tqdm" not in sys.modules:
        os.environ.setdefault("TQDM_DELAY", f"{_progress.DELAY:.0f}")


def _close_stdout() -> None:
    """Let nothing more be written to a stdout that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from nested_learning._version import __version__

        print(__version__)
        return 0
    name = argv[0]
    try:
        if name not in COMMANDS:
            raise unknown_command(name, COMMANDS)
        with _progress.quiet(QUIET in argv or not _progress.on_terminal()):
            command = importlib.import_module(f"nested_learning.cli.{name}")
            return command.run(argv[1:])
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
