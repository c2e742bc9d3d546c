"""Delta gradient descent as an optimizer of linear layers, eq 57: forget the answer of W, then write."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle

from nested_learning._errors import unknown
from nested_learning.optimizers.arithmetic import Group, all_finite, learning_rate, work_dtype
from nested_learning.optimizers.base import BaseOptimizer, Params
from nested_learning.optimizers.checks import NON_NEGATIVE, Check
from nested_learning.optimizers.memory_forms import MEMORIES, memory_direction
from nested_learning.optimizers.sharded import is_sharded, whole

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# In a state: Σ x xᵀ of the gradients that wait, the number of these x, and how many times some came.
INPUTS = ("inputs", "input_count", "input_passes")


class DeltaGD(BaseOptimizer):
    """DGD, eq 57, for the weights of linear layers and convolutions, from their inputs x.

    With G the gradient and S = E[x xᵀ] the mean over all inputs (batch, tokens, positions) that gradient
    came from:
        W ← (W − lr · G)(I + lr · S)⁻¹, computed as W ← W − lr · (G + W S)(I + lr · S)⁻¹ by Cholesky.
    This is the implicit form (ours): the printed one, W ← W(I − lr·S) − lr·G, diverges where lr·λ_max(S) > 2.
    For one input of unit norm it is eq 57 with η′ = lr/(1 + lr).

    It does not minimise the loss L but L + ½E‖Wx‖²: the fixed point is G = −W S. Plain regression ends at
    half the least-squares solution. Compare it accordingly, and use it where forgetting is wanted.

    Inputs are collected by hooks, when a layer's gradient is computed: evaluation, and forwards without
    backward, leave no trace; gradients that are accumulated over several backwards are averaged with all
    their inputs; autocast and GradScaler need nothing special. Under torch.distributed the inputs of all
    processes count. `zero_grad` and `step` drop the collected inputs. In a group of `MultiFrequency` those of
    the gradients that it adds up wait with them.

        with DeltaGD(model.parameters(), lr=0.1).attach(model) as optimizer:
            ...  # any training loop; the hooks are gone afterwards, as after optimizer.detach()

    All other parameters (biases, norms, embeddings, grouped, transposed and 3-D convolutions, layers whose
    forward was not called, as those of nn.MultiheadAttention) are trained by `inner` at
    lr · inner_lr_scale. A convolution's W is (out, in·kernel), its x a patch.
    State: of W between steps the number of steps alone, (in·kernel)² elements per layer from backward to
    step, in float32 or float64, and throughout where gradients wait for later steps; for other parameters the
    state of `inner`. A step costs (in·kernel)³/3
    multiplications per layer. A step for whose inputs x xᵀ overflows is skipped like one with non-finite
    gradients.

    Copies (copy.deepcopy, pickle) of the optimizer are not attached, and copies of an attached model are
    attached to nothing: call attach(model) on the copies.

    Args:
        params: parameters or groups.
        lr: learning rate; any is stable for the quadratic part ½E‖Wx‖².
        inner: "adam", "gd", "momentum" or "adagrad" (see `memory_forms`), for all other parameters.
        inner_lr_scale: the learning rate of `inner` as a multiple of lr.
        weight_decay: decoupled, times lr.
        maximize: ascend L instead of descend; the forgetting stays.
        error_if_nonfinite: see `BaseOptimizer`.
    """

    options: ClassVar[dict[str, Check]] = {**BaseOptimizer.options, "inner_lr_scale": NON_NEGATIVE}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        inner: str = "adam",
        inner_lr_scale: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        if inner not in MEMORIES:
            raise unknown("inner optimizer", inner, MEMORIES)
        self._inner_name, self._memory = inner, MEMORIES[inner]()
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._moments: dict[Tensor, tuple[Tensor, int]] = {}  # by weight: Σ x xᵀ and the number of x
        self._reduced: dict[
            Tensor, tuple[Tensor, int | Tensor]
        ] = {}  # those of all processes, once looked at
        self._trained: set[Tensor] = set()
        self._sharded: dict[nn.Module, Tensor] = {}  # the weights in shards of layers that are attached
        super().__init__(params, locals())

    @property
    def _name(self) -> str:
        return f"DeltaGD({self._inner_name!r})"

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; the weights of layers that are attached already are trained by DGD from here on."""
        super().add_param_group(param_group)
        self._trained.update(self.param_groups[-1]["params"])

    # -- hooks

    def attach(self, model: nn.Module) -> DeltaGD:
        """Collect the inputs of the model's linear layers and convolutions from now on. Returns self.

        Raises:
            ValueError: a layer is attached already, or no layer's weight is trained by this optimizer.
        """
        # Anew: accelerate puts parameters in shards into the groups in place of those that were given.
        self._trained = {p for group in self.param_groups for p in group["params"]}
        layers = [
            m
            for m in model.modules()
            if isinstance(m, LAYERS)
            and getattr(m, "groups", 1) == 1
            and not isinstance(m, NonDynamicallyQuantizableLinear)  # nn.MultiheadAttention's is never called
        ]
        if any(layer in self._hooks for layer in layers):
            raise ValueError("the model is attached already: call detach() first, or its inputs count twice")
        if not any(layer.weight in self._trained for layer in layers):
            raise ValueError(
                f"none of the model's {len(layers)} Linear, Conv1d and Conv2d layers has a weight among this "
                "optimizer's parameters: attach the model whose parameters it was given"
            )
        for layer in layers:
            if is_sharded(layer.weight):
                self._sharded[layer] = layer.weight
            self._hooks[layer] = layer.register_forward_hook(_Watch(self), with_kwargs=True)
        return self

    def detach(self) -> None:
        """Remove the hooks and drop the inputs that they collected."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._sharded.clear()
        self._forget_gradients()
        for state in self.state.values():
            _forget_inputs(state)

    def __enter__(self) -> DeltaGD:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _not_copied(self) -> dict[str, Any]:
        return {"_hooks": {}, "_moments": {}, "_reduced": {}, "_sharded": {}}

    @torch.no_grad()
    def _collect(self, layer: nn.Module, weight: Tensor, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            rows = input_rows(layer, x.to(work_dtype(weight)))
            total, count = self._moments.get(weight, (None, 0))
            moment = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
        self._moments[weight] = (moment, count + len(rows))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients and the inputs they came from."""
        self._forget_gradients()
        super().zero_grad(set_to_none)

    def _forget_gradients(self) -> None:
        self._moments.clear()
        self._reduced.clear()

    def keep_inputs(self, params: Iterable[Tensor]) -> None:
        """Let the inputs of all processes wait for a later step, as the gradients they came with do."""
        for p in params:
            self._reduce(p)
            if p not in self._reduced:
                continue
            total, count = self._reduced.pop(p)
            state = self.state[p]
            if "inputs" not in state:
                state.update(no_inputs(p))
            state["inputs"] = total.add_(whole(state["inputs"]))
            state["input_count"] = state["input_count"] + count
            state["input_passes"] += 1

    def expect_inputs(self, params: Iterable[Tensor], waiting: bool) -> None:
        """Have room for inputs that wait, in states that are then alike at every step, or none."""
        watched = {layer.weight for layer in self._hooks} & self._trained
        for p in params:
            if not waiting:
                for name in INPUTS:
                    self.state.get(p, {}).pop(name, None)
            elif p in watched and "inputs" not in self.state[p]:
                self.state[p].update(no_inputs(p))

    def drop_inputs(self, waiting: bool) -> None:
        """Drop the inputs of the gradients that are there; also those of `waiting` gradients, or not."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self._drop(p, waiting)

    def _drop(self, p: Tensor, waiting: bool = True) -> None:
        self._moments.pop(p, None)
        self._reduced.pop(p, None)
        if waiting:
            _forget_inputs(self.state.get(p, {}))

    # -- checkpoints

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        super()._restore_dtypes(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        self._forget_gradients()
        for i, (total, count) in state_dict.get("inputs", {}).items():  # a file of an earlier version
            state = self.state[params[int(i)]]
            state.update(no_inputs(params[int(i)]))
            state["inputs"].copy_(total)
            state["input_count"] += int(count)
            state["input_passes"] = 1

    # -- the step

    def _apply(self) -> None:
        if self._is_probe():
            watched = {layer.weight for layer in self._hooks}
            self._reduced = {
                p: (_room_for_inputs(p), 1) for p in self._trained & watched if p.grad is not None
            }
        super()._apply()
        self.drop_inputs(waiting=True)

    def _check_attached(self) -> None:
        """ValueError where no layer's inputs can have come here."""
        if not self._hooks:
            raise ValueError(
                "DeltaGD needs the layers' inputs: call attach(model) before the forward pass. A copy is not "
                "attached, whatever it was copied from"
            )
        if any(is_sharded(layer.weight) and layer not in self._sharded for layer in self._hooks):
            raise ValueError(
                "DeltaGD was attached to a model that was sharded afterwards, so that the layers' inputs are "
                "missing: call detach() and attach(model) after fully_shard, or after accelerate's prepare"
            )

    def gradients_are_usable(self) -> bool:
        """As of the base, and that layers are attached and their mean inputs finite.

        Nothing is dropped for looking: where another optimizer, or this one, refuses, all is as it was.
        """
        self._check_attached()
        if not super().gradients_are_usable():
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in params:
            self._reduce(p)
        if all_finite([self._sum(p)[0] for p in params if self._has_inputs(p)]):
            return True
        if self.error_if_nonfinite:
            raise FloatingPointError(
                "inputs of a layer that are not finite, or whose squares overflow. No parameter was "
                "changed. Normalise them, or pass error_if_nonfinite=False to skip."
            )
        self.skip()
        return False

    def skip(self) -> None:
        """Let a step go by, with the inputs that were collected for it."""
        super().skip()
        self.drop_inputs(waiting=True)

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        directions = []
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            if self._has_inputs(p):
                state["delta_step"] = state.get("delta_step", 0) + 1
                total, count = self._sum(p)
                S = total / (
                    count.clamp(min=1).to(total.dtype) if isinstance(count, Tensor) else max(count, 1)
                )
                self._drop(p)
                directions.append(_delta_direction(p, g, S, learning_rate(group, S.device)))
            else:
                state.pop("delta_step", None)
                room = {name: state.pop(name) for name in INPUTS if name in state}
                u = memory_direction(self._memory, state, g)
                state.update(room)
                directions.append(group["inner_lr_scale"] * u)
        return directions

    def _needs_whole(self, group: Group, p: Tensor) -> bool:
        return self._has_inputs(p)

    def _reduce(self, p: Tensor) -> None:
        """Sum what the processes have collected for a weight."""
        if p not in self._moments:
            return
        total, number = self._moments.pop(p)
        count: int | Tensor = number
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            count = torch.full((), number, dtype=torch.int64, device=total.device)
            dist.all_reduce(total)
            dist.all_reduce(count)
        if p in self._reduced:  # after a step that was refused
            before, known = self._reduced[p]
            total, count = total.add_(before), count + known
        self._reduced[p] = total, count

    def _has_inputs(self, p: Tensor) -> bool:
        return p in self._reduced or bool(self.state.get(p, {}).get("input_passes"))

    def _sum(self, p: Tensor) -> tuple[Tensor, int | Tensor]:
        """Σ x xᵀ [n, n] and the number of x, of the gradients that are there and of those that waited."""
        state = self.state.get(p, {})
        if not state.get("input_passes"):
            return self._reduced[p]
        total, count = whole(state["inputs"]), state["input_count"]
        if p not in self._reduced:
            return total, count
        more, number = self._reduced[p]
        return total + more, count + number


