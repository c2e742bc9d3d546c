"""Titans and self-modifying Titans, token by token: one row, one head, one matrix at a time.

Written from the equations alone (Nested Learning, arXiv 2512.24695, eq 83-93; Titans, arXiv 2501.00663) and
importing nothing from the package, so that agreement with the library means something. Every function is
differentiable, works in the dtype of its parameters, and takes the inner gradient from torch.autograd.

Shapes: B rows, T tokens, D layer width, H heads, d = D/H, e hidden width of a memory, N memories, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
State = dict[str, Any]
RULES = ("dgd", "dgd_literal", "gd")
MakeToken = Callable[..., "Token"]


def bounded(u: Tensor) -> Tensor:
    """u scaled down to a norm of at most 1; never scaled up."""
    return u / u.norm().clamp_min(1.0)


def unit(u: Tensor) -> Tensor:
    """L2 normalisation of keys, values, queries and targets; the floor is 1e-3."""
    return u / torch.sqrt((u * u).sum() + 1e-6)


def hidden_norm(h: Tensor) -> Tensor:
    """n(h): L2 normalisation of a memory's hidden vector; the floor is 0.1."""
    return h / torch.sqrt((h * h).sum() + 0.01)


def memory_names(adaptive_q: bool) -> list[str]:
    """The order of the memories along the axis N of `initial.W1` and of the state."""
    return ["k", "v", *(["q"] if adaptive_q else []), "eta", "alpha", "memory"]


@dataclass(frozen=True)
class Memory:
    """One two-layer memory of one head: W1 [d, e], W2 [e, d]; S1, S2 are None without momentum."""

    W1: Tensor
    W2: Tensor
    anchor_W1: Tensor
    anchor_W2: Tensor
    S1: Tensor | None
    S2: Tensor | None
    initial_W2: Tensor
    chunk: int

    def anchor(self, x: Tensor) -> Tensor:
        """M(x) with the weights of the last chunk boundary."""
        return answer(self.anchor_W1, self.anchor_W2, x)

    def now(self, x: Tensor) -> Tensor:
        """M(x) with the weights after the last write."""
        return answer(self.W1, self.W2, x)


@dataclass(frozen=True)
class Token:
    """What one token brings to the memories of one head."""

    k: Tensor
    q: Tensor
    targets: dict[str, Tensor]  # v̂ of every memory
    eta: Tensor
    log_alpha: Tensor
    log_mu: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """Of ½‖M(k) − v̂‖²: g1 at W1's output, g2 at W2's output; x1 and x2 = k are the two inputs."""

    x1: Tensor
    x2: Tensor
    g1: Tensor
    g2: Tensor


def answer(W1: Tensor, W2: Tensor, x: Tensor) -> Tensor:
    """M(x) = x + W1 n(SiLU(W2 x)), eq 89 and 91."""
    return x + W1 @ hidden_norm(F.silu(W2 @ x))


def inner_gradients(W1: Tensor, W2: Tensor, k: Tensor, target: Tensor) -> Gradients:
    """By autograd with respect to the two pre-activations alone: the target is a constant of the inner step,
    while the result stays a differentiable function of W1, W2, k and the target."""
    with torch.enable_grad():
        z2 = W2 @ k
        if not z2.requires_grad:
            z2.requires_grad_(True)
        x1 = hidden_norm(F.silu(z2))
        z1 = W1 @ x1
        error = k + z1 - target
        loss = 0.5 * (error * error).sum()
        g1, g2 = torch.autograd.grad(loss, [z1, z2], create_graph=True)
    return Gradients(x1=x1, x2=k, g1=g1, g2=g2)


def clip(g: Tensor) -> Tensor:
    """To norm at most 1."""
    return g if float(g.detach().norm()) <= 1 else g / g.norm()


