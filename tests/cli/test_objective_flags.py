"""Flags of re-reading, distillation and anchors, in every command that has levels, and their files."""

from __future__ import annotations

import json

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from nested_learning.cli.level_flags import add_level_flags, levels_of
from nested_learning.cli.main import main
from nested_learning.cli.serve import load_mind
from nested_learning.continual import Fisher, Level, reopen, stack_levels
from nested_learning.continual.objectives.anchor_files import AnchorFiles
from nested_learning.server.settings import ServeSettings
from nested_learning.training.data import byte_tokenizer
from tests.cli.test_adapt import RARELY
from tests.cli.test_chat import LEVELS, chat, folder  # noqa: F401 - fixtures

TEXT = "Water boils at a hundred degrees. The sun rises in the east. "
TOLD = [*LEVELS, "--reread", "0", "1", "--distill", "0.5", "0", "--anchor_kl", "0.2", "0", "--decay", "0.1"]
MEANT = [
    Level(4, 0.5, distill=0.5, anchor_kl=0.2, decay=0.1),
    Level(8, 0.1, reread=1, decay=0.1),
]


@pytest.fixture
def anchors(tmp_path):
    """--background and --fisher, of which the second is yet to be measured."""
    (tmp_path / "background.txt").write_text(TEXT, encoding="utf-8")
    return [
        "--background",
        str(tmp_path / "background.txt"),
        "--fisher",
        str(tmp_path / "fisher.safetensors"),
    ]


def parsed(*argv):
    parser = ArgumentParser(exit_on_error=False)
    add_level_flags(parser, chunk_sizes=(4, 8), level_lr=0.1)
    return levels_of(parser.parse_args(argv))


def test_levels_are_as_told():
    assert parsed(*TOLD) == tuple(MEANT)
    assert parsed("--reread", "2") == (Level(4, 0.1, reread=2), Level(8, 0.1, reread=2))
    learning, average = parsed(
        "--reread", "2", "--decay", "0.1", "--average_of", "-1", "0", "--rate", "0", "0.5"
    )
    assert learning == Level(4, 0.1, reread=2, decay=0.1)  # one value is for the level that learns
    assert average == Level(8, average_of=0, rate=0.5)
    free, bound = parsed("--rule", "rms", "adam", "--clip", "0", "0.5")
    assert free == Level(4, 0.1, rule="rms", clip=None)
    assert bound == Level(8, 0.1, rule="adam", clip=0.5)
    _, slow = parsed("--level_lr", "0.1", "0", "--consolidate", "0", "0.4", "--rank", "2", "3")
    assert slow == Level(8, 0.0, consolidate=0.4, rank=3)


def base(folder):  # noqa: F811
    return AutoModelForCausalLM.from_pretrained(folder).eval(), byte_tokenizer()


def test_a_chat_with_all_of_them_and_its_memory(chat, folder, anchors, tmp_path, capsys):  # noqa: F811
    path = str(tmp_path / "memory.safetensors")
    lines = ["hello there", "and a longer line", "so that the window closes", "once, or twice, or so"]
    code, _, err = chat(lines, "--no-levels", *TOLD, *anchors, "--memory", path)
    assert code == 0, err
    assert "error" not in err
    model, tokenizer = base(folder)
    given = AnchorFiles(anchors[1], anchors[3]).of(model, tokenizer, MEANT)
    assert given["background"] == TEXT
    expected = Fisher.of(model, TEXT, tokenizer, length=64)  # the model has 64 positions
    assert given["fisher"].digest == expected.digest
    learner = reopen(path, model, tokenizer, **given)
    assert list(learner.levels) == MEANT
    # what is in the file was learned as the library learns it
    again = stack_levels(model, tokenizer, levels=MEANT, **given)
    again.observe("".join(f"{line}\n" for line in lines))
    for name, delta in again.memory.diff().items():
        torch.testing.assert_close(learner.memory.diff()[name], delta)

    code, _, err = chat(["more"], "--no-levels", "--memory", path)
    assert code == 2
    assert "background" in err
    code, _, err = chat(["more"], "--no-levels", "--memory", path, *anchors)
    assert code == 0
    out = str(tmp_path / "out")
    assert main(["export", "--model", folder, "--memory", path, "--output", out]) == 2
    assert main(["export", "--model", folder, "--memory", path, "--output", out, *anchors]) == 0
    page, text = str(tmp_path / "page.html"), anchors[1]
    assert main(["lens", folder, "--text", text, "--memory", path, "--output", page, *anchors]) == 0
    assert main(["lens", folder, "--text", text, "--output", page, *TOLD, *anchors]) == 0


