"""`nested-learning adapt --learn_starts`, and `--starts` of the commands that have levels."""

from __future__ import annotations

import io
import json
import shutil

import pytest

from nested_learning.cli.dialogue import load_pretrained
from nested_learning.cli.main import main
from nested_learning.continual import Starts, stack_levels
from tests.cli.test_chat import folder  # noqa: F401 - a fixture

LEVELS = ["--chunk_sizes", "8", "16", "--level_lr", "0.05", "0.02", "--rank", "0", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a rose is a rose is a rose, and a daisy is a daisy.\n" * 40)
    return str(path)


@pytest.fixture(scope="module")
def flags(folder, text):  # noqa: F811
    sizes = [
        "--block_size",
        "40",
        "--steps",
        "6",
        "--held_out",
        "3",
        "--lr_starts",
        "3e-3",
        "--start_rank",
        "4",
    ]
    return ["adapt", "--model", folder, "--learn_starts", text, *sizes, "--quiet"]


@pytest.fixture(scope="module")
def learned(flags, tmp_path_factory):
    path = tmp_path_factory.mktemp("starts") / "starts.safetensors"
    assert main([*flags, *LEVELS, "--output", str(path)]) == 0
    return str(path)


def test_what_is_written_lowers_the_loss(flags, folder, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "starts"
    for more in ([], ["--exact", "--window", "32"], ["--bfloat16"]):
        assert main([*flags, *LEVELS, "--output", str(path), "--json", *more]) == 0
        result = json.loads(capsys.readouterr().out)
        losses = dict(result["held_out"])
        assert losses[result["best_step"]] < losses[0] - 0.05
        assert result["exact"] == ("--exact" in more)
        found = Starts.load(path)
        assert found.digest == result["sum"]
        model, tokenizer = load_pretrained(folder)
        begun = stack_levels(model, tokenizer, levels=found.make_levels(), starts=found)
        assert begun.observe("a rose is a rose").nanmean() > 0
    assert main([*flags, *LEVELS, "--output", str(path), "--starts", str(path)]) == 0  # and on from there
    assert "held-out loss before" in capsys.readouterr().out
    assert Starts.load(path).report["held_out"][0][1] < losses[0] - 0.05


def test_chat_takes_them_and_the_levels_of_the_file(folder, learned, tmp_path, monkeypatch, capsys):  # noqa: F811
    memory = str(tmp_path / "memory")
    flags = ["chat", "--model", folder, "--memory", memory, "--max_new_tokens", "4"]
    for more in (["--starts", learned], ["--starts", learned, *LEVELS]):
        monkeypatch.setattr("sys.stdin", io.StringIO("a rose is a rose is a rose\n"))
        assert main([*flags, *more]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    capsys.readouterr()
    assert main(flags) == 2
    assert "this learner has no starts; give the file of the right ones" in capsys.readouterr().err
    assert main([*flags, "--starts", learned, "--chunk_sizes", "8"]) == 2
    assert "starts were learned for levels with 2 level(s), this learner has 1" in capsys.readouterr().err
    export = ["export", "--model", folder, "--memory", memory, "--output", str(tmp_path / "out")]
    assert main(export) == 2
    assert main([*export, "--starts", learned]) == 0
    assert "checkpoint in" in capsys.readouterr().out


def test_lens_begins_with_them(folder, learned, text, tmp_path):  # noqa: F811
    page = tmp_path / "page.html"
    flags = ["lens", folder, "--text", text, "--max_tokens", "40", "--output", str(page), "--quiet"]
    assert main([*flags, "--starts", learned]) == 0
    assert page.is_file()


def test_a_trained_base_has_its_own(folder, learned, text, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    flags = ["--model", folder, "--data", text, "--block_size", "24", "--steps", "2", "--batch_size", "1"]
    flags += ["--data.max_validation_blocks", "2", "--lr", "1e-2", "--quiet", "--starts", learned]
    assert main(["adapt", *flags, "--output", str(run)]) == 0
    model, tokenizer = load_pretrained(str(run / "model"))
    own, before = Starts.load(run / "model" / "starts.safetensors"), Starts.load(learned)
    assert own.fingerprint != before.fingerprint
    stack_levels(model, tokenizer, levels=own.make_levels(), starts=own)
    with pytest.raises(ValueError, match="belong to another base model"):
        stack_levels(model, tokenizer, levels=own.make_levels(), starts=before)
    first = json.loads((run / "result.json").read_text())["validation"]["with_levels_before"]
    shutil.rmtree(run)
    assert main(["adapt", *flags[:-2], *LEVELS, "--output", str(run)]) == 0
    assert first < json.loads((run / "result.json").read_text())["validation"]["with_levels_before"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--chunk_sizes", "8", "--level_lr", "1e20"], "the loss on texts held out is nan before a step"),
        ([*LEVELS, "--lr_rates", "1e30"], "a rate's factor has become e to the power of"),
    ],
)
@pytest.mark.parametrize("report", [[], ["--json"]])
def test_what_diverges_is_not_written(flags, tmp_path, capsys, more, message, report):
    path = tmp_path / "starts"
    path.write_text("an earlier one")
    assert main([*flags, *more, *report, "--output", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert path.read_text() == "an earlier one"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "/nowhere/starts"], "there is no folder"),
        (["--lr_rates", "0", "--lr_starts", "0"], "both 0"),
        (["--steps", "0"], "steps is 0"),
        (["--batch_size", "-1", "--steps", "-1"], "steps is -1"),
        (["--held_out", "0"], "held_out is 0"),
        (["--rule", "m3", "--exact"], "rule='m3'"),
        (["--chunk_sizes", "64"], "no text longer than the fastest chunk of 64"),
        (["--optim.lr", "1"], "unknown option '--optim.lr'"),
        (["--starts", "none"], "no starts file at none"),
    ],
)
def test_bad_input(flags, tmp_path, capsys, more, message):
    output = [] if "--output" in more else ["--output", str(tmp_path / "starts")]
    assert main([*flags, *output, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "starts").exists()
