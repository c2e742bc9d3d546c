"""The residual MLP block: a Transformer's feed-forward sub-layer, whose weights may differ per batch row."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn, vmap
from torch.func import functional_call

from nested_learning.layers.registry import unknown

ACTIVATIONS = ("swiglu", "gelu", "relu2")

Weights = Mapping[str, Tensor]


class MLPBlock(nn.Module):
    """y = x + down(σ(up(RMSNorm(x)))), without biases.

    Activations: `relu2` is σ(h) = max(h, 0)², `gelu` the exact GELU, `swiglu` is SiLU(gate(x)) · up(x) with a
    third matrix of the same size.

    Args:
        hidden_size: width D of the input and output.
        intermediate_size: width of the hidden layer.
        activation: one of `ACTIVATIONS`.
        norm_eps: epsilon of the RMS norm.

    Raises:
        ValueError: for an unknown activation or a width below 1.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "relu2", norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if intermediate_size < 1:
            raise ValueError(f"intermediate_size must be at least 1, got {intermediate_size}")
        self.intermediate_size, self.activation = intermediate_size, activation
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False) if activation == "swiglu" else None
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        weights: Weights | None = None,
        hidden_scale: Tensor | None = None,
        residual: bool = True,
    ) -> Tensor:
        """Apply the block to x [..., D].

        Args:
            x: [..., D]; [B, ..., D] where a weight has a batch dimension.
            weights: tensors that take the place of the block's parameters of the same names (some or all of
                `named_parameters()`), each of the parameter's own shape or with a leading batch dimension:
                then row b of the batch runs with weights b.
            hidden_scale: [intermediate_size] factors of the hidden units, None for ones.
            residual: add x to the result.

        Raises:
            ValueError: for a name the block does not have or a shape that does not fit.
        """
        if weights:
            return self._forward_with(weights, x, hidden_scale, residual)
        h = self.norm(x)
        if self.gate is not None:
            h = F.silu(self.gate(h)) * self.up(h)
        else:
            h = self.up(h)
            h = F.gelu(h) if self.activation == "gelu" else F.relu(h).square()
        h = self.down(h if hidden_scale is None else h * hidden_scale)
        return x + h if residual else h

    def _forward_with(
        self, weights: Weights, x: Tensor, hidden_scale: Tensor | None, residual: bool
    ) -> Tensor:
        options = (None, hidden_scale, residual)
        dims = {name: self._batch_dim(name, weight, len(x)) for name, weight in weights.items()}
        if all(dim is None for dim in dims.values()):
            return functional_call(self, dict(weights), (x, *options))

        def row(row_weights: dict[str, Tensor], row_x: Tensor) -> Tensor:
            return functional_call(self, row_weights, (row_x, *options))

        return vmap(row, in_dims=(dims, 0))(dict(weights), x)

    def _batch_dim(self, name: str, weight: Tensor, batch_size: int) -> int | None:
        """0 where `weight` has a leading batch dimension, None where it is one for all rows."""
        own = dict(self.named_parameters())
        if name not in own:
            raise unknown("weight of the MLP block:", name, own)
        shape = tuple(own[name].shape)
        if tuple(weight.shape) == shape:
            return None
        if tuple(weight.shape) == (batch_size, *shape):
            return 0
        raise ValueError(
            f"weight {name!r} has shape {tuple(weight.shape)}; expected {shape}, or {(batch_size, *shape)} "
            "with one set of weights per row of the batch"
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