def evolve(
    W: Tensor,
    S: Tensor | None,
    x: Tensor,
    a: Tensor,
    log_alpha: Tensor,
    *,
    erase: Tensor | None = None,
    log_mu: Tensor | None = None,
    scaled: bool = True,
    W_init: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token of the recurrence for one matrix:

    S_t = μ S_{t−1} + (1 − μ) a xᵀ  (unscaled: a xᵀ; without momentum S_t = a xᵀ)
    W_t = W_init + α (W_{t−1} − W_init) − erase (W_{t−1} x) xᵀ + S_t
    """
    write = torch.outer(a, x)
    if S is not None:
        assert log_mu is not None
        mu = log_mu.exp()
        S = mu * S + ((1 - mu) * write if scaled else write)
        write = S
    origin = torch.zeros_like(W) if W_init is None else W_init
    kept = origin + log_alpha.exp() * (W - origin)
    if erase is not None:
        kept = kept - erase * torch.outer(W @ x, x)
    return kept + write, S


def update(memory: Memory, token: Token, target: Tensor, rule: str, scaled: bool) -> Memory:
    """The write of one token into one memory; all gradients are taken at the anchor."""
    g = inner_gradients(memory.anchor_W1, memory.anchor_W2, token.k, target)
    eta = token.eta
    erase1: Tensor | None = None
    erase2: Tensor | None = None
    W2_init: Tensor | None = memory.initial_W2
    if rule == "dgd":
        a1, a2, erase1 = eta * (target - token.k), -eta * clip(g.g2), eta
    elif rule == "dgd_literal":
        a1, a2, erase1, erase2, W2_init = -eta * g.g1, -eta * g.g2, eta, eta, None
    elif rule == "gd":
        a1, a2 = -eta * g.g1, -eta * clip(g.g2)
    else:
        raise ValueError(f"rule {rule!r} is not one of {RULES}")
    shared: dict[str, Any] = {"log_mu": token.log_mu, "scaled": scaled}
    W1, S1 = evolve(memory.W1, memory.S1, g.x1, a1, token.log_alpha, erase=erase1, **shared)
    W2, S2 = evolve(memory.W2, memory.S2, g.x2, a2, token.log_alpha, erase=erase2, W_init=W2_init, **shared)
    return replace(memory, W1=W1, W2=W2, S1=S1, S2=S2)


def largest(eta_max: float, alpha_logit: Tensor) -> Tensor:
    """The rate's bound: also 1 + α, beyond which α I − η k kᵀ would be an expansion."""
    return torch.minimum(torch.full_like(alpha_logit, eta_max), 1 + torch.sigmoid(alpha_logit))


def self_modifying_token(
    params: Params, memories: dict[str, Memory], x: Tensor, paths: list[Tensor], head: int, eta_max: float
) -> Token:
    """Eq 86-88: keys, values, rates and targets are answers of the memories themselves."""
    x_k, x_v, x_q = paths
    k = bounded(memories["k"].anchor(x_k))
    v = bounded(memories["v"].anchor(x_v))
    q = bounded(memories["q"].anchor(x_q)) if "q" in memories else x_q

    def gate(name: str, source: str) -> Tensor:
        weight, bias = params[f"gates.{name}.weight"][head], params[f"gates.{name}.bias"][head]
        return (weight * memories[source].anchor(x_k)).sum() + bias

    return Token(
        k=k,
        q=q,
        targets={name: bounded(memory.anchor(v)) for name, memory in memories.items()},
        eta=largest(eta_max, gate("alpha", "alpha")) * torch.sigmoid(gate("eta", "eta")),
        log_alpha=F.logsigmoid(gate("alpha", "alpha")),
        log_mu=F.logsigmoid(gate("mu", "eta")) if memories["memory"].S1 is not None else None,
    )


def static_token(
    params: Params, memories: dict[str, Memory], x: Tensor, paths: list[Tensor], head: int, eta_max: float
) -> Token:
    """Titans: slow projections only, the gates are linear in the layer's input."""
    k, v, q = paths

    def gate(name: str) -> Tensor:
        return (params[f"gates.{name}.weight"][head] * x).sum() + params[f"gates.{name}.bias"][head]

    return Token(
        k=k,
        q=q,
        targets={"memory": v},
        eta=largest(eta_max, gate("alpha")) * torch.sigmoid(gate("eta")),
        log_alpha=F.logsigmoid(gate("alpha")),
        log_mu=F.logsigmoid(gate("mu")) if memories["memory"].S1 is not None else None,
    )


def causal_conv(weight: Tensor | None, history: list[Tensor], p: Tensor) -> Tensor:
    """Depthwise: out_t = Σ_j w_j p_{t−K+1+j}; `history` holds the K − 1 inputs before p, oldest first."""
    if weight is None:
        return p
    out = torch.zeros_like(p)
    for j, past in enumerate([*history, p]):
        out = out + weight[:, 0, j] * past
    return out


def head_paths(activated: Tensor, head: int, num_heads: int) -> list[Tensor]:
    """[3D] -> the unit vectors x_k, x_v, x_q [d] of one head."""
    D = activated.shape[0] // 3
    d = D // num_heads
    return [unit(activated[path * D + head * d : path * D + (head + 1) * d]) for path in range(3)]


def load_head(
    params: Params, state: State | None, row: int, head: int, options: Options
) -> dict[str, Memory]:
    """The memories of one head of one row, from the initial parameters or from a state."""
    momentum = options.momentum
    memories = {}
    for n, (name, chunk) in enumerate(options.chunks.items()):
        W1, W2 = params["initial.W1"][n, head], params["initial.W2"][n, head]
        S1, S2 = (torch.zeros_like(W1), torch.zeros_like(W2)) if momentum else (None, None)
        memory = Memory(W1, W2, W1, W2, S1, S2, initial_W2=W2, chunk=chunk)
        if state is not None:
            at = (row, n, head)
            memory = replace(
                memory,
                W1=state["current"]["W1"][at],
                W2=state["current"]["W2"][at],
                anchor_W1=state["anchor"]["W1"][at],
                anchor_W2=state["anchor"]["W2"][at],
                S1=state["momentum"]["W1"][at] if momentum else None,
                S2=state["momentum"]["W2"][at] if momentum else None,
            )
        memories[name] = memory
    return memories


def stack(rows: list[list[dict[str, Memory]]], field_1: str, field_2: str) -> dict[str, Tensor]:
    """rows[b][h][name] -> {"W1": [B, N, H, d, e], "W2": [B, N, H, e, d]}."""

    def one(field: str) -> Tensor:
        per_row = []
        for heads in rows:
            per_head = [torch.stack([getattr(memory, field) for memory in head.values()]) for head in heads]
            per_row.append(torch.stack(per_head, dim=1))
        return torch.stack(per_row)

    return {"W1": one(field_1), "W2": one(field_2)}


@dataclass(frozen=True)
class Options:
    """What both layers take, and the chunk length of each memory in order."""

    chunks: dict[str, int]
    num_heads: int
    rule: str
    momentum: bool
    momentum_scaled: bool
    read: str
    eta_max: float
    conv_size: int | None
    projection_eta_max: float | None = None


@dataclass(frozen=True)
class Row:
    """The running state of one row: memories per head, K − 1 past path inputs [3D], real tokens so far."""

    heads: list[dict[str, Memory]]
    history: list[Tensor]
    position: int


def load_row(params: Params, state: State | None, row: int, options: Options) -> Row:
    heads = [load_head(params, state, row, h, options) for h in range(options.num_heads)]
    if state is not None:
        return Row(heads, list(state["conv_tail"][row]), int(state["position"][row]))
    taps = max((options.conv_size or 0) - 1, 0)
    return Row(heads, [torch.zeros_like(params["in_proj.weight"][:, 0]) for _ in range(taps)], 0)


def step(
    params: Params, row: Row, x: Tensor, make_token: MakeToken, options: Options
) -> tuple[Tensor, Tensor, Row]:
    """One real token x [D] of one row: output [D], surprise [], the row after it."""
    p = params["in_proj.weight"] @ x
    activated = F.silu(causal_conv(params.get("conv.weight"), row.history, p))
    position = row.position + 1
    reads, heads = [], []
    squared_error = torch.zeros_like(x[0])
    for h, before in enumerate(row.heads):
        paths = head_paths(activated, h, options.num_heads)
        token = make_token(params, before, x, paths, h, options.eta_max)
        error = before["memory"].anchor(token.k) - token.targets["memory"]
        squared_error = squared_error + (error * error).sum()
        after = {
            name: update(
                memory,
                at_pace(token, name, options),
                token.targets[name],
                options.rule,
                options.momentum_scaled,
            )
            for name, memory in before.items()
        }
        # A chunk read uses the weights that hold while the token is processed: before any boundary.
        y = after["memory"].now(token.q) if options.read == "token" else before["memory"].anchor(token.q)
        reads.append(y / torch.sqrt((y * y).mean() + 1e-6) * params["out_norm.weight"])
        heads.append({name: at_boundary(memory, position) for name, memory in after.items()})
    gated = torch.cat(reads) * F.silu(params["gate_proj.weight"] @ x)
    history = [*row.history, p][1:] if row.history else []
    return params["out_proj.weight"] @ gated, torch.sqrt(squared_error), Row(heads, history, position)


def at_pace(token: Token, name: str, options: Options) -> Token:
    """Of the generating memories η and log α are a share of those of the memory that is read out."""
    if name == "memory" or options.projection_eta_max is None:
        return token
    pace = options.projection_eta_max / options.eta_max
    return replace(token, eta=token.eta * pace, log_alpha=token.log_alpha * pace)


def at_boundary(memory: Memory, position: int) -> Memory:
    """After every `chunk` real tokens the anchor becomes the current weights (eq 90)."""
    if position % memory.chunk:
        return memory
    return replace(memory, anchor_W1=memory.W1, anchor_W2=memory.W2)


def run_layer(
    params: Params,
    x: Tensor,
    mask: Tensor | None,
    state: State | None,
    make_token: MakeToken,
    options: Options,
) -> tuple[Tensor, State, Tensor]:
    """All rows, one after another; a padded token is skipped: it changes nothing and its output is 0."""
    if options.read not in ("token", "chunk"):
        raise ValueError(f"read {options.read!r} is neither 'token' nor 'chunk'")
    rows, outputs, surprises = [], [], []
    for b in range(x.shape[0]):
        row = load_row(params, state, b, options)
        for t in range(x.shape[1]):
            y, surprise = torch.zeros_like(x[b, t]), torch.zeros_like(x[b, t, 0])
            if mask is None or bool(mask[b, t]):
                y, surprise, row = step(params, row, x[b, t], make_token, options)
            outputs.append(y)
            surprises.append(surprise)
        rows.append(row)
    final = state_of(rows, options, width=params["in_proj.weight"].shape[0], like=x)
    return torch.stack(outputs).view_as(x), final, torch.stack(surprises).view(x.shape[:2])


def state_of(rows: list[Row], options: Options, width: int, like: Tensor) -> State:
    heads = [row.heads for row in rows]
    no_tail = like.new_zeros(0, width)
    return {
        "current": stack(heads, "W1", "W2"),
        "anchor": stack(heads, "anchor_W1", "anchor_W2"),
        "momentum": stack(heads, "S1", "S2") if options.momentum else None,
        "position": torch.tensor([row.position % max(options.chunks.values()) for row in rows]),
        "conv_tail": torch.stack([torch.stack(row.history) if row.history else no_tail for row in rows]),
    }


def self_modifying_titans(
    params: Params,
    x: Tensor,
    *,
    num_heads: int,
    chunk_size: int,
    projection_chunk_size: int,
    eta_max: float,
    rule: str = "dgd",
    momentum: bool = False,
    momentum_scaled: bool = True,
    read: str = "token",
    adaptive_q: bool = False,
    mask: Tensor | None = None,
    conv_size: int | None = 4,
    state: State | None = None,
    projection_eta_max: float | None = None,
) -> tuple[Tensor, State, Tensor]:
    """Self-modifying Titans on x [B, T, D]; mask [B, T], True = real token.

    Returns y [B, T, D], the final state and the surprise [B, T]. The state is a dict: `current`, `anchor`
    and `momentum` (None without it) with W1 [B, N, H, d, e] and W2 [B, N, H, e, d], `position` [B] (real
    tokens modulo the larger chunk length), `conv_tail` [B, K − 1, 3D].
    """
    names = memory_names(adaptive_q)
    chunks = {name: chunk_size if name == "memory" else projection_chunk_size for name in names}
    options = Options(
        chunks, num_heads, rule, momentum, momentum_scaled, read, eta_max, conv_size, projection_eta_max
    )
    return run_layer(params, x, mask, state, self_modifying_token, options)


def titans(
    params: Params,
    x: Tensor,
    *,
    num_heads: int,
    chunk_size: int,
    eta_max: float,
    rule: str = "gd",
    momentum: bool = False,
    momentum_scaled: bool = True,
    read: str = "token",
    mask: Tensor | None = None,
    conv_size: int | None = 4,
    state: State | None = None,
) -> tuple[Tensor, State, Tensor]:
    """Titans: one memory, static projections; arguments and results as `self_modifying_titans`, N = 1."""
    options = Options(
        {"memory": chunk_size}, num_heads, rule, momentum, momentum_scaled, read, eta_max, conv_size
    )
    return run_layer(params, x, mask, state, static_token, options)


def random_params(
    hidden_size: int = 8,
    num_heads: int = 2,
    *,
    self_modifying: bool = True,
    adaptive_q: bool = False,
    momentum: bool = False,
    expansion: float = 1.0,
    conv_size: int | None = 4,
    seed: int = 0,
) -> Params:
    """Parameters by the library's names: float64, seeded, every tensor in general position.

    The biases scatter around 0 for eta, 4 for alpha and 0 for mu; the gate weights are larger than at a
    usual initialisation, so that the gates differ from token to token.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(*shape, dtype=torch.float64, generator=generator)

    D, H = hidden_size, num_heads
    d = D // H
    e = int(expansion * d)
    N = len(memory_names(adaptive_q)) if self_modifying else 1
    gate_width = d if self_modifying else D
    params = {"in_proj.weight": normal(3 * D, D, std=1 / math.sqrt(D))}
    if conv_size:
        params["conv.weight"] = normal(3 * D, 1, conv_size, std=1 / math.sqrt(conv_size))
    params["initial.W1"] = normal(N, H, d, e, std=0.5 / math.sqrt(e))
    params["initial.W2"] = normal(N, H, e, d)
    gate_bias = {"eta": 0.0, "alpha": 4.0} | ({"mu": 0.0} if momentum else {})
    for name, bias in gate_bias.items():
        params[f"gates.{name}.weight"] = normal(H, gate_width, std=0.5)
        params[f"gates.{name}.bias"] = normal(H, std=0.5, mean=bias)
    params["out_norm.weight"] = normal(d, std=0.2, mean=1.0)
    params["gate_proj.weight"] = normal(D, D, std=1 / math.sqrt(D))
    params["out_proj.weight"] = normal(D, D, std=1 / math.sqrt(D))
    return params
