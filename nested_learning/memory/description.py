"""What a set of associative memories is, as data: architecture, objective, rule, retention, schedule.

A sequence layer is one `MemorySystem`. A new model is a new value of it, not a new scan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nested_learning.memory.architecture import ResidualMLP

Read = Literal["token", "chunk"]

# Signals that a memory may generate (spec section 3); what is not generated is a static projection.
GENERATORS = ("k", "v", "q", "eta", "alpha")


@dataclass(frozen=True, kw_only=True)
class MatrixRule:
    """How one weight matrix of a memory learns.

    Attributes:
        objective: the inner loss whose gradient is written. "dot": −⟨M(k), v̂⟩ on the residual target,
            with `erase` the exact delta rule; "l2": ½‖M(k) − v̂‖².
        erase: subtract the answer to the current input first: DGD (eq 57) rather than gradient descent.
        retain: what the retention α pulls the weights towards.
        clip: largest norm of a token's gradient, None for no limit.
    """

    objective: Literal["dot", "l2"]
    erase: bool
    retain: Literal["zero", "initial"]
    clip: float | None = None


# W1 is the output matrix, W2 the input matrix of the residual MLP. Why the default treats them apart:
# erasing W2's answer to k erases the feature itself, and as W2 fades to zero the gradient of the hidden
# normalisation grows without bound (spec section 3, measured).
_W2_STABLE = MatrixRule(objective="l2", erase=False, retain="initial", clip=1.0)
# As printed, eq 88: L2 objective, erase and zero retention on both matrices.
_LITERAL = MatrixRule(objective="l2", erase=True, retain="zero")
Rule = Mapping[str, MatrixRule]  # per weight matrix
RULES: dict[str, Rule] = {
    "dgd": {"W1": MatrixRule(objective="dot", erase=True, retain="zero"), "W2": _W2_STABLE},
    "dgd_literal": {"W1": _LITERAL, "W2": _LITERAL},
    "gd": {"W1": MatrixRule(objective="l2", erase=False, retain="zero"), "W2": _W2_STABLE},
}


@dataclass(frozen=True, kw_only=True)
class MemorySystem:
    """The memories of one layer and their schedule.

    Attributes:
        architecture: the map that each memory is.
        rule: per weight matrix, how it learns.
        generated: the signals that memories of their own generate, a subset of `GENERATORS`; the other
            signals are static projections of the input.
        self_targets: every memory generates its own target v̂ = M(v) (eq 87); else the target is v.
        momentum: whether writes pass through a momentum with data-dependent decay μ_t.
        momentum_scaled: scale a write by 1 − μ_t as it enters the momentum.
        chunk_size: tokens between the boundaries of the memory that is read out.
        projection_chunk_size: the same for the generating memories.
        read: "token" reads the weights after each token's write, "chunk" the anchor (eq 90 literally).
        eta_max: upper bound of the inner learning rate η_t.
    """

    architecture: ResidualMLP = field(default_factory=ResidualMLP)
    rule: Rule
    generated: tuple[str, ...]
    self_targets: bool
    momentum: bool
    momentum_scaled: bool
    chunk_size: int
    projection_chunk_size: int
    read: Read
    eta_max: float

    def __post_init__(self) -> None:
        for name in ("chunk_size", "projection_chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        small, large = sorted((self.chunk_size, self.projection_chunk_size))
        if large % small:
            raise ValueError(
                f"one chunk length must divide the other, got chunk_size={self.chunk_size} and "
                f"projection_chunk_size={self.projection_chunk_size}; {large // small * small} and {small} "
                "would do"
            )
        if self.read not in ("token", "chunk"):
            raise ValueError(f"read must be 'token' or 'chunk', got {self.read!r}")
        if not 0 < self.eta_max <= 1:
            raise ValueError(
                f"eta_max must lie in (0, 1], got {self.eta_max!r}: an erase rate above 1 overshoots"
            )
        for name in ("momentum", "momentum_scaled", "self_targets"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_generated()

    def _check_generated(self) -> None:
        given = set(self.generated)
        if len(given) != len(self.generated) or not given <= set(GENERATORS):
            raise ValueError(f"generated must be distinct names among {GENERATORS}, got {self.generated}")
        if len(given & {"eta", "alpha"}) == 1:
            raise ValueError(f"eta and alpha are generated both or neither, got {self.generated}")

    @property
    def memories(self) -> tuple[str, ...]:
        """Names along the memory axis of the stacked weights; the memory that is read out is the last."""
        return (*self.generated, "memory")

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk length of each memory, in the order of `memories`."""
        return (self.projection_chunk_size,) * len(self.generated) + (self.chunk_size,)

    @property
    def step(self) -> int:
        """Tokens that one step of the scan takes: the shortest chunk among the memories."""
        return min(self.chunk_sizes)

    @property
    def period(self) -> int:
        """Tokens after which all boundaries fall together again."""
        return max(self.chunk_sizes)

    @property
    def gates(self) -> tuple[str, ...]:
        """The scalar signals per head and token: learning rate, retention and momentum decay."""
        return ("eta", "alpha", "mu") if self.momentum else ("eta", "alpha")
