"""Fisher information of background text: which weights a model needs for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_learning._progress import progress
from nested_learning._tensor_files import check_whole, read_tensors, write_tensors
from nested_learning.continual.context import evaluating
from nested_learning.continual.files import fingerprint
from nested_learning.continual.find import (
    Target,
    base_model,
    check_gradients,
    check_weights,
    find_targets,
    is_quantised,
    memory_dtype,
)
from nested_learning.continual.inputs import TextOrIds, most_positions, read_batch
from nested_learning.continual.weights import Workspace
from nested_learning.memory.state import Weights
from nested_learning.optimizers.checks import Bound

FORMAT, VERSION = "nested_learning.fisher", "1"
LENGTH = Bound(low=2, integer=True)


@dataclass(frozen=True, eq=False)
class Fisher:
    """Diagonal of the Fisher information of weights, for `stack_levels(fisher=…)`.

    A level with `decay` then forgets, at every write, a share of its own of each weight's delta:

        Δ_ij ← (1 − min(1, decay · F_ij)) Δ_ij,   where the mean of F over all its weights is 1.

    Weights that the background text needs go back to where they were trained; the others are left to what
    is read. Dynamic evaluation (arXiv 1904.08378) has the same form with the root mean square of the
    gradients, divided by its mean, in the place of F: `rooted` makes that of it.

    Attributes:
        diagonal: F by the weights' names in the state_dict, in their layout; bfloat16, mean 1 over all.
        fingerprint: fingerprint of the base model.
    """

    diagonal: Weights
    fingerprint: str

    @classmethod
    @torch.inference_mode(False)
    def of(
        cls,
        model: Any,
        text_or_ids: TextOrIds,
        tokenizer: Any = None,
        *,
        length: int = 256,
        modules: Sequence[str] | None = None,
    ) -> Fisher:
        """The Fisher diagonal of a background text at the model's own weights.

        F_ij is the mean over sequences of (∂ Σ next-token loss / ∂ W_ij)², with the losses of one sequence
        summed, divided by its mean over all weights: the empirical Fisher, of the tokens in the text. The
        gradients and their squares are summed in float32 at least.

        Args:
            model: a transformers causal language model, as `stack_levels` takes.
            text_or_ids: the background, as `Learner.observe` takes it: a text, ids, or a list of them.
            tokenizer: tokenizer for text; None if only ids come.
            length: most tokens of a sequence; longer texts are cut. One forward and backward pass each.
            modules: names (or ends of names) of the linear modules; default: the MLPs.

        Raises:
            ValueError: no text of two tokens, `length` beyond the model's positions, weights that are
                quantised, or gradients that are all zero or not finite.
        """
        LENGTH.check("length", length)
        model = base_model(model)
        if length > (positions := most_positions(model)):
            raise ValueError(
                f"length is {length}, but the model has {positions} positions; choose a shorter one"
            )
        texts = read_batch(text_or_ids, tokenizer, model).rows
        sequences = [piece for text in texts for piece in text.split(length) if len(piece) > 1]
        if not sequences:
            raise ValueError("the background has no text of two tokens, and one token has none to predict")
        with Workspace.of(model).bare(), evaluating(model):
            targets = find_targets(model, modules)
            check_weights(targets)
            check_gradients(model)
            if quantised := [target.name for target in targets if is_quantised(target.weight)]:
                raise ValueError(
                    f"{quantised[0]} is quantised and has no gradient; load the model in bfloat16"
                )
            squares = _mean_squares(model, targets, sequences)
            return cls(_normalised(squares), fingerprint(model))

    def rooted(self) -> Fisher:
        """√F with mean 1: the root mean square of the gradients, as in dynamic evaluation."""
        return Fisher(
            _normalised({name: f.double().sqrt() for name, f in self.diagonal.items()}), self.fingerprint
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with two bytes for each weight, and a checksum.

        Raises:
            ValueError, OSError: it cannot be written there; see `Memory.save`.
        """
        metadata = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        write_tensors(path, self.diagonal, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """The diagonal that `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or another kind of file.
        """
        tensors, metadata = read_tensors(path, "Fisher")
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise ValueError(
                f"{os.fspath(path)} is no Fisher diagonal of version {VERSION}: save one with Fisher.save"
            )
        try:
            check_whole(tensors, metadata)
            for name, f in tensors.items():
                if f.dtype != torch.bfloat16 or not bool(((f >= 0) & f.isfinite()).all()):
                    raise ValueError(f"{name} is {f.dtype}, expected bfloat16 numbers from 0")
            return cls(tensors, metadata["fingerprint"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of names and values, by which a memory file knows the diagonal."""
        digest = hashlib.sha256()
        for name, f in sorted(self.diagonal.items()):
            digest.update(f"{name}{tuple(f.shape)}".encode())
            digest.update(f.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(f.numel() * f.element_size() for f in self.diagonal.values())


def _mean_squares(model: Any, targets: Sequence[Target], sequences: Sequence[Tensor]) -> Weights:
    """Mean of the squared gradients of the sequences' summed losses."""
    parameters = [target.weight for target in targets]
    wanted = [parameter.requires_grad for parameter in parameters]
    squares = {t.name: torch.zeros_like(t.weight, dtype=memory_dtype(t.weight)) for t in targets}
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        with progress("measuring the background", len(sequences), "text") as bar:
            for ids in sequences:
                with torch.enable_grad():
                    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    loss = F.cross_entropy(logits, ids[1:], reduction="sum")
                found = torch.autograd.grad(loss, parameters)
                for target, g in zip(targets, found, strict=True):
                    g = g.to(squares[target.name].dtype)
                    squares[target.name].addcmul_(g, g, value=1 / len(sequences))
                bar.advance()
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
    return squares


def _normalised(values: Weights) -> Weights:
    """Values divided by their mean over all weights, bfloat16."""
    total = sum(float(v.sum(dtype=torch.float64)) for v in values.values())
    mean = total / sum(v.numel() for v in values.values())
    if not 0 < mean < float("inf"):
        raise ValueError(
            f"the mean squared gradient of the background is {mean}, expected a number above 0: "
            "no weight would be told from another"
        )
    return {name: (v / mean).to(torch.bfloat16) for name, v in values.items()}
