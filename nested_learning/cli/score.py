"""`nested-learning score`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nested_learning._checks import check_types, require
from nested_learning.cli.output import print_json, print_positions, print_table, say
from nested_learning.cli.parsing import new_parser, parse

DESCRIPTION = """\
Measure how well a trained model predicts a text, in bits per byte: block by block from the empty state, and
with the state carried from block to block, over all and by position in the document.

MODEL is a trained model of the package, a folder written by save_pretrained, or the --output folder of a
completed run. The text is what `nested-learning train --data` takes: of "stdlib" and other sources a tenth of
the documents is held out from training, and that is what is scored unless --part says otherwise.

examples:
  nested-learning score hope-small
  nested-learning score runs/first --data book.txt --part all --block_size 1024 --json
"""
PARTS = ("held-out", "all")


@dataclass(kw_only=True)
class ScoreConfig:
    """The text that is scored, and how it is read.

    Args:
        data: "stdlib", "tinyshakespeare", or a file, folder or glob, as for `nested-learning train`
        part: "held-out", what `nested-learning train` keeps for validation, or "all"
        validation_fraction: share of the text that was held out, in (0, 0.5]
        text_column: the column of a file of rows that holds the text
        block_size: tokens that are read at once
        max_blocks: read at most so many blocks, in whole documents, evenly spaced; 0 for all
        length: score the first so many tokens of each document that has as many; 0 for whole documents
        batch_size: documents that are read at a time
    """

    data: str = "stdlib"
    part: str = "held-out"
    validation_fraction: float = 0.1
    text_column: str = "text"
    block_size: int = 256
    max_blocks: int = 512
    length: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_types(self)
        require(self.part in PARTS, "part", self.part, " or ".join(PARTS))
        share = self.validation_fraction
        require(0 < share <= 0.5, "validation_fraction", share, "a share above 0, at most 0.5")
        require(self.block_size >= 1, "block_size", self.block_size, "a whole number above 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number above 0")
        require(self.max_blocks >= 0, "max_blocks", self.max_blocks, "0 or a whole number above 0")
        require(self.length == 0 or self.length >= 2, "length", self.length, "0 or a whole number above 1")


def run(argv: list[str]) -> int:
    """Parse, read, print. Returns the exit code."""
    parser = new_parser("score", "MODEL ", DESCRIPTION)
    parser.add_argument("model", type=str, help="trained model of the package, saved model or completed run")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, alone on stdout")
    parser.add_class_arguments(ScoreConfig, None)
    values = parse(parser, argv)
    config = ScoreConfig(**{name: values[name] for name in ScoreConfig.__dataclass_fields__})
    result = score(values.model, config)
    print_json(result) if values.json else _print(result)
    return 0


def score(model_folder: str, config: ScoreConfig) -> dict[str, Any]:
    """Bits per byte and losses by position of a text, as JSON holds them.

    A document's first token is not predicted, and its bytes are not counted.

    Args:
        model_folder: folder of a saved model or of a completed run, or a trained model of the package.
        config: the text, and how it is read.

    Returns:
        What `score_both_ways` returns, and "model", "data", "part", "bytes" (UTF-8, of the predicted tokens)
        and "bits_per_byte" of each way of reading; None where no predicted token has bytes.

    Raises:
        ValueError: no such model or text, or no document of the length asked for.
    """
    from nested_learning.cli.conversation import load_model
    from nested_learning.training.positions import score_both_ways

    model, tokenizer = load_model(model_folder)
    documents = _documents(tokenizer, config)
    num_bytes = sum(len(text.encode()) for text in _predicted(tokenizer, documents))
    result = score_both_ways(model, documents, config.block_size, config.batch_size)
    bits = {
        mode: None if nats is None or not num_bytes else nats * result["tokens"] / math.log(2) / num_bytes
        for mode, nats in result["nats_per_token"].items()
    }
    told = {"model": model_folder, "data": config.data, "part": config.part}
    return {**told, "bytes": num_bytes, "bits_per_byte": bits, **result}


def _documents(tokenizer: Any, config: ScoreConfig) -> Any:
    """Ids of the documents that are scored."""
    from nested_learning.training.data.packing import tokenize
    from nested_learning.training.data.sources import load_documents, split_documents
    from nested_learning.training.data.streams import documents_of, within_blocks

    chosen = load_documents(config.data, text_column=config.text_column)
    if config.part == "held-out":
        chosen = split_documents(chosen, config.validation_fraction).validation
    ids = tokenize(tokenizer, [document.text for document in chosen]).ids
    documents = [each for each in documents_of(ids, tokenizer.eos_token_id) if len(each) > 1]
    if config.length:
        documents = [each[: config.length] for each in documents if len(each) >= config.length]
        if not documents:
            raise ValueError(
                f"--length is {config.length}, but no document of {config.data!r} has as many tokens: "
                "set it lower, or to 0 for whole documents"
            )
    return within_blocks(documents, config.block_size, config.max_blocks or None)


def _predicted(tokenizer: Any, documents: Any) -> list[str]:
    """Text of the tokens that are predicted: all but each document's first."""
    return tokenizer.batch_decode(
        [document[1:].tolist() for document in documents],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _print(result: dict[str, Any]) -> None:
    rows = [
        (how, "-" if bits is None else f"{bits:.4f}", "-" if nats is None else f"{nats:.4f}")
        for how, bits, nats in (
            ("from the empty state", result["bits_per_byte"]["empty"], result["nats_per_token"]["empty"]),
            ("state carried", result["bits_per_byte"]["carried"], result["nats_per_token"]["carried"]),
        )
    ]
    print_table(
        f"{result['model']} on {result['data']} ({result['part']}), blocks of {result['block_size']}",
        ("", "bits per byte", "nats per token"),
        rows,
    )
    for mode in ("empty", "carried"):
        print_positions(mode, {"loss": result})
    say(f"{result['documents']} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes")
