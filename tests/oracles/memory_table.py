"""The rows of docs/models.md, token by token: one row of the batch, one head, one matrix at a time.

Written from the equations of docs/models.md alone and importing nothing from the package. Every function is
differentiable and works in the dtype of its parameters. Inner gradients are torch.autograd's, taken at what
each matrix puts out; that of L_p starts from the printed smooth gradient.

Shapes: B rows, T tokens, D layer width, H heads, d = D/H, e hidden width of a memory, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.memory_layer import Params, State, causal_conv, clip, hidden_norm, unit

Weights = dict[str, Tensor]
Apply = Callable[[str, Tensor], Tensor]
"""(name of a matrix, x) -> the matrix times x"""


# -- architectures: M(x), given how a matrix is applied


def matrix(apply: Apply, x: Tensor) -> Tensor:
    return apply("W", x)


def mlp(depth: int, activation: Callable[[Tensor], Tensor] = F.silu) -> Callable[[Apply, Tensor], Tensor]:
    """x + W1 n(σ(W2 … n(σ(W_L x)))), σ = SiLU; without hidden matrices x + W1 x."""

    def answer(apply: Apply, x: Tensor) -> Tensor:
        h = x
        for level in range(depth, 1, -1):
            h = hidden_norm(activation(apply(f"W{level}", h)))
        return x + apply("W1", h)

    return answer


def mlp_output_norm(apply: Apply, x: Tensor) -> Tensor:
    """MIRAS: x + LN(W1 GELU(W2 x))."""
    z = apply("W1", F.gelu(apply("W2", x)))
    centred = z - z.mean()
    return x + centred / torch.sqrt((centred * centred).mean() + 0.01)


def swiglu(apply: Apply, x: Tensor) -> Tensor:
    """x + W1 n(SiLU(W2 x) ⊙ (W3 x))."""
    return x + apply("W1", hidden_norm(F.silu(apply("W2", x)) * apply("W3", x)))


# -- the rows


@dataclass(frozen=True)
class Model:
    """One memory: what it is, what a step minimises, how it steps and how it fades."""

    answer: Callable[[Apply, Tensor], Tensor] = matrix
    names: tuple[str, ...] = ("W",)  # of the matrices; "W" and "W1" put out the answer, the others are hidden
    objective: str = "l2"  # dot, l2, lp, huber
    rule: str = "gd"  # gd; of matrices also "dgd" (dot-product objective) and "oja"
    gradient: str = "anchor"  # or "token": at the weights of the token before, retained
    rate: str = "gated"  # or "one"
    decay: str = "gated"  # or "constant", "none"
    form: str = "linear"  # weights from what is stored: "linear", "q_norm", "softmax"
    p: float = 3.0
    q: float = 4.0
    clip_output: bool = False
    momentum: bool = False
    momentum_scaled: bool = True
    unit_values: bool = True
    read: str = "token"

    def gates(self) -> set[str]:
        """Which rates the layer computes from its input."""
        gates = {"eta": self.rate == "gated", "alpha": self.decay == "gated"}
        gates |= {"mu": self.momentum, "width": self.objective == "huber"}
        return {name for name, present in gates.items() if present}

    def clipped(self, name: str) -> bool:
        return self.clip_output if name in ("W", "W1") else True

    def retained_to_initial(self, name: str) -> bool:
        return name not in ("W", "W1") or self.form != "linear" or self.answer is mlp_output_norm


DELTA = Model(gradient="token", unit_values=False)
LINEAR_ATTENTION = replace(DELTA, objective="dot", rate="one", decay="none")
RETNET = replace(LINEAR_ATTENTION, decay="constant")
DELTANET = replace(DELTA, decay="none")
GATED_DELTANET = DELTA
OJA = Model(rule="oja", gradient="token")
DGD_DOT = Model(objective="dot", rule="dgd", gradient="token")
TTT_LINEAR = Model(decay="none", unit_values=False)
MLP = Model(answer=mlp(2), names=("W1", "W2"))
TTT_MLP = replace(MLP, decay="none")
DLA = replace(MLP, objective="dot", momentum=True)
MIRAS = replace(MLP, answer=mlp_output_norm, clip_output=True)
MONETA = replace(MIRAS, objective="lp", form="q_norm")
YAAD = replace(MIRAS, objective="huber")
MEMORA = replace(MIRAS, form="softmax", read="chunk")
SWIGLU = replace(MLP, answer=swiglu, names=("W1", "W2", "W3"))


def with_depth(model: Model, depth: int) -> Model:
    return replace(model, answer=mlp(depth), names=tuple(f"W{level + 1}" for level in range(depth)))


# -- one memory of one head


@dataclass(frozen=True)
class Memory:
    """What is stored: W, or A of Moneta and Memora, each by the matrix's name."""

    current: Weights
    anchor: Weights
    momentum: Weights | None
    initial: Weights


