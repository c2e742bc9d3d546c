"""A saved model, its tokenizer, and a conversation with it that outlives the process."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from nested_learning._precision import loading_dtype
from nested_learning._tensor_files import parse_json
from nested_learning.models import HopeCache, HopeForCausalLM
from nested_learning.training.data import load_tokenizer
from nested_learning.training.models import any_config, saved_folder

PENDING = "pending_ids"  # metadata key: ids that belong to the text but were not fed to the model yet


def load_model(path: str) -> tuple[HopeForCausalLM, PreTrainedTokenizerFast]:
    """The Hope model in a folder, ready to generate, and its tokenizer. Nothing is downloaded.

    Raises:
        ValueError: no model there, a damaged one, one of another kind, or a tokenizer of another model.
    """
    folder = saved_folder(path)
    config = any_config(str(folder))
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} ids, the model {config.vocab_size}: "
            "it belongs to another model"
        )
    disable_progress_bar()  # of loading the weights
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    assert device is not None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=loading_dtype(config, device)
        )
    except Exception as error:  # safetensors, json and torch each have their own
        raise ValueError(f"the model in {folder} is damaged ({type(error).__name__}: {error})") from error
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"the weights in {folder} lack {', '.join(sorted(report['missing_keys']))}")
    return model.to(device).eval(), tokenizer


class Conversation:
    """The text that a model has read and written: its cache, and the last token, not read yet."""

    def __init__(
        self, model: HopeForCausalLM, tokenizer: PreTrainedTokenizerFast, cache: HopeCache, pending: list[int]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.pending = pending

    @classmethod
    def open(
        cls, model: HopeForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str | None
    ) -> Conversation:
        """A new conversation, or the one in a file.

        Raises:
            ValueError: the file is damaged or of another model.
            FileNotFoundError: there is no such file.
        """
        if path is None:
            return cls(model, tokenizer, HopeCache(model.config), [])
        cache = HopeCache.load(path, model, device=model.device)
        if cache.batch_size != 1:
            raise ValueError(f"{path} holds {cache.batch_size} texts side by side, expected one conversation")
        with safe_open(path, framework="pt") as file:
            pending = _read_pending(path, (file.metadata() or {}).get(PENDING, "[]"), model.config.vocab_size)
        return cls(model, tokenizer, cache, pending)

    @property
    def tokens_seen(self) -> int:
        """Number of tokens of the text so far."""
        read = 0 if self.cache.tokens_seen is None else int(self.cache.tokens_seen[0])
        return read + len(self.pending)

    def generate(self, prompt: str, **options: Any) -> list[int]:
        """Ids of the continuation after the text so far and the prompt.

        Args:
            prompt: new text; an empty one at the start of a conversation stands for a new document.
            options: of transformers' `generate`.
        """
        new = self.tokenizer.encode(prompt, add_special_tokens=False)
        ids = [*self.pending, *new]
        if not ids:
            ids = [self.tokenizer.eos_token_id]
        inputs = torch.tensor([ids], device=self.model.device)
        # A mask over all columns so far says that these ids are new, even if they begin as the text did.
        mask = inputs.new_ones(1, self.cache.get_seq_length() + len(ids))
        output = self.model.generate(
            inputs,
            attention_mask=mask,
            past_key_values=self.cache,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        written = output[0, len(ids) :].tolist()
        self.pending = written[-1:]
        return written

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to one safetensors file, which `HopeCache.load` reads as well.

        Raises:
            ValueError: nothing was read yet, or the path is that of a folder, a device or a pipe.
            OSError: the file cannot be written; an earlier one of that name is left as it was.
        """
        self.cache.save(path, {PENDING: json.dumps(self.pending)})


def _read_pending(path: str, text: str, vocab_size: int) -> list[int]:
    """The ids that were not fed yet. ValueError for anything but a list of ids of the vocabulary."""
    try:
        pending = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its {PENDING} is no JSON: {error}") from error
    is_list = isinstance(pending, list) and all(type(i) is int and 0 <= i < vocab_size for i in pending)
    if not is_list:
        raise ValueError(
            f"{path} is damaged: its {PENDING} is {text[:60]}, expected a list of ids from 0 to "
            f"{vocab_size - 1}"
        )
    return pending  # type: ignore[return-value]
