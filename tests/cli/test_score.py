"""`nested-learning score`: bits per byte of a text, against sums over whole documents written out here."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from nested_learning import HopeForCausalLM
from nested_learning.cli.main import main
from nested_learning.models import preset
from nested_learning.training.data.tokenizers import make_tokenizer

TEXTS = ["Ein Haus, ein Baum.", "größer als zuvor, und schöner", "a rose is a rose is a rose", "x" * 40]
SMALL = {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1, "cms_levels": [{"chunk_size": 8}]}


@pytest.fixture(scope="module", params=["hope-tiny", "transformer-tiny"])
def folder(request, tmp_path_factory):
    """A random model and its tokenizer, saved."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("byte", TEXTS, 300)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    path = tmp_path_factory.mktemp("model") / request.param
    HopeForCausalLM(preset(request.param, **ids, **SMALL)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return str(path)


def scored(capsys, *argv):
    capsys.readouterr()
    assert main(["score", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def whole(folder, texts):
    """Sum of the losses of all tokens but each document's first, in nats, and their bytes."""
    model = HopeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = make_tokenizer(folder, [], 0)
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id])
        logits = model(ids[None]).logits[0, :-1]
        nats += F.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
        num_bytes += len(text.encode()) - 1  # the first byte is what nothing foretells
    return nats, num_bytes


def test_bits_per_byte_of_whole_documents(folder, rows, capsys):
    with torch.no_grad():
        nats, num_bytes = whole(folder, TEXTS)
    result = scored(capsys, folder, "--data", rows, "--part", "all", "--block_size", "7")
    assert result["bits_per_byte"]["carried"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result["bits_per_byte"]["empty"] != pytest.approx(result["bits_per_byte"]["carried"], rel=1e-4)
    one_block = scored(capsys, folder, "--data", rows, "--part", "all", "--block_size", "64")
    assert one_block["bits_per_byte"]["empty"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert one_block["bytes"] == num_bytes
    assert one_block["documents"] == len(TEXTS)


def test_parts_and_lengths(folder, rows, capsys):
    held_out = scored(capsys, folder, "--data", rows, "--validation_fraction", "0.5")
    assert held_out["bytes"] < scored(capsys, folder, "--data", rows, "--part", "all")["bytes"]
    first = scored(capsys, folder, "--data", rows, "--part", "all", "--length", "28")
    assert first["tokens"] == 27 * first["documents"]
    assert first["documents"] == 2
    assert main(["score", folder, "--data", rows, "--part", "all"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "state carried" in out
    assert "1 to 15" in out


def test_no_bits_per_byte_where_no_byte_is_predicted(folder, capsys, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    result = scored(capsys, folder, "--data", str(tmp_path / "one.txt"), "--part", "all")
    assert (result["tokens"], result["bytes"]) == (1, 0)
    assert result["bits_per_byte"] == {"empty": None, "carried": None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--part", "some"], "part"),
        (["--length", "1000"], "no document of"),
        (["--length", "1"], "length"),
        (["--max_blocks", "-1"], "max_blocks"),
        (["--validation_fraction", "0.6"], "validation_fraction"),
        (["--batch_size", "0"], "batch_size"),
    ],
)
def test_bad_input(folder, rows, capsys, argv, message):
    capsys.readouterr()
    assert main(["score", folder, "--data", rows, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