@dataclass(frozen=True)
class Token:
    """What one token brings to the memory of one head."""

    k: Tensor
    v: Tensor
    q: Tensor
    eta: Tensor
    alpha: Tensor
    mu: Tensor | None
    width: Tensor | None  # δ of Huber


def weights_of(model: Model, stored: Weights, anchor: Weights) -> Weights:
    """The matrices that a memory applies, from what is stored; Moneta's scale is that of the anchor."""
    if model.form == "q_norm":
        scales = {}
        for name, A in anchor.items():
            norm = (A.abs() ** model.q).sum() ** (1 / model.q)
            scales[name] = norm.clamp_min(0.1) ** (model.q - 2)
        return {name: A / scales[name] for name, A in stored.items()}
    if model.form == "softmax":
        return {name: A.shape[1] * torch.softmax(A, dim=1) for name, A in stored.items()}
    return stored


def ask(model: Model, weights: Weights, x: Tensor) -> Tensor:
    return model.answer(lambda name, u: weights[name] @ u, x)


class Recorder:
    """Applies matrices, keeping each one's input and output for the inner gradient."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.inputs: Weights = {}
        self.outputs: Weights = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        z = self.weights[name] @ x
        self.inputs[name] = x
        self.outputs[name] = z + torch.zeros_like(z, requires_grad=True)  # part of a graph in any case
        return self.outputs[name]


def slope(model: Model, answer: Tensor, token: Token) -> Tensor:
    """Gradient of the objective at M's output; the target and δ are constants of the inner step."""
    error = answer - token.v
    if model.objective == "lp":
        return model.p * torch.tanh(10 * error) * (error * error + 1e-6) ** ((model.p - 1) / 2)
    if model.objective == "dot":
        loss = -(answer * token.v).sum()
    elif model.objective == "l2":
        loss = 0.5 * (error * error).sum()
    elif model.objective == "huber":
        assert token.width is not None
        norm = error.norm()
        inside = bool(norm <= token.width)
        loss = 0.5 * norm**2 if inside else token.width * (norm - 0.5 * token.width)
    else:
        raise ValueError(f"unknown objective {model.objective!r}")
    return torch.autograd.grad(loss, answer, create_graph=True)[0]


def inner_gradients(model: Model, weights: Weights, token: Token) -> Weights:
    """∂ℓ/∂W of every matrix as g xᵀ, g clipped where the table says so."""
    with torch.enable_grad():
        record = Recorder(weights)
        answer = model.answer(record, token.k)
        at_answer = slope(model, answer, token)
        names, outputs = zip(*record.outputs.items(), strict=True)
        gs = torch.autograd.grad(answer, outputs, grad_outputs=at_answer, create_graph=True)
    return {
        name: torch.outer(clip(g) if model.clipped(name) else g, record.inputs[name])
        for name, g in zip(names, gs, strict=True)
    }


def momentum_step(model: Model, S: Tensor | None, write: Tensor, mu: Tensor | None) -> Tensor:
    """S_t = μ S_{t−1} + (1 − μ) write; without momentum the write itself."""
    if S is None:
        return write
    assert mu is not None
    return mu * S + ((1 - mu) * write if model.momentum_scaled else write)


def update_matrix(model: Model, memory: Memory, token: Token) -> Memory:
    """One token of the rows whose gradient is taken at every token, as their recurrences are printed."""
    W, k, v, eta, alpha = memory.current["W"], token.k, token.v, token.eta, token.alpha
    eye = torch.eye(len(k), dtype=k.dtype)
    S = None if memory.momentum is None else memory.momentum["W"]
    if model.rule == "oja":
        M = W.T
        W = (alpha * M + eta * torch.outer(v, k - alpha * M.T @ v)).T
    elif model.rule == "dgd":
        S = momentum_step(model, S, eta * torch.outer(v, k), token.mu)
        W = W @ (alpha * eye - eta * torch.outer(k, k)) + S
    elif model.objective == "dot":
        W = alpha * W + eta * torch.outer(v, k)
    else:
        W = alpha * W @ (eye - eta * torch.outer(k, k)) + eta * torch.outer(v, k)
    return replace(memory, current={"W": W}, momentum=None if memory.momentum is None else {"W": S})