def _room_for_inputs(p: Tensor) -> Tensor:
    """Zeros of the shape of x xᵀ: [n, n], n the inputs of a row of the weight `p`."""
    return torch.zeros(*[math.prod(p.shape[1:])] * 2, dtype=work_dtype(p), device=p.device)


def no_inputs(p: Tensor) -> dict[str, Any]:
    """Entries of the state of a weight for whose gradients nothing waits."""
    count = torch.zeros((), dtype=torch.int64, device=p.device)
    return {"inputs": _room_for_inputs(p), "input_count": count, "input_passes": 0}


def _forget_inputs(state: dict[str, Any]) -> None:
    """Drop the inputs that wait in a weight's state, and leave the room."""
    if "inputs" in state:
        # Not in place: a state_dict that was taken before has these tensors.
        state["inputs"] = torch.zeros_like(state["inputs"])
        state["input_count"] = torch.zeros_like(state["input_count"])
        state["input_passes"] = 0


class _Watch:
    """Forward hook of an attached optimizer. In a copy of the model it does nothing.

    Args:
        optimizer: that collects the inputs, None for nobody.
    """

    observes = True  # it changes nothing, see layers.token_inputs.is_plain

    def __init__(self, optimizer: DeltaGD | None) -> None:
        self.optimizer = optimizer

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        optimizer, weight = self.optimizer, layer.weight
        if optimizer is not None:  # within the forward pass of a sharded layer its weight is a whole one
            weight = optimizer._sharded.get(layer, weight)
        if optimizer is None or not output.requires_grad or not weight.requires_grad:
            return
        if weight in optimizer._trained:
            x = (args[0] if args else kwargs["input"]).detach()
            # A layer that fully_shard wrapped by itself is in shards again here: the whole weight, whose
            # gradient is computed, is out of reach, and every backward pass counts.
            edge = None if is_sharded(layer.weight) else get_gradient_edge(layer.weight)

            def collect(_: Tensor) -> None:
                if edge is None or _is_reached(edge):
                    optimizer._collect(layer, weight, x)

            output.register_hook(collect)

    def __reduce__(self) -> tuple[Any, ...]:
        return _watch_nothing, (RemovableHandle.next_id,)


