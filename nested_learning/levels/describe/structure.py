"""Descriptions of modules that nobody registered, from their structure, and of torch's own layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from nested_learning.levels.components import INFINITE, every_steps, every_tokens
from nested_learning.levels.describe.registry import Described, DescribedMemory, DescribedWeights, describes

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

ATTENTION_OBJECTIVE = "Σ s(k, q) ½‖v − M‖², s = exp⟨k, q⟩ (Nadaraya-Watson)"
ATTENTION_RULE = "closed form: nothing is trained, keys and values are kept"

# Names, in lower case, that attention layers give to their projections to keys and to values, or to several
# at once.
_KEYS = {"k_proj": "v_proj", "key": "value", "k": "v", "k_lin": "v_lin", "key_proj": "value_proj"}
_KEYS |= {"to_k": "to_v", "linear_k": "linear_v", "project_k": "project_v", "wk": "wv", "k_head": "v_head"}
_FUSED = {"qkv", "qkv_proj", "query_key_value", "wqkv", "c_attn", "to_qkv", "kv_proj", "to_kv", "kv_b_proj"}
_FUSED |= {"att_proj"}
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
# Parts of linear attention, state-space and recurrent layers that also call themselves attention. Softmax
# attention may have a `dt_proj`, which makes its mask, and a `k_sconv`, a short convolution of its keys.
_RECURRENT = re.compile(r"decay|slope|a_log|dt_bias|receptance|(?<!s)conv|^b_proj$|^beta", re.IGNORECASE)
# Name of the number that bounds keys and values, by the type that the configuration gives a layer.
_BOUNDS = {"sliding_attention": "sliding_window", "hybrid_sliding": "sliding_window"}
_BOUNDS |= {"chunked_attention": "attention_chunk_size"}


def softmax_attention(
    module: nn.Module, bytes_per_token: int | None, window: int | None = None, chunked: bool = False
) -> Iterator[Described]:
    """The description of softmax attention: a non-parametric memory of all tokens in context (eq 62-63).

    Args:
        module: the module whose parameters are the projections around it.
        bytes_per_token: bytes of the keys and values kept for each token; None where that is not known.
        window: number of tokens that each one sees; None for all.
        chunked: whether they are those of its chunk of so many, not the last ones before it.
    """
    name, context, state_bytes = "softmax attention", "all tokens, as keys and values", bytes_per_token
    if window is not None:
        seen = f"the tokens of its chunk of {window}" if chunked else f"the last {window} tokens"
        name, context = f"{name} (window {window})", f"{seen}, as keys and values"
        state_bytes = None if bytes_per_token is None else max(window - 1, 1) * bytes_per_token
    yield DescribedMemory(
        name=name,
        frequency=INFINITE,
        state_bytes=state_bytes,
        state_per="token" if window is None else "sequence",
        context=context,
        objective=ATTENTION_OBJECTIVE,
        rule=ATTENTION_RULE,
    )
    yield DescribedWeights("attention projections", module.parameters(), generates=(name,))


def find_attention(module: nn.Module) -> Iterator[Described] | None:
    """The description of a module that looks like softmax attention; None for any other.

    It calls itself attention, has projections to keys and values among its direct children, and no part
    that linear attention and recurrent layers have.
    """
    children = dict(module.named_children())
    parts = [*children, *dict(module.named_parameters(recurse=False))]
    parts += dict(module.named_buffers(recurse=False))
    if not _ATTENTION_CLASS.search(type(module).__name__) or any(_RECURRENT.search(part) for part in parts):
        return None
    named = {name.lower(): child for name, child in children.items()}
    for key, value in _KEYS.items():
        if key in named and value in named:
            return softmax_attention(module, _bytes_per_token(named[key], named[value]), *_window(module))
    if _FUSED & named.keys():
        return softmax_attention(module, _bytes_from_config(module), *_window(module))
    return None


def _window(module: nn.Module) -> tuple[int | None, bool]:
    """Number of tokens that each one sees, or None, and whether they are those of its chunk.

    The layer's type in the model's configuration decides; without one, which of the two numbers there is, as
    in transformers' caches. The number is the layer's own or else the configuration's.
    """
    config = _config(module)
    found = {name: getattr(module, name, getattr(config, name, None)) for name in _BOUNDS.values()}
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if isinstance(types, (list, tuple)) and isinstance(index, int) and index < len(types):
        name = _BOUNDS.get(types[index])
    else:
        name = next((name for name, number in found.items() if isinstance(number, int)), None)
    number = None if name is None else found[name]
    return (number if isinstance(number, int) else None), name == _BOUNDS["chunked_attention"]


def _config(module: nn.Module) -> Any:
    """The configuration of a module's layer where layers have their own, else the model's; None without."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is None or not getattr(config, "is_heterogeneous", False):
        return config
    # the model's refuses to tell what may differ between layers
    layers = config.per_layer_config
    return layers[index] if isinstance(index, int) and index < len(layers) else None


