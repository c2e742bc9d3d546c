"""The residual MLP block: a Transformer's feed-forward sub-layer, whose weights may differ per batch row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning._errors import unknown
from nested_learning.layers.effective import effective_matrix
from nested_learning.layers.token_inputs import RMSNorm
from nested_learning.memory.state import Weights

ACTIVATIONS = ("swiglu", "gelu", "relu2")


class MLPBlock(nn.Module):
    """y = x + f(x) with f(x) = down(σ(up(RMSNorm(x)))), without biases.

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
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation = activation
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
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
                `shapes()`), each of the parameter's own shape or with a leading batch dimension:
                then row b of the batch runs with weights b.
            hidden_scale: [intermediate_size] factors of the hidden units, None for ones.
            residual: add x to the result.

        Returns:
            y [..., D].

        Raises:
            ValueError: for a name the block does not have or a shape that does not fit.
        """
        w = weights or {}
        if w:
            self._check(w, len(x))
        h = self._normalise(x, w["norm.weight"]) if "norm.weight" in w else self.norm(x)
        hidden = _linear(self.up, h, w["up.weight"]) if "up.weight" in w else self.up(h)
        if self.gate is not None:
            hidden = F.silu(_linear(self.gate, h, w.get("gate.weight"))) * hidden
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            hidden = F.relu(hidden)
            hidden = hidden * hidden  # in one kernel call less than its square
        if hidden_scale is not None:
            hidden = hidden * hidden_scale
        y = _linear(self.down, hidden, w["down.weight"]) if "down.weight" in w else self.down(hidden)
        return x + y if residual else y

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight, by name; a wrapper of a linear layer counts as that layer."""
        width, hidden = self.hidden_size, self.intermediate_size
        gate = {} if self.gate is None else {"gate.weight": (hidden, width)}
        return {"norm.weight": (width,), "up.weight": (hidden, width), **gate, "down.weight": (width, hidden)}

    def matrices(self, like: Tensor) -> Weights:
        """The matrices [out, in] as they act: the weights that a level writes to, all but the norm's gain.

        Args:
            like: a tensor on the device of the block's inputs.
        """
        linears = {"up": self.up, "gate": self.gate, "down": self.down}
        return {
            f"{name}.weight": effective_matrix(linear, like)
            for name, linear in linears.items()
            if linear is not None
        }

    def _normalise(self, x: Tensor, gain: Tensor) -> Tensor:
        """The norm of x [B, ..., D] with another gain [D], or [B, D] of each row."""
        shape = self.norm.normalized_shape
        if gain.dim() == 1:
            return F.rms_norm(x, shape, gain, self.norm.eps)
        return F.rms_norm(x, shape, None, self.norm.eps) * gain.view(len(x), *[1] * (x.dim() - 2), -1)

    def _check(self, weights: Weights, batch_size: int) -> None:
        own = self.shapes()
        for name, weight in weights.items():
            if name not in own:
                raise unknown("weight of the MLP block:", name, own)
            shape = own[name]
            if tuple(weight.shape) not in (shape, (batch_size, *shape)):
                raise ValueError(
                    f"weight {name!r} has shape {tuple(weight.shape)}; expected {shape}, or "
                    f"{(batch_size, *shape)} with one set of weights per row of the batch"
                )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _linear(layer: nn.Linear, x: Tensor, weight: Tensor | None) -> Tensor:
    """The layer at x [B, ..., in] with another weight [out, in], or [B, out, in] of each row."""
    if weight is None:
        return layer(x)
    if weight.dim() == 2:
        return F.linear(x, weight)
    # Sizes written out: −1 is ambiguous in a batch of no rows.
    return (x.unsqueeze(1).flatten(1, -2) @ weight.mT).reshape(*x.shape[:-1], weight.shape[-2])