def test_a_diagonal_that_was_measured_is_read(chat, folder, anchors):  # noqa: F811
    model, tokenizer = base(folder)
    Fisher.of(model, "other text", tokenizer, length=64).save(anchors[3])
    (found,) = AnchorFiles(None, anchors[3]).of(model, tokenizer, [Level(4, 0.1, decay=0.1)]).values()
    code, _, err = chat(["hello there"], "--decay", "0.1", *anchors)  # the text has no other use
    assert code == 0, err
    assert Fisher.load(anchors[3]).digest == found.digest


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--anchor_kl", "0.1"], "there is no background"),
        (["--background", "{text}"], "no level has anchor_kl"),
        (["--background", "/no/such/file", "--anchor_kl", "0.1"], "No such file"),
        (["--background", "{bytes}", "--anchor_kl", "0.1"], "is not in UTF-8"),
        (["--fisher", "{missing}", "--decay", "0.1"], "no background to measure it on"),
        (["--fisher", "{missing}", "--background", "{text}"], "no level has a decay"),
        (["--fisher", "{text}", "--decay", "0.1"], "background.txt"),
        (["--fisher", "{missing}", "--background", "{text}", "--decay", "0.1", "--rank", "2"], "rank 2"),
        (["--fisher", "/no/folder/f", "--background", "{text}", "--decay", "0.1"], "there is no folder"),
        (["--reread", "-1"], "reread"),
        (["--reread", "1", "2", "3"], "--reread has 3 values for 2 levels"),
        (["--decay", "1.5"], "decay"),
        (["--distill", "-0.5"], "distill"),
        (["--chunk_sizes", "32", "64", "--distill", "1"], "must hold four segments"),
        (["--level_lr", "0", "--distill", "1"], "learns nothing"),
    ],
)
def test_bad_input(told, message, chat, anchors, tmp_path):  # noqa: F811
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    names = {"text": anchors[1], "bytes": tmp_path / "bytes", "missing": anchors[3]}
    code, out, err = chat(["hello"], *(word.format(**names) for word in told))
    assert code == 2
    assert out == []
    assert message in err
    assert not (tmp_path / "fisher.safetensors").exists() or "rank 2" in message


def test_a_new_chat_without_levels_has_no_use_for_anchors(chat, anchors):  # noqa: F811
    code, _, err = chat(["hello"], "--no-levels", *anchors[:2])
    assert code == 2
    assert "no level has anchor_kl" in err
    code, _, err = chat(["hello"], "--no-levels", *anchors)
    assert code == 2
    assert "no level has a decay" in err


def test_a_memory_is_not_given_another_diagonal(chat, anchors, tmp_path):  # noqa: F811
    path = str(tmp_path / "memory.safetensors")
    assert chat(["hello there"], "--decay", "0.1", *anchors, "--memory", path)[0] == 0
    (tmp_path / "fisher.safetensors").unlink()
    code, _, err = chat(["more"], "--no-levels", "--memory", path, *anchors)
    assert code == 2
    assert "give that file" in err


def whole(turns):
    """The result of a job that comes in turns."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def test_a_server_learns_with_them(folder, anchors, tmp_path):  # noqa: F811
    settings = ServeSettings(model=folder, memories=str(tmp_path / "memories"))
    mind = load_mind(settings, tuple(MEANT), True, *anchors[1::2])
    learned = whole(mind.learn(mind.empty, mind.encode("hello there, hello there")))
    assert sum(learned.written) > 0
    mind.save(learned.memory, tmp_path / "user.safetensors")
    with safe_open(tmp_path / "user.safetensors", "pt") as file:
        told = file.metadata()
    assert [Level(**level) for level in json.loads(told["levels"])] == MEANT
    assert {"background", "fisher"} <= told.keys()


def test_adaptation_resumes_with_the_same_files_alone(folder, anchors, tmp_path, capsys):  # noqa: F811
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose, and a daisy is a daisy.\n" * 40)
    data = ["--data", str(tmp_path / "text.txt"), "--block-size", "24", "--data.max_validation_blocks", "4"]
    output = str(tmp_path / "run")
    argv = [
        "adapt",
        "--model",
        folder,
        *data,
        *TOLD,
        *RARELY,
        *anchors,
        "--batch_size",
        "2",
        "--output",
        output,
    ]
    assert main([*argv, "--steps", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"]["background"] == anchors[1]
    assert [level.get("reread", 0) for level in result["levels"]] == [0, 1]
    (tmp_path / "run" / "result.json").unlink()  # as if it had been interrupted while it was written
    (tmp_path / "background.txt").write_text("Something else.", encoding="utf-8")
    assert main(["adapt", "--output", output, "--resume"]) == 2
    assert "began with another background" in capsys.readouterr().err
    (tmp_path / "background.txt").write_text(TEXT, encoding="utf-8")
    assert main(["adapt", "--output", output, "--resume"]) == 0
