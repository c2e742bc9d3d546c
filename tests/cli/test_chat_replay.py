"""`nested-learning chat --replay`: what is said is kept by source, looked up, and forgotten by name."""

from __future__ import annotations

import sys

import pytest
import torch

from nested_learning.cli.dialogue import NOTES, Dialogue
from nested_learning.continual import Level, Replay, stack_levels
from nested_learning.training.data import byte_tokenizer
from tests.cli.test_chat import chat, folder  # noqa: F401 - fixtures
from tests.continual.tiny_models import tiny_model
from tests.damage import read_file

KEPT = ["--replay", "500"]


def test_sources_are_kept_and_forgotten(chat, tmp_path):  # noqa: F811
    """As if it had never been said, also by a later chat."""
    path, other = str(tmp_path / "anna"), str(tmp_path / "other")
    chat(["my cat is called Miezi"], "--memory", path, *KEPT, "--source", "monday")
    lines = ["/source tuesday", "bread", "/sources", "/forget monday", "/sources", "/undo"]
    code, out, err = chat(lines, "--memory", path, *KEPT)
    assert code == 0
    tables = [line.split() for line in out if line.split()[-1:] in (["monday"], ["tuesday"])]
    assert [line[0] for line in tables if line[-1] == "monday"] == ["23"]
    assert [line[0] for line in tables if line[0] != "what"] == ["23", "6", "6"]
    assert any("as if it had never been read" in line for line in out)
    assert "nothing has been said yet" in err  # the conversation began anew
    chat(["bread"], "--memory", other, *KEPT, "--source", "tuesday")
    (found, _), (expected, _) = read_file(path), read_file(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_memory_that_keeps_what_was_said_needs_the_option(chat, tmp_path):  # noqa: F811
    path = str(tmp_path / "anna")
    chat(["hello"], "--memory", path, *KEPT)
    code, _, err = chat(["hello"], "--memory", path)
    assert code == 2
    assert "--replay" in err
    assert "drop_stores" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replay", "-1"], "replay"),
        (["--replay", "1"], "tokens must be"),
        (["--replay", "9", "--replay_share", "1"], "share must be"),
        (["--replay", "9", "--replay_choose", "label"], "'random' or 'surprise'"),
        (["--replay", "9", "--source", ""], "source"),
        (["--retrieve", "9"], "give --replay TOKENS too"),
    ],
)
def test_bad_input(chat, options, message):  # noqa: F811
    code, out, err = chat(["hello"], *options)
    assert code == 2
    assert message in err
    assert out == []


def test_commands_where_nothing_is_kept(chat, monkeypatch):  # noqa: F811
    code, out, err = chat(["/sources", "/forget x", "/forget"])
    assert (code, out) == (0, [])
    assert err.count("start with --replay TOKENS") == 2
    assert "/forget needs a name: /forget NAME" in err
    code, out, err = chat(["/source monday", "/source"])
    assert (code, out) == (0, [])
    assert "start with --replay TOKENS" in err
    assert "/source needs a name" in err
    monkeypatch.setitem(sys.modules, "bm25s", None)
    code, _, err = chat(["hello"], *KEPT, "--retrieve", "50")
    assert code == 2
    assert "nested-learning-torch[retrieval]" in err


def test_what_was_said_before_is_looked_up():
    pytest.importorskip("bm25s")
    tokenizer, model = byte_tokenizer(), tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 400
    learner = stack_levels(model, tokenizer, levels=[Level(8, 0.0)], replay=Replay(500, piece=32))
    dialogue = Dialogue(learner, {"max_new_tokens": 3, "do_sample": False}, retrieve=80)
    seen = []
    generate = learner.generate
    learner.generate = lambda prompt, **options: seen.append(prompt) or generate(prompt, **options)
    for message in ("My cat is called Miezi.", "Bread needs flour.", "Who is Miezi?"):
        dialogue.reply(message)
    texts = [tokenizer.decode(prompt.tolist()) for prompt in seen]
    assert NOTES not in texts[0] + texts[1]
    assert f"User: {NOTES}\nMy cat is called Miezi.\n" in texts[2]
    assert texts[2].endswith("\nWho is Miezi?\nAssistant:")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    dialogue.reply("Miezi?")
    assert f"[user]{NOTES}\nMy cat is called" in tokenizer.decode(seen[-1].tolist())
    assert torch.is_tensor(seen[-1])
