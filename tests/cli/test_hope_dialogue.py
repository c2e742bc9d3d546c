"""`nested-learning chat` with a Hope model: to learn is to read, and the memory is a session."""

from __future__ import annotations

import io

import pytest
import torch

from nested_learning.cli.hope_dialogue import HopeDialogue
from nested_learning.cli.main import main
from nested_learning.models import HopeForCausalLM, preset
from nested_learning.models.hope.session_hope import HopeSession
from nested_learning.server.hope_mind import HopeMind
from nested_learning.training.data import byte_tokenizer

GREEDY = ["--temperature", "0", "--max_new_tokens", "5"]


def model_and_tokenizer():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
    return HopeForCausalLM(preset("hope-tiny", **sizes)).eval(), byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in model_and_tokenizer():
        part.save_pretrained(path)
    return str(path)


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """Runs the command on lines of input; returns (exit code, stdout lines, stderr)."""

    def run(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        capsys.readouterr()
        code = main(["chat", "--model", folder, *GREEDY, *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def dialogue(**options) -> HopeDialogue:
    return HopeDialogue(HopeMind(*model_and_tokenizer()), 5, temperature=0.0, **options)


def test_an_answer_leaves_room_for_a_message(chat):
    code, _, err = chat(["hello"], "--max_new_tokens", "8192")
    assert code == 2
    assert "max_new_tokens is 8192, but the model reads 8192 positions" in err


def test_the_memory_is_a_session_that_goes_on(chat, tmp_path):
    path = str(tmp_path / "memory.safetensors")
    code, _, err = chat(["hello there"], "--memory", path)
    assert code == 0
    assert "memory saved" in err
    session = HopeSession.load(path, model_and_tokenizer()[0])
    assert session.length == 1 + len("hello there\n")
    assert session.pending == (ord("\n"),)
    code, out, err = chat(["more", "/surprise", "/undo"], "--memory", path)
    assert code == 0
    assert "12 tokens read so far" in err
    assert "taken back: more" in out
    assert HopeSession.load(path, model_and_tokenizer()[0]).length == session.length
    code, _, err = chat(["/reset"], "--memory", path)
    assert "there is no" in err
    assert not (tmp_path / "memory.safetensors").exists()


def test_answers_and_surprise_are_those_of_the_model_on_the_whole_text():
    """Against one forward pass and `generate` over everything that was read and asked."""
    model, tokenizer = model_and_tokenizer()
    talk = dialogue()
    talk.reply("first message")
    text = [tokenizer.eos_token_id, *tokenizer.encode("first message\n", add_special_tokens=False)]
    reply = talk.reply("second")
    said = talk._turns[0].reply
    frame = [("user", "first message"), ("assistant", said), ("user", "second")]
    chat = [{"role": role, "content": content} for role, content in frame]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([text + tokenizer.encode(prompt, add_special_tokens=False)])
    made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    assert reply == tokenizer.decode(made, skip_special_tokens=True).strip()
    new = tokenizer.encode("second\n", add_special_tokens=False)
    whole = torch.tensor([text + new])
    with torch.no_grad():
        logits = model(whole).logits[0, len(text) - 1 : -1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(new), reduction="none")
    assert [nats for _, nats in talk.surprise()] == pytest.approx(losses.tolist(), abs=1e-4)
    assert [token for token, _ in talk.surprise()] == list("second\n")


def test_undo_restores_memory_and_conversation_and_replies_are_read_when_asked():
    talk, other = dialogue(), dialogue()
    for message in ("first message", "second"):
        assert talk.reply(message) == other.reply(message)
    talk.reply("taken back")
    assert talk.undo() == "taken back"
    assert talk.reply("fourth") == other.reply("fourth")
    for ours, theirs in zip(
        talk.memory.cache.states.values(), other.memory.cache.states.values(), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))
    eager = dialogue(learn_from_replies=True)
    reply = eager.reply("hello")
    learned = "hello\n" + (f"{reply}\n" if reply else "")
    assert eager.tokens_read == len(learned.encode())


def test_an_interrupted_turn_leaves_no_trace(monkeypatch):
    talk = dialogue()

    def interrupted(memory, ids):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(talk.mind, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.reply("hello")
    assert talk.tokens_read == 0
    assert talk.reply("hello") == dialogue().reply("hello")


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "8"],
        ["--replay", "100"],
        ["--compile"],
        ["--chunk_sizes", "32", "128", "512"],  # as it is by default, but for models that have levels
        ["--source", "chat"],
    ],
)
def test_options_of_other_models(chat, options):
    code, _, err = chat(["hello"], *options)
    assert code == 2
    assert "is a Hope model" in err


def test_commands_of_kept_texts(chat):
    code, _, err = chat(["hello", "/sources", "/forget chat", "/source work"])
    assert code == 0
    assert err.count("reads and keeps no texts") == 3


def test_an_empty_memory_removes_no_file_but_its_own(chat, tmp_path):
    mine, thesis, link = tmp_path / "mine", tmp_path / "thesis.txt", tmp_path / "link"
    thesis.write_text("years of work")
    code, _, err = chat([f"/save {thesis}", f"/save {tmp_path}"], "--memory", str(mine))
    assert code == 0
    assert "stays as it is" in err
    assert "it is a folder" in err
    assert thesis.read_text() == "years of work"
    chat(["hello"], "--memory", str(mine))
    link.symlink_to("mine")
    code, _, err = chat(["/reset"], "--memory", str(link))
    assert code == 0
    assert "the memory is empty" in err
    assert not mine.exists()  # what was forgotten is in no file, whatever its name
    assert link.is_symlink()
