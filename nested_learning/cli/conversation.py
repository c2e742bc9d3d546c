"""A saved model, its tokenizer, and a conversation with it that outlives the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from nested_learning._precision import loading_dtype
from nested_learning._saved_models import IncompleteModelError, load_causal_lm
from nested_learning.models import HopeCache, HopeConfig, HopeForCausalLM
from nested_learning.models.hope.session_hope import HopeSession
from nested_learning.models.packaged import or_packaged
from nested_learning.training.data import load_tokenizer
from nested_learning.training.models import any_config, saved_folder


def is_hope(name: str) -> bool:
    """Whether a name stands for a Hope model that is here: its folder, a run's, or one of the package.

    Raises:
        ValueError: it is a folder without a model, or the package is damaged.
    """
    name = or_packaged(name)
    if not Path(name).is_dir():
        return False
    return isinstance(AutoConfig.from_pretrained(saved_folder(name), local_files_only=True), HopeConfig)


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
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    assert device is not None
    try:
        model = load_causal_lm(folder, config, local_files_only=True, dtype=loading_dtype(config, device))
    except IncompleteModelError:
        raise
    except Exception as error:  # safetensors, json and torch each have their own
        raise ValueError(f"the model in {folder} is damaged ({type(error).__name__}: {error})") from error
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
        session = HopeSession.load(path, model)
        return cls(model, tokenizer, session.cache, list(session.pending))

    @property
    def tokens_seen(self) -> int:
        """Number of tokens of the text so far."""
        return self._session.length

    @property
    def _session(self) -> HopeSession:
        return HopeSession(self.cache, tuple(self.pending))

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
        self._session.save(path)
