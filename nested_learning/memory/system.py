"""A set of associative memories as data: architecture, objective, rule, retention, schedule.

A sequence layer is one `MemorySystem`. A new model is a new value of it, not a new loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nested_learning._errors import unknown
from nested_learning.memory.architecture import Architecture, ResidualMLP
from nested_learning.memory.objective import Dot, Objective
from nested_learning.memory.retention import Retention

Read = Literal["token", "chunk"]
Gradient = Literal["anchor", "token"]
Rate = Literal["gated", "one"]
RuleName = Literal["gd", "dgd", "dgd_literal"]

# Signals that a memory may generate (eq 86); the others are static projections.
GENERATORS = ("k", "v", "q", "eta", "alpha")
RULE_NAMES: tuple[RuleName, ...] = ("gd", "dgd", "dgd_literal")


@dataclass(frozen=True, kw_only=True)
class MatrixRule:
    """How one weight matrix of a memory learns.

    Attributes:
        objective: the inner loss whose gradient is written.
        erase: subtract the answer to the current input first: DGD (eq 57) rather than gradient descent.
        retain: value that the retention α pulls the weights towards, by the decay 1 − α per token.
        clip: largest norm of a token's gradient, None for no limit.
    """

    objective: Objective
    erase: bool
    retain: Literal["zero", "initial"]
    clip: float | None = None


LearningRule = Mapping[str, MatrixRule]  # per weight matrix


def learning_rule(
    architecture: Architecture, objective: Objective, rule: RuleName, retention: Retention | None = None
) -> LearningRule:
    """How each matrix of a memory learns (spec section 3, "The rule inside the MLP").

    Args:
        rule: "gd" gradient descent; "dgd" the delta rule on the output matrix, which erases what it answers
            and writes the target (eq 92, whose printed sign is a slip), and gradient descent on the others;
            "dgd_literal" as printed (eq 93), L2 objective, erase and zero retention on every matrix.

    Raises:
        ValueError: for a rule that does not exist, or that does not go with the objective.
    """
    if rule not in RULE_NAMES:
        raise unknown("rule", rule, RULE_NAMES)
    if rule != "gd" and not objective.goes_with_dgd:
        raise ValueError(
            f"rule={rule!r} with objective={objective.name!r}: DGD erases the answer to the key and writes "
            "the target, so its pull is that of an L2 objective already; use objective='l2' or 'dot', or "
            "rule='gd'"
        )
    if rule == "dgd_literal":
        literal = MatrixRule(objective=objective, erase=True, retain="zero")
        return dict.fromkeys(architecture.matrices, literal)
    # Why the hidden matrices are treated apart: erasing W2's answer to k erases the feature itself, and as W2
    # fades to zero the gradient of the hidden normalisation grows without bound (measured).
    hidden = MatrixRule(objective=objective, erase=False, retain="initial", clip=1.0)
    linear = retention is None or retention.form == "linear"
    normalised = architecture.normalises_output
    output = MatrixRule(
        objective=Dot() if rule == "dgd" else objective,
        erase=rule == "dgd",
        # Weights that fade are no memory under a map that divides by their size: W / ‖W‖^(q−2) and the
        # normalisation of W1 h grow, and their gradients with them, as W fades.
        retain="zero" if linear and not normalised else "initial",
        # Where neither the gradient nor the input of the output matrix is bounded.
        clip=1.0 if not linear or normalised or not objective.bounded else None,
    )
    return {name: output if name == architecture.output else hidden for name in architecture.matrices}


@dataclass(frozen=True, kw_only=True)
class MemorySystem:
    """The memories of one layer and their schedule.

    Attributes:
        architecture: the map that each memory is.
        rule: per weight matrix, how it learns; `learning_rule` makes it.
        retention: share α of the weights that a token leaves; they decay by 1 − α.
        gradient: where an inner step takes its gradient: at the "anchor", the weights of the last chunk
            boundary, or at every "token", exactly, which a matrix memory with a dot, L2 or Oja objective has
            in closed form.
        rate: the inner learning rate η_t: "gated" data-dependent in (0, eta_max), or "one".
        generated: the signals that memories of their own generate, a subset of `GENERATORS`; the other
            signals are static projections of the input.
        self_targets: every memory generates its own target v̂ = M(v) (eq 87); else the target is v.
        momentum: whether writes pass through a momentum with data-dependent decay μ_t.
        momentum_scaled: scale a write by 1 − μ_t as it enters the momentum.
        unit: the input paths, among "k", "v", "q", that are L2-normalised.
        chunk_size: tokens between the boundaries of the memory that is read out.
        projection_chunk_size: the same for the generating memories.
        read: "token" reads the weights after each token's write, "chunk" the anchor (eq 90 literally).
        eta_max: upper bound of the inner learning rate η_t. At most 1, or 2 where an erase of unit-norm
            inputs bounds the weights (`largest_eta_max`): I − η k kᵀ is no expansion then, and above 1 it has
            the negative eigenvalues that tracking a state takes (arXiv 2411.12537).
        projection_eta_max: the same for the generating memories, at most `eta_max`; None: as that. They learn
            and forget at this share of the pace, η and log α both times projection_eta_max / eta_max, so that
            they come to the same rest, but later; with 0 they stay as they are.
        objective, exact, memories, chunk_sizes, step, period, gates: derived from the others.
        capped: whether η_t is held to 1 + α_t, beyond which α I − η k kᵀ would be an expansion.
        pace: projection_eta_max / eta_max, None for 1.
        key: text under which `SYSTEMS` has the system, the same in every process.

    Raises:
        ValueError: for parts that make no sense together, with the reason.
    """

    architecture: Architecture = field(default_factory=ResidualMLP)
    rule: LearningRule = field(hash=False)
    retention: Retention = field(default_factory=Retention)
    gradient: Gradient = "anchor"
    rate: Rate = "gated"
    generated: tuple[str, ...] = ()
    self_targets: bool = False
    momentum: bool = False
    momentum_scaled: bool = True
    unit: tuple[str, ...] = ("k", "v", "q")
    chunk_size: int
    projection_chunk_size: int | None = None
    read: Read = "token"
    eta_max: float = 0.5
    projection_eta_max: float | None = None

    # What follows from the parts, worked out once: layers and engines ask for it at every call.
    objective: Objective = field(init=False, repr=False, compare=False)  # that of the output matrix
    exact: bool = field(init=False, repr=False, compare=False)  # no anchor enters the result
    memories: tuple[str, ...] = field(init=False, repr=False, compare=False)  # along the memory axis
    chunk_sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)  # in that order
    step: int = field(init=False, repr=False, compare=False)  # shortest chunk: tokens of one engine step
    period: int = field(init=False, repr=False, compare=False)  # tokens until all boundaries coincide again
    gates: tuple[str, ...] = field(init=False, repr=False, compare=False)  # scalar signals per head and token
    capped: bool = field(init=False, repr=False, compare=False)
    pace: float | None = field(init=False, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_rates()
        self._check_generated()
        self._check_retention()
        self._check_token_gradient()
        projection = self.chunk_size if self.projection_chunk_size is None else self.projection_chunk_size
        exact, slow = self.gradient == "token", self.projection_eta_max
        chunk_sizes = (projection,) * len(self.generated) + (self.chunk_size,)
        gates = {
            "eta": self.rate == "gated",
            "alpha": self.retention.decay == "gated",
            "mu": self.momentum,
            "width": any(rule.objective.has_width for rule in self.rule.values()),
        }
        derived: dict[str, Any] = {
            "projection_chunk_size": projection,
            "objective": self.rule[self.architecture.output].objective,
            "exact": exact,
            "memories": (*self.generated, "memory"),  # the memory that is read out is the last
            "chunk_sizes": chunk_sizes,
            "step": min(chunk_sizes),
            "period": 1 if exact else max(chunk_sizes),
            "gates": tuple(name for name, present in gates.items() if present),
            "capped": self.eta_max > 1 and any(rule.erase for rule in self.rule.values()),
            "pace": None if slow in (None, self.eta_max) else slow / self.eta_max,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._register()

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """A copy, or one from another process, is known under its text too."""
        self.__dict__.update(fields)
        self._register()

    def _register(self) -> None:
        key = text = repr(self)
        while SYSTEMS.setdefault(key, self) != self:  # parts of a user's own may look alike
            key += f"#{len(key) - len(text)}"
        object.__setattr__(self, "key", key)

    def _check_choices(self) -> None:
        sizes = {"chunk_size": self.chunk_size, "projection_chunk_size": self.projection_chunk_size}
        if self.projection_chunk_size is None:
            del sizes["projection_chunk_size"]
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        small, large = min(filter(None, sizes.values())), max(filter(None, sizes.values()))
        if large % small:
            raise ValueError(
                f"one chunk length must divide the other, got chunk_size={self.chunk_size} and "
                f"projection_chunk_size={self.projection_chunk_size}; {large // small * small} and {small} "
                "would do"
            )
        for name, choices in (
            ("read", ("token", "chunk")),
            ("gradient", ("anchor", "token")),
            ("rate", ("gated", "one")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("momentum", "momentum_scaled", "self_targets"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not set(self.unit) <= {"k", "v", "q"}:
            raise ValueError(f"unit must name paths among k, v and q, got {self.unit}")
        if set(self.rule) != set(self.architecture.matrices):
            raise ValueError(
                f"rule has matrices {sorted(self.rule)}, the {self.architecture.name} memory has "
                f"{sorted(self.architecture.matrices)}"
            )

    @property
    def largest_eta_max(self) -> float:
        """Largest bound of the rate at which what a token erases leaves no more than there was.

        2 for the delta rule with unit-norm inputs, by DGD or as a gradient of L2 or Oja at every token. Else
        1: without an erase, and where a gradient at the anchor erases too, writes from one anchor add up; of
        longer inputs more is erased than there is.
        """
        rule = self.rule[self.architecture.output]
        path = "v" if rule.objective.transposed else "k"
        unit = path in self.unit or path in self.generated  # what is generated is bounded to norm 1
        bounded = self.architecture.normalises_input or (unit and len(self.architecture.matrices) == 1)
        by_gradient = rule.objective.sees_answer
        erases = rule.erase != by_gradient if self.gradient == "token" else rule.erase and not by_gradient
        return 2.0 if erases and bounded else 1.0

    def _check_rates(self) -> None:
        most, projection = self.largest_eta_max, self.projection_eta_max
        if not 0 < self.eta_max <= most:
            why = (
                "beyond 2 the erase I − η k kᵀ of a unit-norm key is an expansion"
                if most == 2
                else "an erase rate above 1 overshoots here; up to 2 goes with an erase of unit-norm inputs, "
                "which rule='dgd' has, and the delta rule (an L2 or Oja objective with gradient='token')"
            )
            raise ValueError(f"eta_max must lie in (0, {most:g}], got {self.eta_max!r}: {why}")
        if projection is not None and not 0 <= projection <= self.eta_max:
            raise ValueError(
                f"projection_eta_max must lie in [0, eta_max] = [0, {self.eta_max:g}], got {projection!r}: "
                "the memories that generate signals may learn more slowly than the one that is read out, or "
                "not at all (0), but not faster"
            )
        if projection is not None and (not self.generated or self.rate == "one"):
            raise ValueError(
                f"projection_eta_max={projection} bounds a gated rate of memories that generate signals, but "
                f"generated is {self.generated} and rate {self.rate!r}; leave it out"
            )

    def _check_generated(self) -> None:
        given = set(self.generated)
        if len(given) != len(self.generated) or not given <= set(GENERATORS):
            raise ValueError(f"generated must be distinct names among {GENERATORS}, got {self.generated}")
        if len(given & {"eta", "alpha"}) == 1:
            raise ValueError(f"eta and alpha are generated both or neither, got {self.generated}")
        if "eta" in given and (self.rate != "gated" or self.retention.decay != "gated"):
            raise ValueError(
                "eta and alpha are generated by memories, so the rate and the decay must be 'gated', got "
                f"rate={self.rate!r} and decay={self.retention.decay!r}"
            )

    def _check_retention(self) -> None:
        form = self.retention.form
        if form == "linear":
            return
        if any(rule.erase for rule in self.rule.values()):
            raise ValueError(
                f"retention {form!r} with an erase: the erase subtracts what the weights answer, but it is "
                "another quantity that accumulates; use rule='gd'"
            )
        if form == "kl" and self.read == "token":
            raise ValueError(
                "retention 'kl' cannot be read at every token: each read would need the softmax of a weight "
                "matrix of its own; use read='chunk'"
            )

    def _check_token_gradient(self) -> None:
        objective = self.rule[self.architecture.output].objective
        if self.gradient == "anchor":
            if objective.transposed:
                raise ValueError(
                    "Oja's objective came with gradient='anchor', but it is here with gradient='token' only, "
                    "where it has its exact form"
                )
            return
        if not self.architecture.linear or not objective.has_token_form:
            raise ValueError(
                "gradient='token' needs a matrix memory with a dot, L2 or Oja objective, whose gradients at "
                f"every token have a closed form, got {self.architecture.name!r} with {objective.name!r}; "
                "use gradient='anchor'"
            )
        if objective.sees_answer and any(rule.erase for rule in self.rule.values()):
            raise ValueError(
                f"DGD with {objective.name!r} gradients at every token would erase twice; use rule='gd', "
                "which is the delta rule here"
            )
        if objective.sees_answer and self.momentum:
            raise ValueError(
                f"momentum of {objective.name!r} gradients at every token has no chunk-parallel form: each "
                "gradient depends on all earlier momenta; use gradient='anchor', or momentum=False"
            )
        wrong = {
            "generated": bool(self.generated) and self.generated,
            "self_targets": self.self_targets,
            "read": self.read == "chunk" and self.read,
            "form": self.retention.form != "linear" and self.retention.form,
        }
        got = ", ".join(f"{name}={value!r}" for name, value in wrong.items() if value)
        if got:
            raise ValueError(
                "gradient='token' goes with static projections, read='token' and linear retention, as it has "
                f"no anchor that could generate signals or be read; got {got}; use gradient='anchor'"
            )


# Every system that was made, by its text: a compiled graph, which holds no objects, says so which it means.
SYSTEMS: dict[str, MemorySystem] = {}
