"""Pure tensor functions: no modules, no parameters, leading dimensions free."""

from nested_learning.ops import delta_rule, mlp_memory, newton_schulz
from nested_learning.ops.heads import causal_conv
from nested_learning.ops.norm import unit
from nested_learning.ops.packing import RowLayout, row_layout

__all__ = ["RowLayout", "causal_conv", "delta_rule", "mlp_memory", "newton_schulz", "row_layout", "unit"]
