"""Layers that take the place of a network's own and go on learning while it runs."""

from nested_learning.layers.drop_in.low_rank_mlp import LowRankMLPState, LowRankSelfModifyingMLP
from nested_learning.layers.drop_in.replace import CarriedStates, DropInLinear, carry_states, replace_linears
from nested_learning.layers.drop_in.self_modifying_linear import SelfModifyingLinear, SelfModifyingLinearState

__all__ = [
    "CarriedStates",
    "DropInLinear",
    "LowRankMLPState",
    "LowRankSelfModifyingMLP",
    "SelfModifyingLinear",
    "SelfModifyingLinearState",
    "carry_states",
    "replace_linears",
]