def update_from_anchor(model: Model, memory: Memory, token: Token) -> Memory:
    """A_t = retained + S_t, every matrix; gradients at the weights of the anchor."""
    gradients = inner_gradients(model, weights_of(model, memory.anchor, memory.anchor), token)
    current, momentum = {}, {}
    for name, A in memory.current.items():
        S = None if memory.momentum is None else memory.momentum[name]
        momentum[name] = momentum_step(model, S, -token.eta * gradients[name], token.mu)
        centre = memory.initial[name] if model.retained_to_initial(name) else torch.zeros_like(A)
        current[name] = centre + token.alpha * (A - centre) + momentum[name]
    return replace(memory, current=current, momentum=None if memory.momentum is None else momentum)


def surprise_of(model: Model, memory: Memory, token: Token) -> Tensor:
    """‖M(k) − v‖² at the anchor; of Oja's memory ‖Mᵀ v − k‖²."""
    if model.rule == "oja":
        error = memory.anchor["W"] @ token.v - token.k
    else:
        error = ask(model, weights_of(model, memory.anchor, memory.anchor), token.k) - token.v
    return (error * error).sum()


def read_memory(model: Model, before: Memory, after: Memory, q: Tensor) -> Tensor:
    """M(q) after the token's write, or at the anchor that held while the token came."""
    if model.rule == "oja":
        return after.current["W"].T @ q
    stored = after.current if model.read == "token" else before.anchor
    return ask(model, weights_of(model, stored, before.anchor), q)


# -- the layer


@dataclass(frozen=True)
class Layer:
    model: Model
    num_heads: int
    chunk_size: int  # 1 where the gradient is taken at every token: the anchor is the last token's memory
    eta_max: float
    conv_size: int


@dataclass(frozen=True)
class Row:
    """The running state of one row: a memory per head, K − 1 past inputs [3D] of the convolution."""

    heads: list[Memory]
    history: list[Tensor]
    position: int


def make_token(layer: Layer, params: Params, x: Tensor, activated: Tensor, head: int) -> Token:
    model, D = layer.model, x.shape[0]
    d = D // layer.num_heads
    k, v, q = (activated[path * D + head * d : path * D + (head + 1) * d] for path in range(3))

    def gate(name: str) -> Tensor:
        return (params[f"gates.{name}.weight"][head] * x).sum() + params[f"gates.{name}.bias"][head]

    alpha = {"none": 1.0, "constant": 1 - 2.0 ** (-5 - head)}
    one = torch.ones_like(x[0])
    retained = torch.sigmoid(gate("alpha")) if model.decay == "gated" else alpha[model.decay] * one
    largest = layer.eta_max * one
    if model.rule == "dgd":  # beyond 1 + α, α I − η k kᵀ would be an expansion
        largest = torch.minimum(largest, 1 + retained)
    return Token(
        k=unit(k),
        v=unit(v) if model.unit_values else v,
        q=unit(q),
        eta=largest * torch.sigmoid(gate("eta")) if model.rate == "gated" else one,
        alpha=retained,
        mu=torch.sigmoid(gate("mu")) if model.momentum else None,
        width=F.softplus(gate("width")) if model.objective == "huber" else None,
    )


def step(layer: Layer, params: Params, row: Row, x: Tensor) -> tuple[Tensor, Tensor, Row]:
    """One real token x [D] of one row: output [D], surprise [], the row after it."""
    p = params["in_proj.weight"] @ x
    activated = F.silu(causal_conv(params.get("conv.weight"), row.history, p))
    update = update_matrix if layer.model.gradient == "token" else update_from_anchor
    position = row.position + 1
    reads, heads, squared_error = [], [], torch.zeros_like(x[0])
    for h, before in enumerate(row.heads):
        token = make_token(layer, params, x, activated, h)
        squared_error = squared_error + surprise_of(layer.model, before, token)
        after = update(layer.model, before, token)
        o = read_memory(layer.model, before, after, token.q)
        reads.append(o / torch.sqrt((o * o).mean() + 1e-6) * params["out_norm.weight"])
        heads.append(after if position % layer.chunk_size else replace(after, anchor=after.current))
    y = params["out_proj.weight"] @ (torch.cat(reads) * F.silu(params["gate_proj.weight"] @ x))
    history = [*row.history, p][1:] if row.history else []
    return y, torch.sqrt(squared_error), Row(heads, history, position)


