"""The command `nested-learning lens`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from nested_learning.cli.level_flags import (
    ANCHOR_FLAGS,
    LEVEL_FLAGS,
    add_anchor_flags,
    add_level_flags,
    chosen_flags,
    gives_levels,
    levels_and_starts,
)
from nested_learning.cli.output import human_bytes, say
from nested_learning.cli.parsing import new_parser, parse

if TYPE_CHECKING:
    from nested_learning.lens import Recording

DESCRIPTION = """\
See what a model does with a text: one HTML page that needs no network, and pictures.

MODEL is a folder of a Hope model, the --output folder of a completed run, or a pretrained model of another
kind: a folder written by save_pretrained, or a name that transformers can download. The page of a Hope model
has the text coloured by loss and by the surprise of each memory layer, what each memory stores, learning
rates and retentions, the writes of CMS levels. A pretrained model gets the levels below and learns from
the text: the page compares it with what it was, in its predictions and its weights. --memory FILE starts from
what a conversation left, with the file's levels unless flags name others; the file stays as it is.

examples:
  nested-learning lens runs/first --text book.txt
  nested-learning lens runs/first --text - --png pictures --max_tokens 2000 < book.txt
  nested-learning lens SmolLM2-135M-Instruct --text notes.txt --memory anna.safetensors
"""
PAGE = "lens.html"
INPUTS = ("text", "memory", "starts", *ANCHOR_FLAGS)  # files that are read
OF_LEARNERS = (*LEVEL_FLAGS, *ANCHOR_FLAGS, "memory")


def run(argv: list[str]) -> int:
    """Parse, read the text, write. Returns the exit code."""
    parser = new_parser("lens", "MODEL --text FILE ", DESCRIPTION)
    parser.add_argument("model", type=str, help="folder of a model or of a completed run, or a name")
    parser.add_argument("--text", type=str, help="file of the text in UTF-8; - for the standard input")
    parser.add_argument("--output", type=str, default=PAGE, help="file of the page")
    parser.add_argument("--png", type=str, metavar="FOLDER", help="also write pictures there")
    parser.add_argument("--max_tokens", type=int, default=10_000, help="read no more than the first so many")
    parser.add_argument(
        "--memory", type=str, metavar="FILE", help="memory of a pretrained model, to start from"
    )
    add_level_flags(parser, chunk_sizes=(32, 128, 512), level_lr=0.1)
    add_anchor_flags(parser)
    values = parse(parser, argv)

    from nested_learning._files import existing, same_file, writable, write_text
    from nested_learning.lens import page, save_figures

    if values.text is None:
        raise ValueError("no text is given: --text FILE, or --text - for the standard input")
    writable(values.output)  # refused before a long text is read
    for flag in INPUTS:
        if values[flag] not in (None, "-") and same_file(values[flag], values.output):
            raise ValueError(
                f"--output {values.output} is the file of --{flag}, which stays as it is; name another"
            )
    if values.png is not None and not (place := existing(Path(values.png))).is_dir():
        raise ValueError(f"--png takes a folder, but {place} is something else")
    recording = _record(values, parser, _text(values.text), argv)
    write_text(values.output, page(recording))
    say(f"written: {values.output} ({human_bytes(Path(values.output).stat().st_size)})")
    if values.png is not None:
        Path(values.png).mkdir(parents=True, exist_ok=True)
        for path in save_figures(recording, Path(values.png)):
            say(f"written: {path}")
    return 0


def _text(name: str) -> str:
    """The text of a file, or of the standard input for "-"; a byte order mark is dropped."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        return text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text {name!r} is not in UTF-8 ({error}); convert it first") from error


def _record(values: Namespace, parser: ArgumentParser, text: str, argv: Sequence[str]) -> Recording:
    from transformers import AutoConfig

    from nested_learning.lens import lens
    from nested_learning.models import PRESETS, HopeConfig
    from nested_learning.models.packaged import or_packaged
    from nested_learning.training.models import saved_folder

    name = or_packaged(values.model)
    if not Path(name).is_dir():
        if name in PRESETS:
            raise ValueError(
                f"{name} is a preset, whose weights are random; train one, "
                f"`nested-learning train --preset {name}`, and give the folder of the run"
            )
        return _learner_recording(name, values, text, argv)
    folder = str(saved_folder(name))
    if not isinstance(AutoConfig.from_pretrained(folder, local_files_only=True), HopeConfig):
        return _learner_recording(folder, values, text, argv)
    given = [f"--{flag}" for flag in chosen_flags(values, parser, argv, OF_LEARNERS)]
    if given:
        raise ValueError(
            f"{', '.join(given)} describe levels on a pretrained model of another kind; {name} is a Hope "
            "model, whose memories and levels are its own: leave them out"
        )
    from nested_learning.cli.conversation import load_model

    model, tokenizer = load_model(name)
    return lens(model, text, tokenizer, max_tokens=values.max_tokens)


def _learner_recording(name: str, values: Namespace, text: str, argv: Sequence[str]) -> Recording:
    from nested_learning.cli.dialogue import load_pretrained
    from nested_learning.continual import reopen, stack_levels
    from nested_learning.continual.objectives.anchor_files import AnchorFiles
    from nested_learning.lens import lens

    (levels, starts), files = levels_and_starts(values, argv), AnchorFiles(values.background, values.fisher)
    model: Any
    model, tokenizer = load_pretrained(name)
    if values.memory is not None and not gives_levels(argv):
        learner = reopen(values.memory, model, tokenizer, **files.of(model, tokenizer))
        return lens(learner, text, max_tokens=values.max_tokens)
    anchors = files.of(model, tokenizer, levels)
    learner = stack_levels(model, tokenizer, levels=levels, starts=starts, **anchors)
    if values.memory is not None:
        learner.memory.load(values.memory)
    return lens(learner, text, max_tokens=values.max_tokens)
