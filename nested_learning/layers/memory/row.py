"""Rows of the table of memories: a name, the parts that are fixed, the options that may be chosen.

A row is a class statement whose body is its docstring; `MemoryRow` makes the signature, the arguments in the
docstring and the registration as a mixer from what the statement says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from nested_learning._errors import unknown
from nested_learning.layers.memory.layer import MemoryLayer
from nested_learning.layers.registry import register_mixer
from nested_learning.memory.compose import compose
from nested_learning.memory.engines.fla import Backend
from nested_learning.memory.system import MemorySystem, Read, RuleName

Norm = Literal["hidden", "output"]

# Options that are the layer's own; the others are parts of the system, keywords of `compose`.
_OF_LAYER = ("conv_size", "max_half_life", "backend")


def _required(name: str, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)


def _option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return _required(name, kind).replace(default=default)


# Every option of every row: its type, its default where the row names none, its meaning.
_OPTIONS: dict[str, tuple[inspect.Parameter, str]] = {
    parameter.name: (parameter, meaning)
    for parameter, meaning in (
        (_required("hidden_size", int), "D, the width of the input."),
        (_option("num_heads", int, 4), "H; head width d = D / H."),
        (
            _option("chunk_size", int, 64),
            "tokens between the boundaries at which the memory that is read out is re-anchored; where the "
            "gradient is taken at every token it changes the cost alone.",
        ),
        (
            _option("projection_chunk_size", int | None, None),
            "the same for the generating memories; None for `chunk_size`. One of the two must divide the "
            "other.",
        ),
        (_option("expansion", float, 1.0), "hidden width of a memory as a multiple of d."),
        (
            _option("depth", int, 2),
            "matrices of the memory, 1 to 4; 1 has no hidden layer and takes no expansion.",
        ),
        (
            _option("norm", Norm, "output"),
            '"output" is MIRAS\' x + LN(W1 gelu(W2 x)), "hidden" normalises the hidden vector instead.',
        ),
        (_option("p", float, 3.0), "exponent of the objective, at least 1."),
        (_option("q", float, 4.0), "exponent of the retention, at least 2."),
        (
            _option("rule", RuleName, "gd"),
            '"gd" gradient descent, "dgd" delta gradient descent (spec section 3, the stable form) or '
            '"dgd_literal" (as printed).',
        ),
        (
            _option("momentum", bool, False),
            "pass writes through a momentum with data-dependent decay μ.",
        ),
        (
            _option("read", Read, "token"),
            '"token" reads the weights after each token\'s write, "chunk" the anchor (eq 90).',
        ),
        (
            _option("adaptive_q", bool, False),
            "queries come from a memory too, instead of a static projection.",
        ),
        (
            _option("conv_size", int, 4),
            "width of the causal convolution in front of the memories, 0 for none.",
        ),
        (
            _option("momentum_scaled", bool, True),
            "a write enters the momentum scaled by 1 − μ; False is the printed form.",
        ),
        (
            _option("eta_max", float | None, None),
            "upper bound of the inner learning rate, at most 1, or 2 where the rule is the delta rule: "
            'DeltaNet, Gated DeltaNet, OjaNet, and rule="dgd" (docs/models.md); None for a bound at which a '
            "chunk cannot overshoot.",
        ),
        (
            _option("projection_eta_max", float | None, None),
            "the same for the generating memories, from 0 (they stand still) to `eta_max`; None for that. "
            "They forget more slowly in the same measure.",
        ),
        (
            _option("max_half_life", float | None, None),
            "spread the heads' half-lives at the start of training from 38 tokens to this; None for 38 "
            "tokens in all.",
        ),
        (
            _option("backend", Backend, "auto"),
            '"torch", "fla" (flash-linear-attention\'s kernels, on a GPU) or "auto", see `MemoryLayer`.',
        ),
    )
}


class MemoryRow(MemoryLayer):
    """Base of the rows. A row is declared by keywords of its class statement:

        class DeltaNet(MemoryRow, name="deltanet", options={…}, architecture="matrix", objective="l2", …):
            \"\"\"DeltaNet (eq 65): …\"\"\"

    Args of the class statement:
        name: of the mixer, in `HopeConfig(mixer=name)`.
        options: what may be chosen, in the order of the signature after hidden_size and num_heads: each
            option's default, `...` for that of the table above.
        The others: the parts that are fixed, keywords of `nested_learning.memory.compose`.
    """

    parts: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(
        cls, *, name: str | None = None, options: Mapping[str, Any] | None = None, **parts: Any
    ) -> None:
        super().__init_subclass__()
        if name is None:  # a subclass that is no row itself
            return
        cls.parts = parts
        chosen = {"hidden_size": ..., "num_heads": ..., **(options or {})}
        for option in chosen:
            if option not in _OPTIONS:
                raise unknown("option of a memory row:", option, _OPTIONS)
        cls.__init__ = _constructor(chosen)  # type: ignore[method-assign]
        arguments = "\n".join(f"    {option}: {_OPTIONS[option][1]}" for option in chosen)
        cls.__doc__ = (
            f"{inspect.cleandoc(cls.__doc__ or '')}\n\nArgs:\n{arguments}\n\n"
            "Raises:\n    ValueError: as in `MemoryLayer` and `compose`."
        )
        register_mixer(name)(cls)

    @classmethod
    def build_system(cls, **chosen: Any) -> MemorySystem:
        """The system of this row with the chosen parts; to override where an option is no part by itself."""
        return compose(**cls.parts, **chosen)


def _constructor(chosen: Mapping[str, Any]) -> Callable[..., None]:
    """`__init__` of a row with these options and defaults, and with their signature."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for option, default in chosen.items():
        parameter = _OPTIONS[option][0]
        parameters.append(parameter if default is ... else parameter.replace(default=default))
    signature = inspect.Signature(parameters)

    def __init__(self: MemoryRow, *args: Any, **options: Any) -> None:
        for option in options:
            if option not in chosen:
                raise TypeError(str(unknown(f"option of {type(self).__name__}:", option, chosen)))
        given = signature.bind(self, *args, **options)
        given.apply_defaults()
        parts = {option: value for option, value in given.arguments.items() if option != "self"}
        width, heads = parts.pop("hidden_size"), parts.pop("num_heads")
        own = {option: parts.pop(option) for option in _OF_LAYER if option in parts}
        MemoryLayer.__init__(self, width, heads, self.build_system(**parts), **own)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__
