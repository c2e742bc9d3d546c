"""Byte-level tokenizers as real transformers tokenizers: plain bytes, or byte-level BPE.

Both have one layout of ids: 0..255 are the byte values, 256 ends a document (eos and bos), 257 pads,
and the merges of a BPE follow from 258 on. A byte tokenizer is the BPE without merges, so one function
builds both, and every text survives encoding and decoding unchanged. Both frame conversations as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Sized
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nested_learning._errors import unknown
from nested_learning._progress import Progress, progress

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
FIRST_MERGE_ID = 258  # 256 bytes, END_OF_TEXT, PAD

# Words as GPT-2 cuts them (contractions, letters, digits, other signs, white space), with numbers cut
# into groups of at most three digits; every character belongs to exactly one piece.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A conversation as `nested-learning chat` frames it, with an end of text after each answer. A prompt for an
# answer is a prefix of the conversation that has it; answers are marked as what to learn from.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.role.capitalize() + ': ' + message.content + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
_PIECE_CHARS = 1 << 20
_PIECES_AT_ONCE = 64  # encoded in parallel


@cache
def byte_characters() -> tuple[str, ...]:
    """The printable character that stands for each byte value in a byte-level vocabulary (256 of them).

    The field's usual table: visible Latin-1 characters stand for themselves, the other byte values for
    the characters from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return tuple(chr(b) if b in visible else chr(next(stand_ins)) for b in range(256))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 258 ids: the byte values, 256 `<|endoftext|>` (eos, bos), 257 `<|pad|>`.

    Saved with `save_pretrained`, it is loaded by `AutoTokenizer` without custom code.
    """
    return _assemble([])


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; the same texts give the same tokenizer.

    Args:
        texts: documents, read once.
        vocab_size: number of ids, bytes and special tokens included: more than 258. Short texts can
            run out of pairs before; then the vocabulary is smaller.
        min_frequency: a pair has to occur this often to become a token.

    Raises:
        ValueError: `vocab_size` leaves no room for merges, or the texts are empty.
    """
    if vocab_size <= FIRST_MERGE_ID:
        raise ValueError(
            f"vocab_size must be more than {FIRST_MERGE_ID} (256 bytes and 2 special tokens), got "
            f"{vocab_size}; for plain bytes use the byte tokenizer"
        )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer(words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=min_frequency,
        initial_alphabet=list(byte_characters()),
        show_progress=False,
    )
    with progress("training the tokenizer", len(texts) if isinstance(texts, Sized) else None, "text") as bar:
        trained.train_from_iterator(_counted(texts, bar), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    if not merges:
        raise ValueError(
            f"no pair of bytes occurs {min_frequency} times in the text, so there is no BPE to train: "
            "give more text or use the byte tokenizer"
        )
    return _assemble(merges)


def _counted(texts: Iterable[str], bar: Progress) -> Iterator[str]:
    """Texts that are not empty, counted on a bar that says what comes after the last."""
    for text in texts:
        if text:
            yield text
        bar.advance()
    bar.note = "merging pairs"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in folder `path`, with an end-of-text and a padding token, padding left.

    Only local files are read and no code of the folder is run. A tokenizer without a padding token pads
    with its end-of-text token.

    Raises:
        ValueError: there is no such folder, it holds no tokenizer, a damaged one, or one that has no
            end-of-text token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"no tokenizer at {str(path)!r}: expected a folder written by save_pretrained")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer.json, so it is not the folder of a saved fast tokenizer; "
            "save one there with tokenizer.save_pretrained(folder)"
        )
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))  # its message names the damaged place
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(
            f"the tokenizer in {str(folder)!r} is damaged or not one that transformers can load "
            f"({type(error).__name__}: {error}); save it again"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{str(folder)!r} holds a {type(tokenizer).__name__}; a fast tokenizer is needed")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} has no end-of-text token to put between documents; "
            "set tokenizer.eos_token and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def make_tokenizer(name: str, texts: Iterable[str], bpe_vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer a configuration names: "byte", "bpe" (trained on `texts`) or a folder."""
    if name == "byte":
        return byte_tokenizer()
    if name == "bpe":
        return train_bpe(texts, bpe_vocab_size)
    if not Path(name).exists():
        raise ValueError(
            f"{unknown('tokenizer', name, ['byte', 'bpe'])} Or give the folder of a saved tokenizer."
        )
    return load_tokenizer(name)


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """Token ids of all texts, each followed by the end-of-text id: [N] uint16, or uint32 where needed.

    Special tokens that a text spells out are ordinary text here: only the ends of documents are marked.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = np.array([tokenizer.eos_token_id], dtype)
    parts: list[np.ndarray] = []
    if _is_byte_tokenizer(tokenizer):
        for text in texts:
            parts += [np.frombuffer(text.encode(), np.uint8).astype(dtype), end]
    else:
        pieces = chain.from_iterable(_mark_last(_split_long(text)) for text in texts)
        total = len(texts) if isinstance(texts, Sized) else None
        with progress("encoding", total, "text") as bar:
            for batch in iter(lambda: list(islice(pieces, _PIECES_AT_ONCE)), []):
                encoded = _encode(tokenizer, [piece for piece, _ in batch])
                for ids, (_, last) in zip(encoded, batch, strict=True):
                    parts += [np.array(ids, dtype), end] if last else [np.array(ids, dtype)]
                    bar.advance(last)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _encode(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> list[list[int]]:
    return tokenizer(
        pieces,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]


def _mark_last(pieces: list[str]) -> Iterator[tuple[str, bool]]:
    for number, piece in enumerate(pieces, start=1):
        yield piece, number == len(pieces)


def _split_long(text: str) -> list[str]:
    """Pieces of about a million characters, so that a long text needs little memory to encode.

    A cut follows a lone line end between two visible characters. There a word of the BPE ends anyway, so
    the ids are those of the whole text; a text without such places is not cut.
    """
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS:
        cut = start + _PIECE_CHARS
        while (cut := text.find("\n", cut) + 1) > 0:
            if cut == len(text) or not (text[cut].isspace() or text[cut - 2].isspace()):
                break
        if cut <= 0 or cut == len(text):
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _is_byte_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True if the ids of a text are its UTF-8 bytes, so that numpy can encode it."""
    return (
        len(tokenizer) == FIRST_MERGE_ID
        and tokenizer.get_vocab() == byte_tokenizer().get_vocab()
        and tokenizer.backend_tokenizer.normalizer is None
    )


def _pre_tokenizer(words: bool) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if not words:
        return to_bytes
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"), to_bytes])


def _assemble(merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """The tokenizer with these merges, in order of rank."""
    vocab = {character: value for value, character in enumerate(byte_characters())}
    vocab |= {END_OF_TEXT: 256, PAD: 257}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = _pre_tokenizer(words=bool(merges))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, PAD)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