def first_row(layer: Layer, params: Params) -> Row:
    """Every memory at its initial weights, zeros before the first token."""
    heads = []
    for h in range(layer.num_heads):
        initial = {name: params[f"initial.{name}"][0, h] for name in layer.model.names}
        zeros = {name: torch.zeros_like(W) for name, W in initial.items()}
        heads.append(Memory(initial, initial, zeros if layer.model.momentum else None, initial))
    zero = torch.zeros_like(params["in_proj.weight"][:, 0])
    return Row(heads, [zero] * max(layer.conv_size - 1, 0), 0)


def state_of(rows: list[Row], layer: Layer) -> State:
    """Weights [B, 1, H, ·, ·] by name, `position` [B], `conv_tail` [B, K − 1, 3D]."""

    def gather(field: str) -> Weights:
        return {
            name: torch.stack(
                [torch.stack([getattr(memory, field)[name] for memory in row.heads]) for row in rows]
            ).unsqueeze(1)
            for name in layer.model.names
        }

    return {
        "current": gather("current"),
        "anchor": gather("anchor"),
        "momentum": gather("momentum") if layer.model.momentum else None,
        "position": torch.tensor([row.position % layer.chunk_size for row in rows]),
        "conv_tail": torch.stack([torch.stack(row.history) for row in rows]) if layer.conv_size > 1 else None,
    }


def memory_layer(
    model: Model,
    params: Params,
    x: Tensor,
    *,
    num_heads: int,
    chunk_size: int,
    eta_max: float = 1.0,
    mask: Tensor | None = None,
    conv_size: int = 4,
) -> tuple[Tensor, State, Tensor]:
    """The layer on x [B, T, D]; mask [B, T], True = real token. Returns y [B, T, D], the final state and the
    surprise [B, T]. A padded token is skipped: it changes nothing and its output and surprise are 0."""
    chunk_size = 1 if model.gradient == "token" else chunk_size
    layer = Layer(model, num_heads, chunk_size, eta_max, conv_size)
    rows, outputs, surprises = [], [], []
    for b in range(x.shape[0]):
        row = first_row(layer, params)
        for t in range(x.shape[1]):
            y, surprise = torch.zeros_like(x[b, t]), torch.zeros_like(x[b, t, 0])
            if mask is None or bool(mask[b, t]):
                y, surprise, row = step(layer, params, row, x[b, t])
            outputs.append(y)
            surprises.append(surprise)
        rows.append(row)
    return torch.stack(outputs).view_as(x), state_of(rows, layer), torch.stack(surprises).view(x.shape[:2])


def random_params(
    model: Model,
    hidden_size: int = 8,
    num_heads: int = 2,
    *,
    expansion: float = 1.0,
    conv_size: int = 4,
    seed: int = 0,
) -> Params:
    """Parameters by the library's names: float64, seeded, every tensor in general position."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(*shape, dtype=torch.float64, generator=generator)

    D, H = hidden_size, num_heads
    d = D // H
    e = int(expansion * d) if len(model.names) > 1 else d
    params = {"in_proj.weight": normal(3 * D, D, std=1 / math.sqrt(D))}
    if conv_size:
        params["conv.weight"] = normal(3 * D, 1, conv_size, std=1 / math.sqrt(conv_size))
    takes_input = {"W3", "W2"} if model.answer is swiglu else {model.names[-1]}
    for name in model.names:
        rows, columns = d if name in ("W", "W1") else e, d if name in takes_input else e
        std = 0.5 / math.sqrt(columns) if rows == d and model.form == "linear" else 1.0
        params[f"initial.{name}"] = normal(1, H, rows, columns, std=std)
    means = {"eta": 0.0, "alpha": 3.0, "mu": 0.0, "width": 0.0}
    for name in sorted(model.gates()):
        params[f"gates.{name}.weight"] = normal(H, D, std=0.5)
        params[f"gates.{name}.bias"] = normal(H, std=0.5, mean=means[name])
    params["out_norm.weight"] = normal(d, std=0.2, mean=1.0)
    params["gate_proj.weight"] = normal(D, D, std=1 / math.sqrt(D))
    params["out_proj.weight"] = normal(D, D, std=1 / math.sqrt(D))
    return params
