"""The block of Hope (arXiv 2512.24695, §8.3), mixer and continuum memory system, and how blocks are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nested_learning.layers.memory import set_compile_step, set_recompute
from nested_learning.layers.registry import build_mixer
from nested_learning.layers.token_inputs import RMSNorm
from nested_learning.memory import check
from nested_learning.memory.state import State, Weights
from nested_learning.models.hope.compiled_hope import CompiledBlocks
from nested_learning.models.hope.configuration_hope import HopeConfig
from nested_learning.ops.documents import Documents

# Weights for the CMS blocks of some layers during one call: layer index to one entry per level.
CMSWeights = Mapping[int, Sequence[Weights | None]]
# States by name, such as "layers.0.mixer" and "layers.0.cms".
States = dict[str, State]


class HopeBlock(GradientCheckpointingLayer):
    """x ← x + mixer(RMSNorm(x)), then x ← CMS(x), whose blocks bring their own norms and residuals.

    A CMS without levels leaves x as it is.
    """

    def __init__(self, config: HopeConfig, layer_index: int) -> None:
        super().__init__()
        self.mixer_name = name = config.layer_mixers[layer_index]
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(name, config.hidden_size, config.num_heads, config.options_of(name))
        set_recompute(self.mixer, config.recompute)
        set_compile_step(self.mixer, config.compile_step)
        self.cms = config.build_cms()

    def part_names(self) -> dict[str, str]:
        """Handles of the parts besides those that mixer and CMS name; see `nested_learning.parts`."""
        return {"mixer": f"{self.mixer_name}:"}

    def forward(
        self,
        x: Tensor,
        states: tuple[State | None, State | None] = (None, None),
        real: Tensor | None = None,
        learn: Tensor | None = None,
        cms_weights: Sequence[Weights | None] | None = None,
        documents: Documents | None = None,
        within: Callable[[Tensor], Any] | None = None,
        **mixer_options: Any,
    ) -> Any:
        """Run the block over x [B, T, D].

        Args:
            x: [B, T, D].
            states: states of the mixer and of the CMS before x.
            real: [B, T] bool, False = padding.
            learn: [B, T] bool, the tokens that the CMS learns from; None: all.
            cms_weights: per level, weights in the place of the CMS block's own.
            documents: where documents in a row begin; None: every row is one.
            within: called with x in the place of all this, its result returned: for what reads the block's
                weights where a wrapper of its forward pass, such as FSDP, makes them whole.
            mixer_options: what else the mixer takes, such as `return_surprise`.

        Returns:
            y [B, T, D], both states after x, and what else the mixer returns, such as its surprise [B, T].
        """
        if within is not None:
            return within(x)
        mixer_state, cms_state = states
        if documents is not None:  # a mixer from elsewhere need not know the option
            mixer_options["documents"] = documents
        mixed, mixer_state, *surprise = self.mixer(self.mixer_norm(x), mixer_state, real, **mixer_options)
        y, cms_state = self.cms(x + mixed, cms_state, cms_weights, real, learn, documents)
        return y, (mixer_state, cms_state), *surprise


class Tokens(NamedTuple):
    """Everything about the columns of a call that has an entry per token."""

    x: Tensor  # [B, T, D] embeddings
    ids: Tensor | None  # [B, T] int64
    real: Tensor | None  # [B, T] bool, False = padding; None: all are real
    learn: Tensor | None  # [B, T] bool, the tokens that a CMS learns from; None: all
    documents: Documents | None = None  # where documents in a row begin; None: every row is one

    def columns(self, start: int, stop: int) -> Tokens:
        """The tokens of the columns from `start` to `stop`."""
        documents = self.documents
        if documents is not None and (start or stop < self.x.shape[1]):
            documents = documents.segment(start, stop, documents.keep or stop < self.x.shape[1])
        ids, real, learn = (
            None if t is None else t[:, start:stop] for t in (self.ids, self.real, self.learn)
        )
        return Tokens(self.x[:, start:stop], ids, real, learn, documents)


class Piece(NamedTuple):
    """Results of one segment [B, S, ...]."""

    y: Tensor  # normalised output
    hidden: tuple[Tensor, ...]  # the input of each block and y; empty where they are not asked for
    surprise: tuple[Tensor | None, ...]  # [B, S] per block


def join(pieces: list[Piece]) -> Piece:
    """Concatenate the results of successive segments."""
    if len(pieces) == 1:
        return pieces[0]
    outputs, hidden, surprise = zip(*pieces, strict=True)
    return Piece(
        torch.cat(outputs, 1),
        tuple(torch.cat(parts, 1) for parts in zip(*hidden, strict=True)),
        tuple(None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*surprise, strict=True)),
    )


@dataclass(frozen=True)
class Blocks:
    """All blocks and the final norm, as one call runs them over one segment after another.

    Args:
        blocks: the `HopeBlock`s.
        norm: the final norm.
        keep_hidden: return the input of each block.
        want_surprise: return the memories' errors.
        cms_weights: by layer index, weights in the place of the CMS blocks' own.
        hooks: call the modules with their hooks.
        compiled: what runs the blocks in the place of themselves.
    """

    blocks: Sequence[HopeBlock]
    norm: nn.Module
    keep_hidden: bool = False
    want_surprise: bool = False
    cms_weights: CMSWeights = field(default_factory=dict)
    hooks: bool = True
    compiled: CompiledBlocks | None = None

    def read(self, tokens: Tokens, states: States) -> tuple[Piece, States]:
        """The results of one segment and the states after it."""
        x, after = tokens.x, {}
        hidden, surprise = [], []
        for index, block in enumerate(self.blocks):
            if self.keep_hidden:
                hidden.append(x)
            mixer, cms = f"layers.{index}.mixer", f"layers.{index}.cms"
            before = states.get(mixer), states.get(cms)
            # A mixer that does not say that it has a surprise need not know the option.
            surprised = self.want_surprise and getattr(block.mixer, "has_surprise", False)
            options: dict[str, Any] = {"return_surprise": True} if surprised else {}
            weights = self.cms_weights.get(index)
            with check.scope(f"model.{mixer}"):  # the CMS checks no values
                inputs = before, tokens.real, tokens.learn, weights, tokens.documents
                if self.compiled is not None and self.hooks:
                    x, new, *error = self.compiled.run(block, x, *inputs, options)
                else:
                    run = block if self.hooks else block.forward
                    x, new, *error = run(x, *inputs, **options)
            after[mixer], after[cms] = new
            surprise.append(error[0] if error else None)
        x = self.norm(x) if self.hooks else self.norm.forward(x)
        if self.keep_hidden:
            hidden.append(x)
        after = {name: state for name, state in after.items() if state is not None}
        return Piece(x, tuple(hidden), tuple(surprise)), after
