"""`nested-learning chat`: a conversation that is learned, kept in a file, and taken back."""

from __future__ import annotations

import io
import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nested_learning.cli.dialogue import Dialogue
from nested_learning.cli.main import main
from nested_learning.cli.turns import SpokenTurn
from nested_learning.continual import AUTO, Level, stack_levels
from nested_learning.continual.files import locked
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import byte_llama
from tests.damage import read_file

LEVELS = ["--chunk_sizes", "4", "8", "--level_lr", "0.5", "0.1"]
GREEDY = ["--temperature", "0", "--max_new_tokens", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    model, tokenizer = byte_llama(max_position_embeddings=64)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """Runs the command on lines of input; returns (exit code, stdout lines, stderr)."""

    def run(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        capsys.readouterr()
        levels = LEVELS if "--no-levels" not in options else []
        code = main(
            ["chat", "--model", folder, *levels, *GREEDY, *(o for o in options if o != "--no-levels")]
        )
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def dialogue_on(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    learner = stack_levels(model, byte_tokenizer(), levels=[Level(4, 0.5), Level(8, 0.1)])
    return Dialogue(learner, {"max_new_tokens": 5, "do_sample": False}, **options)


def test_the_memory_persists(chat, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    code, _, err = chat(["hello there"], "--memory", path)
    assert code == 0
    assert "memory saved" in err
    code, _, err = chat(["again"], "--memory", path)
    assert code == 0
    assert "12 tokens read so far" in err  # with the line break


def test_commands(chat, tmp_path):
    other = tmp_path / "other.safetensors"
    lines = [
        "/surprise",
        "hello",
        "/surprise",
        f"/save {other}",
        "/undo",
        "/undo",
        "/reset",
        "/nonsense",
        "/save",
    ]
    code, out, err = chat([*lines, "/quit", "not read"])
    assert code == 0
    assert any("'h'" in line for line in out)
    assert any(line.endswith("mean") for line in out)
    assert "taken back: hello" in out
    assert "memory and conversation are empty" in out
    assert err.count("nothing has been said") == 2
    assert "unknown command '/nonsense'" in err
    assert "there is no memory file" in err
    assert other.exists()


def test_an_answer_leaves_room_for_a_message(chat):
    code, out, err = chat(["hello"], "--max_new_tokens", "64")  # all the positions of the model
    assert code == 2
    assert not out
    assert "max_new_tokens is 64, but the model reads 64 positions" in err
    assert chat([], "--max_new_tokens", "63")[0] == 0


def test_undo_restores_memory_and_conversation(folder):
    dialogue, other = dialogue_on(folder), dialogue_on(folder)
    for message in ("first message", "second"):
        assert dialogue.reply(message) == other.reply(message)
    dialogue.reply("a third one that is taken back")
    assert dialogue.undo() == "a third one that is taken back"
    assert dialogue.reply("fourth") == other.reply("fourth")
    for name, delta in other.learner.memory.diff().items():
        assert torch.equal(delta, dialogue.learner.memory.diff()[name])


def test_an_interrupted_turn_leaves_no_trace(folder, monkeypatch):
    dialogue, other = dialogue_on(folder, learn_from_replies=True), dialogue_on(folder)
    observe = dialogue.learner.observe

    def interrupted(given, **options):
        if isinstance(given, str):  # the reply; the message has been learned already
            raise KeyboardInterrupt
        return observe(given, **options)

    monkeypatch.setattr(dialogue.learner, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dialogue.reply("hello")
    assert dialogue.learner.memory.is_empty
    monkeypatch.setattr(dialogue.learner, "observe", observe)
    assert dialogue.reply("hello") == other.reply("hello")


def test_replies_are_learned_only_when_asked(folder):
    silent, eager = dialogue_on(folder), dialogue_on(folder, learn_from_replies=True)
    reply = silent.reply("hello")
    assert eager.reply("hello") == reply
    assert silent.learner.memory.rows[0].position == len("hello\n")
    assert eager.learner.memory.rows[0].position == len(f"hello\n{reply}\n".encode())


def test_a_long_conversation_drops_its_oldest_turns(folder):
    dialogue = dialogue_on(folder)
    for _ in range(5):
        dialogue.reply("0123456789")  # five framed turns would not fit into 64 positions
    assert dialogue.learner.memory.rows[0].position == 5 * 11
    with pytest.raises(ValueError, match="write a shorter one"):
        dialogue.reply("x" * 64)
    assert dialogue.learner.memory.rows[0].position == 5 * 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk_sizes", "8", "4"], "must increase"),
        (["--rank", "1", "2", "3"], "3 values for 2 levels"),
        (["--layers", "first"], "layers must be"),
        (["--temperature", "-1"], "temperature"),
        (
            ["--source", "monday"],
            "--source monday is about what is kept, but nothing is: give --replay TOKENS",
        ),
        (["--replay_share", "0.5"], "give --replay TOKENS"),
        (["--replay_choose", "surprise"], "give --replay TOKENS"),
        (["--memorie", "x"], "unknown option"),
    ],
)
def test_bad_input(chat, options, message):
    code, out, err = chat(["hello"], *options)
    assert code == 2
    assert message in err
    assert out == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hope-smal", "'hope-smal' is no folder; did you mean 'hope-small'?"),
        ("hope-tiny", "'hope-tiny' is a preset, a model without trained weights; expected the folder"),
    ],
)
def test_names_of_ours_are_not_looked_for_on_the_hub(chat, monkeypatch, name, message):
    def asked(*args, **kwargs):
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    code, out, err = chat(["hello"], "--model", name)
    assert (code, out) == (2, [])
    assert message in err


def test_a_line_that_is_no_text_ends_nothing(chat, monkeypatch, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    code, out, err = chat(["hello", "a\udcffb", "/save \udcff", "again"], "--memory", path)
    assert (code, len(out)) == (0, 2)
    assert err.count("the line has half of a surrogate pair") == 2
    piped = io.TextIOWrapper(io.BytesIO(b"hello\n\xff bytes\nagain\n"), encoding="utf-8")
    monkeypatch.setattr("io.StringIO", lambda text: piped)  # what the fixture gives as the input
    assert chat([])[:2] == (0, out)


@pytest.mark.parametrize("heard", [True, False])  # nohup lets a program ignore SIGHUP, and so it stays
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_chat_and_its_memory_is_saved(folder, monkeypatch, tmp_path, number, heard):
    class Lines(io.StringIO):
        def readline(self, *size: int) -> str:
            return super().readline(*size) or os.kill(os.getpid(), number) or ""

    path, handler = tmp_path / "memory.safetensors", signal.SIG_DFL if heard else signal.SIG_IGN
    monkeypatch.setattr("sys.stdin", Lines("hello\n"))
    command = ["chat", "--model", folder, *LEVELS, *GREEDY, "--memory", str(path)]
    before = signal.signal(number, handler)
    try:
        if heard:
            with pytest.raises(SystemExit) as ended:
                main(command)
            assert ended.value.code == 128 + number
        else:
            assert main(command) == 0
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert path.exists()


def test_the_coldest_answer_is_the_likeliest(chat):
    _, likeliest, _ = chat(["hello"])
    assert chat(["hello"], "--temperature", "1e-40")[:2] == (0, likeliest)


def test_two_chats_on_one_file(chat, tmp_path):
    path = tmp_path / "memory.safetensors"
    with locked(path):
        code, _, err = chat(["hello"], "--memory", str(path))
    assert code == 2
    assert "in use by another process" in err


def test_a_memory_that_is_a_pipe_is_refused(chat, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, out, err = chat(["hello"], "--memory", str(tmp_path / "pipe"))
    assert (code, out) == (2, [])
    assert "it is a pipe; give the name of a regular file" in err
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_memory_without_a_checksum_goes_on_with_a_warning(chat, tmp_path):
    path = tmp_path / "memory"
    chat(["hello there"], "--memory", str(path))
    tensors, metadata = read_file(path)
    old = {name: text for name, text in metadata.items() if name not in ("sha256", "checked")}
    save_file(tensors, path, {**old, "version": "1"})
    with pytest.warns(RuntimeWarning, match="saved again, it gets one"):
        code, _, err = chat(["again"], "--memory", str(path))
    assert code == 0
    assert "12 tokens read so far" in err
    assert "sha256" in read_file(path)[1]


def test_without_flags_of_levels(chat, tmp_path):
    """A new memory has the levels of `Learner.auto`, an old one its own."""
    new, old = tmp_path / "new", tmp_path / "old"
    chat(["hello there"], "--memory", str(old))
    for path in (old, new, new):
        code, _, err = chat(["hello there"], "--memory", str(path), "--no-levels")
        assert code == 0
    assert "12 tokens read so far" in err
    for path, chunks, dtype in (
        (new, [AUTO.levels[0].chunk_size], torch.bfloat16),
        (old, [4, 8], torch.float32),
    ):
        tensors, metadata = read_file(path)
        assert [level["chunk_size"] for level in json.loads(metadata["levels"])] == chunks
        assert {t.dtype for name, t in tensors.items() if "keys" in name} == {dtype}
        assert json.loads(metadata["rows"])[0]["position"] == 24


def test_a_turn_that_torch_cannot_take_is_told_and_taken_back(chat, monkeypatch):
    def fails(self, message, before):
        if message == "b":
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return SpokenTurn(before, message, f"to {message}", [])

    monkeypatch.setattr(Dialogue, "_take_turn", fails)
    code, out, err = chat(["a", "b", "c"])
    assert (code, out) == (0, ["to a", "to c"])
    assert "error: probability tensor contains" in err


def test_answers_that_nobody_reads_end_the_chat(chat, monkeypatch):
    taken = []

    def leaves(self, message, before):
        taken.append(message)
        raise BrokenPipeError

    monkeypatch.setattr(Dialogue, "_take_turn", leaves)
    monkeypatch.setattr("nested_learning.cli.main._close_stdout", lambda: None)
    code, _, err = chat(["a", "b"])
    assert (code, taken) == (0, ["a"])
    assert "error" not in err
