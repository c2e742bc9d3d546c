"""Deep momentum gradient descent, eq 50: the momentum is a network that learns while it optimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nested_learning.optimizers import row_memory
from nested_learning.optimizers.arithmetic import (
    Group,
    as_matrix,
    learning_rate,
    matrix_shape,
    root_mean_square,
    work_dtype,
)
from nested_learning.optimizers.base import BaseOptimizer, Params
from nested_learning.optimizers.checks import FLAG, FRACTION, NON_NEGATIVE, Bound, Check, Choice
from nested_learning.optimizers.sharded import is_sharded

OPTIONAL_COUNT = Bound(low=1, integer=True, optional=True)


class DeepMomentumGD(BaseOptimizer):
    """DMGD, eq 50: W ← W − lr · m(u), u = g, with m a small network trained at every step.

    m acts on the rows of g as a matrix (out, in), in units of its root mean square s:
        m(u) = s · (û + f_θ(û)), û = u/s,
    with f_θ a network without biases (`depth` linear layers, SiLU between) whose last layer starts at zero.
    So m(u) = u at first: training starts as plain gradient descent, and the units of the loss do not matter
    (ours; the paper leaves the architecture open). At every step, before it is used,
        θ ← θ₀ + α(θ − θ₀) − memory_lr · ∇_θ L⁽²⁾(θ; û),
    where α is `momentum`, the retention (ours: towards the initial θ₀, not zero), and the internal objective
    L⁽²⁾ compares m̂ = m(u)/s with the value P/s, P = g unless `value` says otherwise:
    - "dot": −⟨m̂, P/s⟩, a mean over elements: the Hebbian memory that ordinary momentum is;
    - "l2": ½(m̂ − P/s)², a mean over elements. With P = g a new memory is exact already and stays as it is,
      so this is gradient descent until `value` or `meta_step` gives it something to learn;
    - "surrogate": (1 − cos(m̂, P/s)) + (‖m̂‖/‖P/s‖ − 1)², a mean over rows, and 1 − the cosine between this
      step's mean row of m̂ and the last step's.
    Stable for "dot" while memory_lr is well below 2(1 − α).

    Learning to optimise: `step(create_graph=True)` keeps the graph of the parameters as functions of θ;
    `updated_parameters(model)` returns them, for torch.func.functional_call, and `meta_step(loss)` moves θ
    and θ₀ by −meta_lr · ∇ loss through that step.

    Parameters that are not matrices: (n,) is one row (1, n); (out, a, b, …) is flattened to (out, a·b…).
    State: θ and θ₀, with the first parameter that uses them, and with each a count of its gradients. With
    shared memory there is one pair for all of a group's matrices of one shape; with the default sizes it is
    at most half of one such matrix (out ≥ 8), in float32.

    Args:
        params: parameters or groups.
        lr: learning rate.
        memory_lr: learning rate of the internal objective.
        momentum: α.
        objective: "dot", "l2" or "surrogate".
        value: P as a function of a gradient matrix (out, in), for all groups; g itself by default.
        depth: linear layers of f, at least 2.
        hidden_size: width of f; min(64, out/8), at least 1, by default.
        rank: each of f's layers as a product of two of this rank, where that is smaller; full by default.
        shared_memory: one memory per matrix shape in a group. False: one per parameter.
        recompute: keep no activations of f for its gradient but compute them again: slower, less memory.
        meta_lr: learning rate of `meta_step`.
        seed: seed of θ₀, the same in all processes, so that replicas of a model stay equal.
        weight_decay: decoupled, times lr.
        maximize: ascend instead of descend.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    options: ClassVar[dict[str, Check]] = {
        **BaseOptimizer.options,
        "memory_lr": NON_NEGATIVE,
        "momentum": FRACTION,
        "objective": Choice(tuple(row_memory.OBJECTIVES)),
        "depth": Bound(low=2, integer=True),
        "hidden_size": OPTIONAL_COUNT,
        "rank": OPTIONAL_COUNT,
        "shared_memory": FLAG,
        "recompute": FLAG,
        "meta_lr": NON_NEGATIVE,
        "seed": Bound(integer=True),
    }
    one_memory = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        memory_lr: float = 0.02,
        momentum: float = 0.9,
        objective: str = "dot",
        value: Callable[[Tensor], Tensor] | None = None,
        depth: int = 2,
        hidden_size: int | None = None,
        rank: int | None = None,
        shared_memory: bool = True,
        recompute: bool = False,
        meta_lr: float = 1e-2,
        seed: int = 0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        if value is not None and not callable(value):
            raise ValueError(
                f"value must be a function of a gradient matrix (out, in), or None; got {value!r}"
            )
        self.value = value
        self._create_graph = False
        self._internal_losses: dict[int, list[Tensor]] = {}
        self._leaves: list[tuple[Group, dict[str, Any], list[Tensor]]] | None = None
        self._updated: dict[Tensor, Tensor] = {}
        super().__init__(params, locals())

    # -- the step

    def step(self, closure: Callable[[], Any] | None = None, create_graph: bool = False) -> Any:
        """One update of the memories and the parameters.

        Args:
            closure: computes the loss and its gradients, as for any optimizer.
            create_graph: keep the graph from the memories to the new parameters for `meta_step`.

        Raises:
            ValueError: for a graph of parameters that lie in shards (fully_shard).
        """
        if create_graph and any(is_sharded(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "step(create_graph=True) needs whole parameters, got some that lie in shards (fully_shard): "
                "learn to optimise on a model that is not sharded"
            )
        self._create_graph, self._updated = create_graph, {}
        self._leaves = [] if create_graph else None
        return super().step(closure)

    def get_internal_loss(self) -> list[Tensor]:
        """L⁽²⁾ of the last step, before the memories' update: a 0-D tensor per group, mean over memories.

        Raises:
            ValueError: no step was taken yet.
        """
        if not self._internal_losses:
            raise ValueError("no internal loss yet: call step() first")
        nothing = [torch.full((), torch.nan)]  # a group without gradients
        losses = [self._internal_losses.get(g, nothing) for g in range(len(self.param_groups))]
        return [torch.stack([loss.to(group[0].device) for loss in group]).mean() for group in losses]

    def _apply(self) -> None:
        self._internal_losses = {}
        super()._apply()

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        found = dict(zip(params, grads, strict=True))
        directions: dict[Tensor, Tensor] = {}
        losses = self._internal_losses.setdefault(index, [])
        for members in self._memories(group):
            present = [p for p in members if p in found]
            if present:
                rows = [as_matrix(found[p]) for p in present]
                with torch.set_grad_enabled(self._create_graph):
                    outputs, loss = self._use_memory(group, members[0], rows)
                    for p, output in zip(present, outputs, strict=True):
                        directions[p] = output.detach().reshape(p.shape)
                        self.state[p]["step"] = self.state[p].get("step", 0) + 1
                        if self._create_graph:
                            lr = learning_rate(group, p.device)
                            kept = (1 - lr * group["weight_decay"]) * p.detach()
                            self._updated[p] = (kept - lr * output.view_as(p)).to(p.dtype)
                losses.append(loss.detach())
        return [directions[p] for p in params]

    def _memories(self, group: Group) -> list[list[Tensor]]:
        """The parameters that share a memory; its state lies with the first of them."""
        if not group["shared_memory"]:
            return [[p] for p in group["params"]]
        shared: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            shared.setdefault((matrix_shape(p), p.device, work_dtype(p)), []).append(p)
        return list(shared.values())

    def _use_memory(self, group: Group, owner: Tensor, matrices: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Train the memory of `owner` on the rows of all matrices, then read each: (m(u) each, L⁽²⁾)."""
        state = self.state[owner]
        if "weights" not in state:
            shape, sizes = matrix_shape(owner), (group["depth"], group["hidden_size"], group["rank"])
            initial = row_memory.init(shape, *sizes, like=matrices[0], seed=group["seed"])
            state["initial"] = _numbered(initial)
            state["weights"] = _numbered([w.clone() for w in initial])
        tiny = torch.finfo(matrices[0].dtype).tiny
        scales = [root_mean_square(g).clamp(min=tiny) for g in matrices]
        rows = torch.cat([g / s for g, s in zip(matrices, scales, strict=True)])  # û = u/s
        values = rows
        if self.value is not None:
            values = torch.cat([self._value_of(g) / s for g, s in zip(matrices, scales, strict=True)])
        with torch.enable_grad():
            weights, loss, mean_row = self._train_memory(group, state, rows, values)
        answer = row_memory.read(weights, rows, group["depth"], group["recompute"])
        state["weights"] = _numbered([w.detach() for w in weights])
        if group["objective"] == "surrogate":
            state["previous"] = mean_row.detach()
        parts = answer.split([len(g) for g in matrices])
        return [s * part for s, part in zip(scales, parts, strict=True)], loss  # eq 50: m(u) = s m̂(û)

    def _value_of(self, g: Tensor) -> Tensor:
        assert self.value is not None
        value = self.value(g)
        if value.shape != g.shape:
            raise ValueError(
                f"value must return a matrix of the gradient's shape {tuple(g.shape)}, "
                f"got {tuple(value.shape)}"
            )
        return value

    def _train_memory(
        self, group: Group, state: dict[str, Any], rows: Tensor, values: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """θ after one step of the internal objective, the objective before it, and m̂'s mean row."""
        current, initial = _in_order(state["weights"]), _in_order(state["initial"])
        leaves = [w.detach().clone().requires_grad_() for w in current]
        answer = row_memory.read(leaves, rows, group["depth"], group["recompute"])
        loss = row_memory.OBJECTIVES[group["objective"]](answer, values, state.get("previous"))
        gradients = torch.autograd.grad(
            loss, leaves, create_graph=self._create_graph, allow_unused=True, materialize_grads=True
        )
        # θ₀ + α(θ − θ₀) as θ − (1 − α)(θ − θ₀), so that a θ that stands at θ₀ stays there exactly
        forgotten = 1 - group["momentum"]
        weights = [
            leaf - forgotten * (w - w0) - group["memory_lr"] * d
            for leaf, w, w0, d in zip(leaves, current, initial, gradients, strict=True)
        ]
        if self._leaves is not None:
            self._leaves.append((group, state, leaves))
        return weights, loss, answer.mean(0)

    # -- copies and checkpoints

    def _not_copied(self) -> dict[str, Any]:
        return {"_leaves": None, "_updated": {}}  # the graph of a step belongs to the original's parameters

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; see `BaseOptimizer.load_state_dict`."""
        if "state" in state_dict:  # files of earlier versions have lists of matrices
            state = {
                i: {name: _numbered(v) if isinstance(v, list | tuple) else v for name, v in saved.items()}
                for i, saved in state_dict["state"].items()
            }
            state_dict = {**state_dict, "state": state}
        super().load_state_dict(state_dict)

    # -- learning to optimise

    def updated_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's parameters by name, those of the last step as functions of the memories.

        For torch.func.functional_call(model, parameters, inputs): a loss of its output can go to `meta_step`.

        Raises:
            ValueError: the last step was not `step(create_graph=True)`.
        """
        self._need_graph()
        return {name: self._updated.get(p, p) for name, p in model.named_parameters()}

    def meta_step(self, validation_loss: Tensor) -> None:
        """Move the memories, and what they are retained towards, down the gradient of `validation_loss`.

        The gradient goes through the last step: through the parameters, the reading of each memory, and its
        internal update. Nothing happens if that step was skipped for a non-finite gradient; a non-finite
        meta-gradient is skipped and counted likewise. A graph serves one `meta_step`.

        Raises:
            ValueError: the last step was not `step(create_graph=True)`, or the loss does not depend on it.
            FloatingPointError: the meta-gradient is not finite and `error_if_nonfinite` is set.
        """
        memories = self._need_graph()
        self._leaves, self._updated = None, {}
        if not memories:
            return
        if not validation_loss.requires_grad:
            raise ValueError(
                "validation_loss does not depend on the memories: compute it from "
                "torch.func.functional_call(model, optimizer.updated_parameters(model), ...)"
            )
        flat = [leaf for _, _, leaves in memories for leaf in leaves]
        gradients = torch.autograd.grad(validation_loss, flat, allow_unused=True, materialize_grads=True)
        if not all(bool(d.isfinite().all()) for d in gradients):
            if self.error_if_nonfinite:
                raise FloatingPointError("meta-gradient with NaN or infinite elements; no memory was changed")
            self.skipped_steps += 1
            return
        remaining = iter(gradients)
        for group, state, leaves in memories:
            moves = [group["meta_lr"] * next(remaining) for _ in leaves]
            torch._foreach_sub_(_in_order(state["weights"]), moves)
            torch._foreach_sub_(_in_order(state["initial"]), moves)

    def _need_graph(self) -> list[tuple[Group, dict[str, Any], list[Tensor]]]:
        if self._leaves is None:
            raise ValueError("the memories' graph is not there: call step(create_graph=True) just before")
        return self._leaves


def _numbered(matrices: Sequence[Tensor]) -> dict[str, Tensor]:
    """Matrices by their place, as a state holds them: a list is nothing that DCP can flatten."""
    return {str(i): matrix for i, matrix in enumerate(matrices)}


def _in_order(numbered: dict[str, Tensor]) -> list[Tensor]:
    """The matrices of `_numbered`."""
    return [numbered[str(i)] for i in range(len(numbered))]
