"""The initial memories of a layer, as a module of their own."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView

from torch import Tensor, nn

from nested_learning.memory.state import Weights


class InitialMemories(nn.Module):
    """The initial memories by matrix, [N, H, out, in] each, read as a dict.

    Not nn.ParameterDict, which peft refuses to train beside adapters (`modules_to_save=["initial"]`): LoRA
    itself takes matrices and stacks of them, and initial memories have an axis more.

    Args:
        initial: the parameters, by name.
    """

    def __init__(self, initial: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = tuple(initial)
        for name, parameter in initial.items():
            self.register_parameter(name, parameter)

    def forward(self) -> Weights:
        """All of them."""
        return {name: getattr(self, name) for name in self.names}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = getattr(self, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def keys(self) -> KeysView[str]:
        return self.forward().keys()

    def values(self) -> ValuesView[Tensor]:
        return self.forward().values()

    def items(self) -> ItemsView[str, Tensor]:
        return self.forward().items()
