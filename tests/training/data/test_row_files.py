"""Files of rows as sources of documents: every format, compressed or not, and what is refused."""

import bz2
import gzip
import json
import lzma
import os
import socket

import pandas as pd
import pytest

from nested_learning.cli.main import main
from nested_learning.training.data import DataConfig, build_data, load_corpus
from nested_learning.training.data.rows import row_texts

TEXTS = ["a\nb", "123", "NA", "", 'ü,"q"', "  x ", "null"]
ROWS = [{"id": i, "text": text, "n": i / 2} for i, text in enumerate(TEXTS)]
NUMBERED = [(i + 1, text) for i, text in enumerate(TEXTS) if text]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FRAME = pd.DataFrame(ROWS)
CONTENT = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": FRAME.to_csv(index=False).encode(),
    ".tsv": FRAME.to_csv(index=False, sep="\t").encode(),
    ".txt": b"one text\n",
}
PACK = {"": lambda content: content, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}


@pytest.fixture
def written(tmp_path):
    """A function that writes a file of the given name and content and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and a home and a working folder in which nothing may be left."""

    def refused(*args, **kwargs):
        raise AssertionError("the network was asked")

    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not [*(tmp_path / "home").iterdir(), *(tmp_path / "here").iterdir()]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.usefixtures("offline")
def test_every_row_is_a_document(written, suffix, packed):
    path = written(f"a [1]{suffix}{packed}", PACK[packed](CONTENT[suffix]))
    if suffix == ".txt":
        assert load_corpus(str(path), validation_fraction=0.5).train[0].text == "one "
    else:
        assert list(row_texts(path)) == NUMBERED


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("inside", ["snappy", "gzip", "zstd"])
def test_parquet(tmp_path, inside):
    FRAME.to_parquet(tmp_path / "a.parquet", compression=inside)
    assert list(row_texts(tmp_path / "a.parquet")) == NUMBERED


def test_rows_are_split_and_marked_as_documents(tmp_path, written):
    texts = [f"row {i:02} of text " + "x" * i for i in range(40)]
    (tmp_path / "data").mkdir()
    written("data/a.jsonl", "".join(json.dumps({"body": text}) + "\n" for text in texts[:20]).encode())
    written("data/b.csv.gz", gzip.compress(pd.DataFrame({"body": texts[20:39]}).to_csv(index=False).encode()))
    written("data/c.txt", texts[39].encode())
    corpus = load_corpus(str(tmp_path / "data"))
    assert sorted(d.text for d in corpus.train + corpus.validation) == texts
    assert len(corpus.validation) == 4
    assert {"a.jsonl#1", "b.csv.gz#19", "c.txt"} <= {d.name for d in corpus.train + corpus.validation}

    config = DataConfig(source=str(tmp_path / "data" / "*.*"), block_size=16, tokenizer="byte")
    bundle = build_data(config, 8)
    assert bundle.summary["train_documents"] == 36
    assert bundle.summary["train_tokens"] == sum(len(d.text) + 1 for d in corpus.train)
    for sample in map(bundle.train.__getitem__, range(8)):
        text = bundle.tokenizer.convert_ids_to_tokens(sample["input_ids"])
        begins = [0] + [i + 1 for i, token in enumerate(text[:-1]) if token == "<|endoftext|>"]
        assert (sample["position_ids"] == 0).nonzero().squeeze(1).tolist() == begins
    bpe = build_data(DataConfig(source=config.source, block_size=16, tokenizer="bpe", bpe_vocab_size=270), 8)
    assert bpe.summary["train_tokens"] < bundle.summary["train_tokens"]
    assert load_corpus(str(tmp_path / "data"), max_bytes=40).train[0].text.startswith("row 00 of")


def test_the_column(written):
    path = written(
        "a.jsonl", b'{"id": "1", "body": "a", "text": "b"}\n{"id": "2", "body": "c", "text": "d"}\n'
    )
    assert list(row_texts(path)) == [(1, "b"), (2, "d")]
    assert list(row_texts(path, "body")) == [(1, "a"), (2, "c")]
    assert list(row_texts(written("b.csv", b"id,body\n1,a\n2,7\n"))) == [(1, "a"), (2, "7")]
    assert list(row_texts(written("c.json", b'["a", "b"]'))) == [(1, "a"), (2, "b")]
    huge = json.dumps({"text": "x" * 4_000_000}).encode() + b'\n{"text": "b"}\n'
    assert [len(text) for _, text in row_texts(written("d.jsonl", huge))] == [4_000_000, 1]


BAD = {
    "cut.jsonl": (LINES[:-10], "line 7"),
    "damaged.jsonl": (LINES.replace(b'"123"', b'"123'), "line 2"),
    "number.jsonl": (
        LINES.replace(b'"123"', b"123"),
        "row 2 .* int '123' in the column 'text', expected",
    ),
    "null.jsonl": (LINES.replace(b'"123"', b"null"), "row 2 .* has nothing in"),
    "missing.jsonl": (b'{"text": "a"}\n{"other": "b"}\n', "row 2 .* has nothing in"),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": {"b": 1}}\n', "row 2 .* has dict"),
    "nul.jsonl": (b'{"text": "a\\u0000b"}\n', r"row 1 .* has a NUL \(character 1\)"),
    "no_objects.jsonl": (b"1\n2\n", "line 1 .no object"),
    "latin.jsonl": (b'{"text": "\xfc"}\n', "line 1.*utf-8"),
    "surrogate.jsonl": (b'{"text": "a\\ud800b"}\n', "surrogate"),
    "empty.jsonl": (b"", "is empty; leave it out"),
    "blank.jsonl": (b"\n\n", "has no rows"),
    "two.jsonl": (
        b'{"a": "x", "b": "y"}\n',
        "its columns are 'a', 'b'.*--data.text_column",
    ),
    "none.json": (b'{"data": [{"text": "a"}]}', "its columns are 'data', and none of them holds text"),
    "cut.json": (CONTENT[".json"][:-9], "cannot read"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c\n", "line 3, saw 3"),
    "quote.csv": (b'id,text\n1,"a\n2,b\n', "EOF inside string"),
    "latin.csv": (b"id,text\n1,\xfc\n", "utf-8"),
    "head.csv": (b"id,text\n", "has no rows"),
    "empty.csv": (b"", "is empty"),
    "bad.parquet": (b"PAR1xxxx", "not a parquet file"),
    "around.parquet.gz": (b"x", "compressed inside, not around"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], "ended before the end-of-stream"),
    "other.jsonl.gz": (LINES, "Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(b"text" * 99)[:-12], "ended before the end-of-stream"),
    "cut.txt.xz": (lzma.compress(b"text" * 99)[:-12], "cannot read"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(written, name):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as refused:
        load_corpus(str(written(name, content)))
    assert name in str(refused.value)


def test_a_column_where_no_file_has_any_is_refused(written):
    path = written("plain.txt", b"text")
    with pytest.raises(ValueError, match=r"text_column is 'body', but .*plain.txt' has no file of rows"):
        load_corpus(str(path), text_column="body")
    written("rows.jsonl", LINES)
    assert load_corpus(str(path.parent), text_column="text")


def test_commands_refuse_it_with_exit_code_2(written, tmp_path, capsys):
    path = written("two.csv", b"title,body\na,b\n")
    assert main(["train", "--data", str(path), "--output", str(tmp_path / "run")]) == 2
    assert "--data.text_column" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run")
