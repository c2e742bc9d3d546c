"""The sequence layer made of memories: projections around one scan (spec section 3)."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.token_inputs import check_sequence
from nested_learning.memory import check, kernels
from nested_learning.memory.description import MemorySystem
from nested_learning.memory.kernels import Backend, check_backend
from nested_learning.memory.scan import (
    Boundary,
    MemoryState,
    common_boundaries,
    row_boundaries,
    scan,
    scan_token,
)
from nested_learning.memory.signals import Readouts, StepInputs
from nested_learning.memory.step import RunningWeights, Weights
from nested_learning.ops.blocks import traced
from nested_learning.ops.gated_norm import gated_norm
from nested_learning.ops.packing import RowLayout, row_layout
from nested_learning.ops.precision import full_precision
from nested_learning.ops.recompute import recomputed
from nested_learning.ops.short_conv import Heads, unit_heads

PATHS = ("k", "v", "q")
# Start of the gates: eta in the middle of its range, alpha about 0.98, mu about 0.88, width about 1.
_GATE_BIAS = {"eta": 0.0, "alpha": 4.0, "mu": 2.0, "width": 0.5}
# Tokens after which a memory has decayed to a half at that alpha, about 38.
SHORTEST_HALF_LIFE = math.log(2) / math.log1p(math.exp(-_GATE_BIAS["alpha"]))

# Numbers of one path in one chunk, of all rows that a CPU reads together (measured, docs/log.md).
ROWS = 262_144


class MemoryLayer(nn.Module):
    """A sequence layer whose state is a set of associative memories, described by a `MemorySystem`.

    Every head of every memory is a small map that learns while it reads: the forward pass writes to a
    state that goes in and comes out and never to a parameter, so rows of a batch are independent and the
    gradient flows through the writes to the initial memories, which are meta-learned.

    Args:
        hidden_size: D, the width of the input.
        num_heads: H; head width d = D / H.
        system: the memories, their rule and schedule.
        conv_size: width K of the causal depthwise convolution in front of the memories; 0 for none.
        backend: what computes a matrix memory: "torch", "fla" for the kernels of flash-linear-attention on a
            GPU, or "auto" for these where they are installed and the projections are in half precision.
        max_half_life: of what a memory holds at the start of training, in tokens: the heads' half-lives are
            spread geometrically from `SHORTEST_HALF_LIFE` to this; None gives all heads the shortest.

    Attributes:
        recompute: see `set_recompute`.
        compile_step: see `set_compile_step`.

    Raises:
        ValueError: when hidden_size is not a multiple of num_heads, conv_size is negative, or max_half_life
            is shorter than the shortest.
    """

    has_surprise: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        system: MemorySystem,
        conv_size: int = 4,
        max_half_life: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend, system)
        self.backend: Backend = backend
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}; "
                "each head needs the same whole width"
            )
        if not isinstance(conv_size, int) or isinstance(conv_size, bool) or conv_size < 0:
            raise ValueError(f"conv_size must be 0 (no convolution) or a positive integer, got {conv_size!r}")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        if max_half_life is not None and not SHORTEST_HALF_LIFE <= max_half_life < math.inf:
            raise ValueError(
                f"max_half_life must be at least {SHORTEST_HALF_LIFE:.1f} tokens, got {max_half_life!r}; "
                "leave it at None for the same half-life in all heads"
            )
        if max_half_life is not None and "alpha" not in system.gates:
            raise ValueError(
                f"max_half_life={max_half_life} starts a data-dependent retention, but this memory's is "
                f"{system.retention.decay!r}; leave it at None"
            )
        self.system, self.conv_size, self.max_half_life = system, conv_size, max_half_life
        self.recompute: str | None = None
        self.compile_step = False

        self.in_proj = nn.Linear(hidden_size, len(PATHS) * hidden_size, bias=False)
        channels = len(PATHS) * hidden_size
        self.conv = (
            nn.Conv1d(channels, channels, conv_size, groups=channels, bias=False) if conv_size else None
        )
        shapes = system.architecture.shapes(self.head_dim)
        count = len(system.memories)
        self.initial = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(count, num_heads, *shape)) for name, shape in shapes.items()}
        )
        # A gate reads a generating memory's output per head, or, where none generates it, the layer's input.
        self.gates_generated = "eta" in system.generated
        fan_in = self.head_dim if self.gates_generated else hidden_size
        self.gates = nn.ModuleDict({gate: nn.Linear(fan_in, num_heads) for gate in system.gates})
        self.out_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter (spec section 3; scales are this project's, measured)."""
        for linear in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
        if self.conv is not None:
            nn.init.normal_(self.conv.weight, std=self.conv_size**-0.5)
        scale = self.head_dim**0.5 if self.gates_generated else 1.0
        for name in self.system.gates:
            gate = self._gate(name)
            nn.init.normal_(gate.weight, std=0.02 * scale)
            nn.init.constant_(gate.bias, _GATE_BIAS[name])
        if self.max_half_life is not None:
            self._gate("alpha").bias.copy_(_spread_bias(self.num_heads, self.max_half_life))
        nn.init.ones_(self.out_norm.weight)
        self.system.architecture.init_(dict(self.initial.items()), self.system.retention)

    def extra_repr(self) -> str:
        s = self.system
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, memories={'/'.join(s.memories)}, "
            f"chunk_size={s.chunk_size}, projection_chunk_size={s.projection_chunk_size}, read={s.read!r}, "
            f"momentum={s.momentum}"
        )

    def forward(
        self,
        x: Tensor,
        state: MemoryState | None = None,
        mask: Tensor | None = None,
        return_surprise: bool = False,
    ) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, Tensor]:
        """Read a sequence, learning from it.

        Args:
            x: [B, T, hidden_size], any floating dtype. The memories run in float32 (float64 for float64).
            state: from an earlier call on the same rows; None starts from the initial memories.
            mask: [B, T] bool, True = real token. A padded token changes nothing and its output is zero.
            return_surprise: also return [B, T], the error ‖M(k) − v̂‖ of the memory that is read out,
                over all heads, at its anchor (detached; zero for padding).

        Returns: y [B, T, hidden_size] in x's dtype (that of the autocast region, if one is active), the
            state after the sequence, and the surprise if asked for.

        Raises:
            ValueError: when x, mask or state do not fit.
        """
        self._check(x, state, mask)
        size = self._rows_at_once(x)
        if size == len(x):
            y, surprise, state = self._read_rows(x, state, mask, return_surprise)
        else:
            ys, surprises, states = [], [], []
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                before = None if state is None else state.slice_rows(rows)
                some = self._read_rows(x[rows], before, None if mask is None else mask[rows], return_surprise)
                ys.append(some[0])
                surprises.append(some[1])
                states.append(some[2])
            y, state = torch.cat(ys), MemoryState.join_rows(states)
            surprise = torch.cat([s for s in surprises if s is not None]) if return_surprise else None
        if surprise is not None:
            return y, state, surprise
        return y, state

    def recall(self, q: Tensor, state: MemoryState | None = None) -> Tensor:
        """Read the memory at its anchor, the weights of the last chunk boundary, without writing.

        Args:
            q: [B, H, T, head_dim] queries, float32 or float64; L2-normalise them where the memory's are.
            state: from a call on the same rows; None for the initial memories.

        Returns: M(q) [B, H, T, head_dim].
        """
        weights = self._start(state, q.shape[0], q.dtype).anchor
        fixed = {name: self.system.retention.weights(A)[:, -1] for name, A in weights.items()}
        if self.system.transposed:
            fixed = {name: W.mT for name, W in fixed.items()}
        return self.system.architecture.read(q, lambda name, x: x @ fixed[name].mT)

    def initial_weights(self, batch_size: int, dtype: torch.dtype) -> Weights:
        """The meta-learned initial memories for each row of a batch, per matrix [B, N, H, out, in].

        Copies, not views: they become a state, which the next optimizer step must not reach.
        """
        return {name: W.to(dtype).expand(batch_size, *W.shape).clone() for name, W in self.initial.items()}

    def _gate(self, name: str) -> nn.Linear:
        gate = self.gates[name]
        assert isinstance(gate, nn.Linear)
        return gate

    def _check(self, x: Tensor, state: MemoryState | None, mask: Tensor | None) -> None:
        check_sequence(x, self.hidden_size, mask, self.in_proj.weight)
        if state is not None:
            self._check_state(state, x.shape[0])

    def _check_state(self, state: MemoryState, rows: int) -> None:
        if not isinstance(state, MemoryState):
            raise ValueError(
                f"state must be a MemoryState, got {type(state).__name__}: it is another layer's"
            )
        if state.position.shape[0] != rows:
            raise ValueError(f"state holds {state.position.shape[0]} rows, x has {rows}")
        devices = {tensor.device for tensor in state.tensors()}
        if devices != {self.in_proj.weight.device}:
            raise ValueError(
                f"state is on {', '.join(sorted(map(str, devices)))}, the layer on "
                f"{self.in_proj.weight.device}; move it with state.to(device)"
            )
        if check.enabled():
            check.check_values("state", **state.to_tensors())
        memories = {name: tuple(W.shape) for name, W in self.initial.items()}
        expected: dict[str, object] = {
            "anchor": memories,
            "current": memories,
            "momentum": memories if self.system.momentum else None,
            "conv_tail": (self.conv_size - 1, len(PATHS) * self.hidden_size) if self.conv_size else None,
        }
        for name, wanted in expected.items():
            got = _shapes_per_row(getattr(state, name))
            if got != wanted:
                raise ValueError(
                    f"state.{name} has shapes {got} per row, this layer's {wanted}: the state belongs to a "
                    "layer with other options"
                )

    def _rows_at_once(self, x: Tensor) -> int:
        """Rows that are read together: on a CPU as many as stay in its caches, in groups of like size."""
        if x.device.type != "cpu" or traced() or not len(x):
            return len(x)
        most = max(1, ROWS // (min(x.shape[1], self.system.step) * self.hidden_size))
        groups = -(-len(x) // most)
        return -(-len(x) // groups)

    def _read_rows(
        self, x: Tensor, state: MemoryState | None, mask: Tensor | None, want_surprise: bool
    ) -> tuple[Tensor, Tensor | None, MemoryState]:
        if state is not None and x.shape[1] == 1:
            return self._read_token(x, state, mask, want_surprise)
        return self._read_sequence(x, state, mask, want_surprise)

    def _read_sequence(
        self, x: Tensor, state: MemoryState | None, mask: Tensor | None, want_surprise: bool
    ) -> tuple[Tensor, Tensor | None, MemoryState]:
        """`forward` over a sequence, in one segment, or in several that the backward pass runs again."""
        B, T, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        tail = None if state is None else state.conv_tail
        if state is None and mask is None:
            layout, filled = None, None
            boundary = common_boundaries(self.system, x.device)
            position = torch.full((B,), T % self.system.period, dtype=torch.long, device=x.device)
        else:
            layout = self._layout(x, state, mask)
            x, filled = layout.pack(x), layout.filled
            boundary = row_boundaries(self.system, layout.offset, layout.end)
            position = layout.end % self.system.period
        weights, history = self._start(state, B, dtype), None
        outputs, surprises = [], []
        size = self._segment_size(x.shape[1])
        segments = x.split(size, dim=1)
        for index, columns in enumerate(segments):
            start = index * size
            segment = Segment(
                columns,
                None if filled is None else filled[:, start : start + size],
                _shifted(boundary, start),
                history,
                start,
            )
            arguments = (segment, weights, tail, layout, want_surprise)
            if len(segments) == 1:
                read = self._read_segment(*arguments)
            else:
                read = recomputed(self._read_segment, arguments, list(self.parameters()))
            y, surprise, weights, history, tail = read
            outputs.append(y)
            surprises.append(None if surprise is None else surprise.detach())
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        surprise = torch.cat([s for s in surprises if s is not None], dim=1) if want_surprise else None
        if layout is not None:
            y = layout.unpack(y)
            surprise = None if surprise is None else layout.unpack(surprise)
        return y, surprise, MemoryState(*weights, position=position, conv_tail=tail)

    def _segment_size(self, columns: int) -> int:
        """Columns of one segment, whole chunks of every memory: √n of n chunks where they are recomputed."""
        chunk = max(self.system.chunk_sizes)
        # the checks count chunks from the start of the sequence
        if self.recompute is None or not torch.is_grad_enabled() or columns <= chunk or check.enabled():
            return max(columns, 1)
        return chunk * math.isqrt(math.ceil(columns / chunk))

    def _read_segment(
        self,
        segment: Segment,
        start: RunningWeights,
        tail: Tensor | None,
        layout: RowLayout | None,
        want_surprise: bool,
    ) -> tuple[Tensor, Tensor | None, RunningWeights, Tensor | None, Tensor | None]:
        """y [B, C, D], surprise [B, C], the weights after, and the convolution's history and tail for the
        next segment and the next call."""
        x = segment.x
        dtype = torch.promote_types(x.dtype, torch.float32)
        paths, gate, logits = self._project(x)
        with full_precision(x.device):
            weight = None if self.conv is None else self.conv.weight.to(dtype)
            paths, before, history, tail = self._histories(paths.to(dtype), segment, tail, layout)
            inputs = self._inputs(paths, before, weight, logits, segment.filled)
            surprise = None
            if not want_surprise and kernels.applies(self.backend, self.system, x.device, gate.dtype):
                y, after = kernels.run(self.system, start, inputs, gate.dtype)
            else:
                y, surprise, after = scan(
                    self.system,
                    self._retained(dtype),
                    start,
                    inputs,
                    self._readouts(dtype),
                    segment.boundary,
                    want_surprise,
                    self.compile_step,
                    operands=_operands(gate.dtype),
                )
            y = self._gated(y.transpose(1, 2), gate)
        return self.out_proj(y), surprise, after, history, tail

    def _read_token(
        self, x: Tensor, state: MemoryState, mask: Tensor | None, want_surprise: bool
    ) -> tuple[Tensor, Tensor | None, MemoryState]:
        """One token for each row, wherever its row stands inside its chunk: a step of length one."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        paths, gate, logits = self._project(x)
        with full_precision(x.device):
            paths, tail = self._convolve_token(paths.to(dtype), state.conv_tail, mask)  # [B, 1, 3D]
            y, surprise, state = self._scan_token(paths, logits, state, tail, mask, want_surprise)
            y = self._gated(y, gate)
        return self.out_proj(y), surprise, state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v and q [B, T, 3D], the output gate [B, T, D], the logits [B, T, gates, H] of static gates."""
        logits = None
        if not self.gates_generated and self.system.gates:
            logits = self._static_gates(x).to(torch.promote_types(x.dtype, torch.float32))
        return self.in_proj(x), self.gate_proj(x), logits

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """[B, T, H, d] -> [B, T, D]"""
        assert self.out_norm.eps is not None  # __init__
        return gated_norm(y, gate, self.out_norm.weight.to(y.dtype), self.out_norm.eps)

    def _scan_token(
        self,
        paths: Tensor,
        logits: Tensor | None,
        state: MemoryState,
        tail: Tensor | None,
        mask: Tensor | None,
        want_surprise: bool,
    ) -> tuple[Tensor, Tensor | None, MemoryState]:
        """One token for each row, wherever its row stands inside its chunk: a step of length one."""
        real = torch.ones_like(state.position) if mask is None else mask[:, 0].long()
        end = state.position + real
        moved: bool | Tensor = True
        if not self.system.exact:
            completes = {size: end % size == 0 for size in set(self.system.chunk_sizes)}
            sizes = self.system.chunk_sizes if len(completes) > 1 else self.system.chunk_sizes[:1]
            moved = torch.stack([completes[size] for size in sizes], dim=1)  # [B, N or 1]
            moved = moved if mask is None else moved & mask
        y, surprise, after = scan_token(
            self.system,
            self._retained(paths.dtype),
            self._start(state, paths.shape[0], paths.dtype),
            self._inputs(paths, None, None, logits, mask),
            self._readouts(paths.dtype),
            moved,
            want_surprise,
        )
        if mask is not None:
            y = y * mask[:, None, :, None]
            surprise = None if surprise is None else surprise * mask
        new = MemoryState(*after, position=end % self.system.period, conv_tail=tail)
        return y.transpose(1, 2), surprise, new

    def _start(self, state: MemoryState | None, batch_size: int, dtype: torch.dtype) -> RunningWeights:
        """What the scan starts from."""
        if state is None:
            weights = self.initial_weights(batch_size, dtype)
            return RunningWeights(weights, weights, None)
        if any(W.dtype != dtype for W in state.current.values()):  # from a session in another
            state = state.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        return RunningWeights(state.anchor, state.current, state.momentum)

    def _retained(self, dtype: torch.dtype) -> Weights:
        return {name: W.to(dtype) for name, W in self.initial.items()}

    def _static_gates(self, x: Tensor) -> Tensor:
        """Logits [B, T, gates, H] of gates that are linear in x, by one product."""
        gates = [self._gate(name) for name in self.system.gates]
        weight, bias = torch.cat([gate.weight for gate in gates]), torch.cat([gate.bias for gate in gates])
        return F.linear(x, weight, bias).unflatten(-1, (len(gates), self.num_heads))

    def _readouts(self, dtype: torch.dtype) -> Readouts | None:
        if not self.gates_generated:
            return None
        gates = [self._gate(name) for name in self.system.gates]
        return Readouts(
            torch.stack([gate.weight for gate in gates]).to(dtype),
            torch.stack([gate.bias for gate in gates]).to(dtype),
        )

    def _inputs(
        self,
        paths: Tensor,  # [B, T, 3D]
        history: Tensor | None,  # [B, K−1, 3D], zeros if None
        weight: Tensor | None,  # of the convolution, None where it is done or there is none
        logits: Tensor | None,
        write: Tensor | None,
    ) -> StepInputs:
        heads = Heads(tuple(name in self.system.unit for name in PATHS), self.num_heads)
        vectors = unit_heads(paths, history, weight, heads)  # each [B, H, T, d]
        gates = None if logits is None else logits.permute(2, 0, 3, 1)  # [gates, B, H, T]
        return StepInputs(dict(zip(PATHS, vectors, strict=True)), gates, write)

    def _layout(self, x: Tensor, state: MemoryState | None, mask: Tensor | None) -> RowLayout:
        B, T, _ = x.shape
        if mask is None:
            mask = torch.ones(B, T, dtype=torch.bool, device=x.device)
        if state is None:
            return row_layout(mask, torch.zeros(B, dtype=torch.long, device=x.device), T)
        return row_layout(mask, state.position, self.system.period - 1 + T)

    def _histories(
        self, paths: Tensor, segment: Segment, tail: Tensor | None, layout: RowLayout | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The inputs of a segment; the K−1 before it, before the next segment, and before the next call."""
        if self.conv is None:
            return paths, None, None, None
        length = self.conv_size - 1
        history = segment.history
        if layout is None:
            # A copy, as a view would keep the inputs of the whole segment.
            after = paths[:, max(0, paths.shape[1] - length) :].clone()
            if after.shape[1] < length:
                zeros = after.new_zeros(len(after), length, after.shape[2])
                front = zeros if history is None else history
                after = torch.cat([front[:, after.shape[1] :], after], dim=1)
            return paths, history, after, after
        # column c of paths is column length + c
        padded = F.pad(paths, (0, 0, length, 0)) if history is None else torch.cat([history, paths], dim=1)
        columns = torch.arange(length, device=paths.device).unsqueeze(0)
        if tail is not None and history is None:
            before = _over_channels(columns + layout.offset.unsqueeze(1), paths)  # empty so far
            padded = padded.scatter_add(1, before, tail.to(paths.dtype))
        end = layout.end - segment.start
        here = _over_channels(columns + end.clamp(0, paths.shape[1]).unsqueeze(1), paths)
        found = padded.gather(1, here)
        if history is not None:
            assert tail is not None  # found in the first segment, if nothing else
            found = torch.where((end > 0)[:, None, None], found, tail)
        after = padded[:, padded.shape[1] - length :].clone()
        return padded[:, length:], padded[:, :length], after, found

    def _convolve_token(
        self, paths: Tensor, tail: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution at one token [B, 1, 3D] with its history."""
        if self.conv is None:
            return paths, None
        assert tail is not None  # a layer with a convolution always returns one
        tail = tail.to(paths.dtype)
        window = torch.cat([tail, paths], dim=1)  # [B, K, 3D]
        after = window[:, 1:] if mask is None else torch.where(mask.unsqueeze(-1), window[:, 1:], tail)
        weight = self.conv.weight.to(paths.dtype).squeeze(1).T  # [K, 3D]
        return (window * weight).sum(1, keepdim=True), after


class Segment(NamedTuple):
    """Columns of a sequence that are read at once; all chunk lengths divide the column it starts at."""

    x: Tensor  # [B, C, D]
    filled: Tensor | None  # [B, C] which columns hold a token, None for all
    boundary: Boundary  # of this segment's columns
    history: Tensor | None  # [B, K−1, 3D] the inputs of the convolution before it, None for the first
    start: int  # its first column


def _operands(dtype: torch.dtype) -> torch.dtype | None:
    """What factors are rounded to in a model, or an autocast region, of this precision.

    float16 is left out: gradients that pass through a chunk do not fit its range.
    """
    return dtype if dtype == torch.bfloat16 else None


def _shifted(boundary: Boundary, start: int) -> Boundary:
    """The same boundaries with columns counted from `start`."""
    return lambda column: boundary(start + column)


def set_recompute(module: nn.Module, how: str | None) -> int:
    """What the backward pass through the memory layers of a module recomputes; returns how many there are.

    Args:
        how: None keeps all that it needs; "chunk" keeps the input and the memories' weights before every
            √n-th of n chunks and computes the rest again: less memory for about a third more time. No
            result changes.

    Raises:
        ValueError: for another value of `how`.
    """
    if how not in (None, "chunk"):
        raise ValueError(f"recompute must be None or 'chunk', got {how!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, MemoryLayer)]
    for layer in layers:
        layer.recompute = how
    return len(layers)


def _spread_bias(num_heads: int, longest: float) -> Tensor:
    """Biases b [H] with half-lives of sigmoid(b) from the shortest to `longest`, in equal ratios."""
    steps = torch.linspace(0, 1, num_heads, dtype=torch.float64)
    half_lives = SHORTEST_HALF_LIFE * (longest / SHORTEST_HALF_LIFE) ** steps
    log_alpha = -math.log(2) / half_lives
    return log_alpha - torch.log(-torch.expm1(log_alpha))  # the logit of alpha


def _shapes_per_row(value: Tensor | Weights | None) -> object:
    """The shapes of a state's field without its batch dimension."""
    if isinstance(value, dict):
        return {name: tuple(tensor.shape[1:]) for name, tensor in value.items()}
    return None if value is None else tuple(value.shape[1:])


def _over_channels(index: Tensor, like: Tensor) -> Tensor:
    """[B, C] -> [B, C, channels] for gather and scatter along the tokens."""
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def set_compile_step(module: nn.Module, compiled: bool) -> int:
    """Whether the memory layers of a module run the step of a chunk through torch.compile; returns how many
    there are.

    It is of use where no fused run or kernel covers the memory, as for TTT-MLP and the MIRAS rows; see
    docs/log.md for what it gains and what compiling costs. No result changes beyond rounding. One graph
    serves every chunk and every length of a sequence; another batch size or precision makes another. Without
    a working compiler there is one warning, and the step runs plainly.

    Raises:
        ValueError: when `compiled` is not True or False.
    """
    if not isinstance(compiled, bool):
        raise ValueError(f"compile_step must be True or False, got {compiled!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, MemoryLayer)]
    for layer in layers:
        layer.compile_step = compiled
    return len(layers)
