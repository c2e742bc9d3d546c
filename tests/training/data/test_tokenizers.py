import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from nested_learning.training.data import byte_tokenizer, load_tokenizer, tokenizers, train_bpe

BYTE = byte_tokenizer()
SAMPLE = ["the lower the level, the slower the lesson\n" * 20, "naïve 学習 🧠 don't 12345 \t\n\n x"]
BPE = train_bpe(SAMPLE, 270)

# Any text, and text made of what tokenizers stumble over.
STUMBLES = [
    "<|endoftext|>",
    "<|pad|>",
    " ",
    "  ",
    "\n",
    "\r\n",
    "é",
    "e\u0301",
    "🧠",
    "a",
    ".",
    " ,",
    "\0",
    "Ġ",
]
any_text = st.text() | st.lists(st.sampled_from(STUMBLES)).map("".join)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_byte_layout():
    assert isinstance(BYTE, PreTrainedTokenizerFast)
    assert len(BYTE) == BYTE.vocab_size == 258
    assert (BYTE.bos_token_id, BYTE.eos_token_id, BYTE.pad_token_id) == (256, 256, 257)
    assert BYTE.eos_token == "<|endoftext|>"
    assert BYTE.pad_token == "<|pad|>"
    assert BYTE("a<|endoftext|>é")["input_ids"] == [97, 256, 195, 169]
    assert set(BYTE("a")) == {"input_ids", "attention_mask"}  # no token_type_ids for models to choke on


@given(any_text)
def test_byte_ids_are_utf8_bytes(text):
    assert plain_ids(BYTE, text) == list(text.encode())


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@given(text=any_text)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(plain_ids(tokenizer, text)) == text


@given(st.binary())
def test_any_bytes_decode_as_python_does(content):
    assert BYTE.decode(list(content)) == content.decode(errors="replace")


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@given(texts=st.lists(any_text, max_size=4))
def test_encode_documents_equals_the_tokenizer(tokenizer, texts):
    expected = [i for text in texts for i in [*plain_ids(tokenizer, text), 256]]
    encoded = tokenizers.encode_documents(tokenizer, texts)
    assert encoded.dtype == np.uint16
    assert encoded.tolist() == expected


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_long_texts_in_pieces_give_the_same_ids(tokenizer, prose, monkeypatch):
    text = prose(3000) + " \n a\n \nb\n\n\nc\n"
    whole = plain_ids(tokenizer, text)
    monkeypatch.setattr(tokenizers, "_PIECE_CHARS", 50)
    assert len(tokenizers._split_long(text)) > 100
    assert "".join(tokenizers._split_long(text)) == text
    assert tokenizers.encode_documents(tokenizer, [text]).tolist() == [*whole, 256]


def test_a_loaded_byte_tokenizer_takes_the_direct_path(tmp_path):
    BYTE.save_pretrained(tmp_path)
    assert tokenizers._is_byte_tokenizer(load_tokenizer(tmp_path))
    assert not tokenizers._is_byte_tokenizer(BPE)


def test_bpe_keeps_the_byte_layout():
    assert len(BPE) == 270
    assert BPE.convert_ids_to_tokens(list(range(258))) == BYTE.convert_ids_to_tokens(list(range(258)))
    assert (BPE.eos_token_id, BPE.pad_token_id) == (256, 257)
    assert len(plain_ids(BPE, SAMPLE[0])) < len(SAMPLE[0].encode()) / 2


def test_bpe_merges_the_most_frequent_pair_first():
    text = "low lower lowest slow slower"
    words = [w if i == 0 else " " + w for i, w in enumerate(text.split(" "))]
    pairs = Counter(pair for word in words for pair in pairwise(word))
    tied = {pair for pair, count in pairs.items() if count == max(pairs.values())}
    tokenizer = train_bpe([text], 259)
    [(left, right)] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert (left, right) in tied
    assert tokenizer.convert_ids_to_tokens(258) == left + right


def test_bpe_is_deterministic_across_processes(prose, tmp_path):
    text = prose(2000)
    here = train_bpe([text], 400)
    assert train_bpe([text], 400).get_vocab() == here.get_vocab()
    (tmp_path / "text").write_text(text, encoding="utf-8")
    program = (
        "import sys; from pathlib import Path\n"
        "from nested_learning.training.data.tokenizers import train_bpe\n"
        "text = Path(sys.argv[1], 'text').read_text(encoding='utf-8')\n"
        "train_bpe([text], 400).save_pretrained(Path(sys.argv[1], 'bpe'))"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    there = load_tokenizer(tmp_path / "bpe")
    assert there.backend_tokenizer.to_str() == here.backend_tokenizer.to_str()


@pytest.mark.parametrize("texts", [[], [""], ["abc"]])
def test_bpe_refuses_texts_without_pairs_and_small_vocabularies(texts):
    with pytest.raises(ValueError, match="no pair of bytes occurs 2 times"):
        train_bpe(texts, 300)
    with pytest.raises(ValueError, match=r"more than 258.*got 258"):
        train_bpe(SAMPLE, 258)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_auto_tokenizer_and_pipeline(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.padding_side) == (256, 257, "left")
    assert loaded(SAMPLE)["input_ids"] == tokenizer(SAMPLE)["input_ids"]
    assert loaded.decode(loaded(" a , b . don 't")["input_ids"]) == " a , b . don 't"

    generate = pipeline("text-generation", model=str(tmp_path))
    outputs = generate(["naïve 学", "x"], max_new_tokens=6, do_sample=False, batch_size=2)
    for prompt, (output,) in zip(["naïve 学", "x"], outputs, strict=True):
        ids = loaded(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
        assert output["generated_text"].startswith(prompt)
        assert output["generated_text"] == loaded.decode(expected, skip_special_tokens=True)


def test_batches_are_padded_left():
    batch = BYTE(["abc", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[97, 98, 99], [257, 257, 97]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def _damage(folder, case):
    file = folder / "tokenizer.json"
    content = file.read_text(encoding="utf-8")
    if case == "truncated":
        file.write_text(content[: len(content) // 2], encoding="utf-8")
    elif case == "binary":
        file.write_bytes(bytes(range(256)))
    elif case == "foreign":
        file.write_text('{"layers": 4}', encoding="utf-8")
    elif case == "config":
        (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    elif case == "missing":
        file.unlink()
    elif case == "end":
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        del config["eos_token"]
        path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "damaged"),
        ("binary", "damaged"),
        ("foreign", "damaged"),
        ("config", "damaged"),
        ("missing", r"no tokenizer\.json"),
        ("end", "no end-of-text token"),
    ],
)
def test_load_refuses_what_is_no_tokenizer(case, message, tmp_path):
    BYTE.save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    _damage(tmp_path, case)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_load_refuses_a_missing_folder_and_a_misspelt_name(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Did you mean 'byte'"):
        tokenizers.make_tokenizer("bytes", [], 300)


@settings(max_examples=20)
@given(st.lists(st.text(min_size=5), min_size=1), st.integers(259, 280))
def test_bpe_of_any_text_round_trips(texts, vocab_size):
    tokenizer = train_bpe([*texts, "aa" * 5], vocab_size)
    for text in texts:
        assert tokenizer.decode(plain_ids(tokenizer, text)) == text