def _is_reached(edge: GradientEdge) -> bool:
    """Whether the backward pass that runs computes the gradient there, or one of an input alone."""
    try:
        return bool(torch._C._will_engine_execute_node(edge.node))
    except RuntimeError:  # autograd.grad with the weight among its inputs, of which torch does not tell
        return True


def _watch_nothing(next_id: int) -> _Watch:
    """The hook of a copy. Numbers of hooks below `next_id` are taken in the copied model."""
    RemovableHandle.next_id = max(RemovableHandle.next_id, next_id)
    return _Watch(None)


def _delta_direction(p: Tensor, g: Tensor, S: Tensor, lr: Tensor | float) -> Tensor:
    """The direction u of eq 57 in its implicit form, with W − lr·u = (W − lr·G)(I + lr·S)⁻¹, in g's shape."""
    W, G = whole(p.detach()).to(g.dtype).flatten(1), g.flatten(1)
    A = S * lr
    # What rounding may take off the smallest eigenvalue is added, so that A is positive where 1 is lost
    # beside lr·S: Cholesky cannot fail, and the synchronisation of a check is saved.
    A.diagonal().add_(1 + torch.finfo(A.dtype).eps * A.diagonal().sum())
    L = torch.linalg.cholesky_ex(A).L
    return torch.cholesky_solve((G + W @ S).mT, L).mT.reshape(g.shape)  # eq 57: (G + W S)(I + lr·S)⁻¹


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors [N, in] that the layer's weight, as a matrix (out, in), is multiplied with.

    Args:
        layer: nn.Linear, nn.Conv1d or nn.Conv2d with groups=1.
        x: the layer's input: [..., in], or [B, channels, length] or [B, channels, height, width], B optional.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    dims = len(layer.kernel_size)
    x = x.unsqueeze(0) if x.ndim == dims + 1 else x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    sizes = [layer.kernel_size, layer.dilation, layer.stride]
    if dims == 1:  # a picture of height one
        x = x.unsqueeze(2)
        sizes = [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    patches = F.unfold(x, kernel, dilation, 0, stride)  # [B, in·kernel, positions]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