def _bytes_per_token(key: nn.Module, value: nn.Module) -> int | None:
    """Bytes of a key and a value by the widths of their projections, None where these are no linear maps."""
    if not isinstance(key, LINEAR) or not isinstance(value, LINEAR):
        return None
    width = sum(part.nf if isinstance(part, Conv1D) else part.out_features for part in (key, value))
    return width * key.weight.dtype.itemsize


def _bytes_from_config(module: nn.Module) -> int | None:
    """Bytes per token behind fused projections: two vectors, if the configuration tells the heads' widths."""
    config = _config(module)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or hasattr(config, "kv_lora_rank"):
        return None
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is None and (hasattr(config, "multi_query") or hasattr(config, "num_kv_heads")):
        return None  # these models say how many key and value heads there are in ways of their own
    return 2 * (kv_heads or heads) * head_dim * next(module.parameters()).dtype.itemsize


@describes(nn.MultiheadAttention)
def _multihead_attention(module: nn.MultiheadAttention) -> Iterator[Described]:
    # Keys and values are made anew at every call: 2 · embed_dim numbers for each of the call's tokens.
    yield from softmax_attention(module, 2 * module.embed_dim * module.out_proj.weight.dtype.itemsize)


@describes(nn.RNNBase)
def _recurrence(module: nn.RNNBase) -> Iterator[Described]:
    directions = 2 if module.bidirectional else 1
    width = module.proj_size or module.hidden_size
    width += module.hidden_size if module.mode == "LSTM" else 0  # its cells
    yield DescribedMemory(
        name="recurrent state",
        frequency=every_tokens(),
        state_bytes=module.num_layers * directions * width * next(module.parameters()).dtype.itemsize,
        context="tokens",
        objective="none of its own: the map is trained by the levels below",
        rule=f"{module.mode}: h_t = f(x_t, h_t−1)",
    )
    yield DescribedWeights("recurrence", module.parameters(), generates=("recurrent state",))


@describes(nn.modules.batchnorm._NormBase)
def _running_statistics(module: nn.modules.batchnorm._NormBase) -> Iterator[Described]:
    """Batch and instance norm with running statistics; without them the module is plain weights."""
    if module.running_mean is not None:
        yield DescribedMemory(
            name="running statistics",
            frequency=every_steps(),
            state_bytes=sum(buffer.nbytes for buffer in module.buffers()),
            state_per="model",
            context="activations of training batches",
            objective="½‖mean − x‖², and the same for the variance",
            rule="exponential average at every forward pass in training",
            output="mean and variance, in evaluation",
        )
    yield DescribedWeights("norms", module.parameters())


def name_of_weights(module: nn.Module, parent: nn.Module | None, is_head: bool, shared: bool) -> str:
    """Name of the weights that a module itself holds, by its class and surroundings.

    Args:
        module: the module that holds them.
        parent: the module around it, None for the whole model.
        is_head: whether transformers calls it the output embeddings.
        shared: whether a module that is no embedding has these parameters too.
    """
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding (also the head)" if shared else "embedding"
    if is_head:
        return "head"
    if "Norm" in kind and not any(True for _ in module.children()):
        return "norms"
    if isinstance(module, CONVOLUTIONS):
        return "convolutions"
    if isinstance(module, LINEAR):
        return "MLPs" if parent is not None and _is_mlp(parent) else "linear layers"
    return f"parameters of {kind}"


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module that runs its children holds two or more linear maps and no other parameters."""
    own = any(True for _ in module.parameters(recurse=False))
    if own or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    trained = [child for child in module.children() if any(True for _ in child.parameters())]
    return len(trained) > 1 and all(isinstance(child, LINEAR) for child in trained)
