"""The sequence layer made of memories: projections around one run of their system (spec section 3)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nested_learning.layers.effective import effective, effective_gain, effective_kernel, held
from nested_learning.layers.initial_memories import InitialMemories
from nested_learning.layers.memory.history import packed_history
from nested_learning.layers.token_inputs import (
    RMSNorm,
    check_sequence,
    find_documents,
    is_plain,
    without_padding,
)
from nested_learning.memory import check, engine
from nested_learning.memory.engines.fla import Backend, check_backend
from nested_learning.memory.running import Boundaries, How, Inputs, MemoryState, Readouts
from nested_learning.memory.state import Weights
from nested_learning.memory.system import MemorySystem
from nested_learning.ops.context import full_precision, one_operator, traced
from nested_learning.ops.documents import Documents
from nested_learning.ops.heads import Heads, conv_std, gated_norm, last_inputs, unit_heads
from nested_learning.ops.packing import RowLayout, row_layout
from nested_learning.ops.recompute import recomputed

PATHS = ("k", "v", "q")
NORM_EPS = 1e-6  # of the norm over a head's outputs
# Start of the gates: eta in the middle of its range, alpha about 0.98, mu about 0.88, width about 1.
_GATE_BIAS = {"eta": 0.0, "alpha": 4.0, "mu": 2.0, "width": 0.5}
# Tokens after which a memory has decayed to a half at that alpha, about 38.
SHORTEST_HALF_LIFE = math.log(2) / math.log1p(math.exp(-_GATE_BIAS["alpha"]))

# Numbers of one path in one chunk, of all rows that a CPU reads together (measured, docs/log.md).
ROWS = 262_144
# Tokens to which the lengths of documents are rounded up where chunks do not count (measured, docs/log.md).
EXACT_STEP = 16


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
        max_half_life: longest half-life of a memory's content at the start of training, in tokens: the heads'
            half-lives are spread geometrically from `SHORTEST_HALF_LIFE` to this; None gives all heads the
            shortest.
        backend: library that computes a matrix memory: "torch", "fla" for the kernels of
            flash-linear-attention on a GPU, or "auto" for these where they are installed and the projections
            are in half precision.

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
        _check_half_life(max_half_life, system)
        self.system, self.conv_size, self.max_half_life = system, conv_size, max_half_life
        self.recompute: str | None = None
        self.compile_step = False

        channels = len(PATHS) * hidden_size
        self.in_proj = nn.Linear(hidden_size, channels, bias=False)
        self.conv = (
            nn.Conv1d(channels, channels, conv_size, groups=channels, bias=False) if conv_size else None
        )
        shapes = system.architecture.shapes(self.head_dim)
        count = len(system.memories)
        memories = {name: (count, num_heads, *shape) for name, shape in shapes.items()}
        self.initial = InitialMemories(
            {name: nn.Parameter(torch.empty(shape)) for name, shape in memories.items()}
        )
        self._state_shapes = {  # per row
            "anchor": memories,
            "current": memories,
            "momentum": memories if system.momentum else None,
            "conv_tail": (conv_size - 1, channels) if conv_size else None,
        }
        # A gate reads a generating memory's output per head, or, where none generates it, the layer's input.
        self.gates_generated = "eta" in system.generated
        fan_in = self.head_dim if self.gates_generated else hidden_size
        self.gates = nn.ModuleDict({gate: nn.Linear(fan_in, num_heads) for gate in system.gates})
        self.out_norm = RMSNorm(self.head_dim, eps=NORM_EPS)
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter (spec section 3; scales are this project's, measured)."""
        for linear in (self.in_proj, self.gate_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.5 * linear.in_features**-0.5)
        if self.conv is not None:
            nn.init.normal_(self.conv.weight, std=conv_std(self.conv_size))
        scale = self.head_dim**0.5 if self.gates_generated else 1.0
        for name in self.system.gates:
            gate = cast(nn.Linear, self.gates[name])
            nn.init.normal_(gate.weight, std=0.02 * scale)
            nn.init.constant_(gate.bias, _GATE_BIAS[name])
            if name == "alpha" and self.max_half_life is not None:
                gate.bias.copy_(_spread_bias(self.num_heads, self.max_half_life))
        nn.init.ones_(self.out_norm.weight)
        self.system.architecture.init_(dict(self.initial.items()), self.system.retention)

    def part_names(self) -> dict[str, str]:
        """Handles of the parts; see `nested_learning.parts`."""
        return {"": "projections", "initial": "initial", "gates": "gates"}

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
        documents: Tensor | Documents | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, Tensor]:
        """Read a sequence, or several documents in a row, learning from it.

        Args:
            x: [B, T, hidden_size], any floating dtype. The memories run in float32 (float64 for float64).
            state: from an earlier call on the same rows; None starts from the initial memories.
            mask: [B, T] bool, True = real token. A padded token changes nothing and its output is zero.
            return_surprise: also return [B, T], the error ‖M(k) − v̂‖ of the memory that is read out,
                over all heads, at its anchor (detached; zero for padding).
            documents: [B, T] or [1, T] int, constant within a document and another in the next one. Each is
                read as if it stood in a row of its own, but a row's first goes on with its state. Or a
                `Documents`, which other layers of the same call share.
            position_ids: [B, T] or [1, T] int, another way to say it: a real token at position 0 begins a
                document, also where it is its row's first and there is a state.

        Returns: y [B, T, hidden_size] in x's dtype (that of the autocast region, if one is active), the
            state after the sequence, or after the last document of each row (None with a `Documents` that
            does not keep it), and the surprise if asked for.

        Raises:
            ValueError: when x, mask, state, documents or position_ids do not fit.
        """
        check_sequence(x, self.hidden_size, mask, self.in_proj)
        if state is not None:
            self.check_state(state, x)
        packed = None
        if documents is not None or position_ids is not None:
            packed = find_documents(x, mask, state is not None, documents, position_ids)
        if packed is None:
            y, state, surprise = self._read(x, state, mask, return_surprise)
        else:
            y, state, surprise = self.read_documents(x, state, packed, return_surprise)
        return (y, state) if surprise is None else (y, state, surprise)

    def read_documents(
        self,
        x: Tensor,
        state: MemoryState | None,
        documents: Documents,
        want_surprise: bool,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """`forward` on documents in a row, in front of which may stand a prefix.

        Args:
            prefix: [P, hidden_size], tokens that are read in front of every document that begins.
        """

        def read(
            x: Tensor, state: MemoryState | None, real: Tensor | None, aligned: bool
        ) -> tuple[tuple[Tensor, Tensor | None], MemoryState]:
            y, after, surprise = self._read(x, state, real, want_surprise, aligned)
            return (y, surprise), after

        # Chunks of an exact memory are a matter of cost alone: a document may end within one.
        step = max(self.system.chunk_sizes)
        step = min(step, EXACT_STEP) if self.system.exact else step
        (y, surprise), after = documents.read(read, x, state, step, prefix)
        return y, after, surprise

    def recall(self, q: Tensor, state: MemoryState | None = None) -> Tensor:
        """Read the memory at its anchor, the weights of the last chunk boundary, without writing.

        Args:
            q: [B, H, T, head_dim] queries, float32 or float64; L2-normalise them where the memory's are.
            state: from a call on the same rows; None for the initial memories.

        Returns: M(q) [B, H, T, head_dim].
        """
        rows = torch.zeros(len(q), dtype=torch.long, device=q.device)
        weights = self._start(state, rows, q.dtype).anchor
        fixed = {name: self.system.retention.weights(A)[:, -1] for name, A in weights.items()}
        if self.system.objective.transposed:
            fixed = {name: W.mT for name, W in fixed.items()}
        return self.system.architecture.read(q, lambda name, x: x @ fixed[name].mT)

    def initial_weights(self, batch_size: int, dtype: torch.dtype) -> Weights:
        """The meta-learned initial memories for each row of a batch, per matrix [B, N, H, out, in].

        Copies, not views: they become a state, which the next optimizer step must not reach.
        """
        return {n: W.to(dtype).expand(batch_size, *W.shape).clone() for n, W in self._initial().items()}

    def _initial(self) -> Weights:
        """The initial memories of all rows, per matrix [N, H, out, in]."""
        return cast(Weights, self.initial._parameters) if is_plain(self.initial) else held(self.initial)

    # One call: place the tokens, then per segment prepare, run, finish ------------------------------------

    def _read(
        self,
        x: Tensor,
        state: MemoryState | None,
        real: Tensor | None,
        want_surprise: bool,
        aligned: bool = False,
    ) -> tuple[Tensor, MemoryState, Tensor | None]:
        """`forward` on rows, of which a CPU reads together as many as stay in its caches from chunk to chunk.

        Args:
            aligned: all rows stand at a boundary of every memory.
        """
        if x.device.type == "cpu" and not traced():  # elsewhere sizes may be symbols
            work = min(x.shape[1], self.system.step) * self.hidden_size  # numbers of a row's path in a chunk
            if len(x) > (most := max(1, ROWS // work)):
                return self._read_in_groups(x, state, real, want_surprise, aligned, most)
        place = self._place(x, state, real, aligned)
        start = self._start(state, place.position, torch.promote_types(x.dtype, torch.float32))
        chunk = max(self.system.chunk_sizes)
        # The checks count chunks from the start of the sequence; an operator recomputes by itself.
        whole = self.recompute is None or check.enabled() or one_operator()
        if not whole and torch.is_grad_enabled() and place.x.shape[1] > chunk:
            y, after, surprise = self._read_recomputed(place, start, want_surprise)
        else:
            y, after, surprise, _ = self._read_segment(place, start, None, want_surprise)
        if place.layout is not None:
            y = place.layout.unpack(y)
            surprise = None if surprise is None else place.layout.unpack(surprise)
        elif real is not None:
            y = y.masked_fill(~real.unsqueeze(-1), 0)
            surprise = None if surprise is None else surprise * real
        return y, after, surprise

    def _read_in_groups(
        self,
        x: Tensor,
        state: MemoryState | None,
        real: Tensor | None,
        want_surprise: bool,
        aligned: bool,
        most: int,
    ) -> tuple[Tensor, MemoryState, Tensor | None]:
        """`_read` on groups of equal size, of at most so many rows."""
        size = -(-len(x) // -(-len(x) // most))
        ys, states, surprises = [], [], []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            before = None if state is None else state.slice_rows(rows)
            filled = None if real is None else real[rows]
            y, after, surprise = self._read(x[rows], before, filled, want_surprise, aligned)
            ys.append(y)
            states.append(after)
            surprises.append(surprise)
        joined = torch.cat([s for s in surprises if s is not None]) if want_surprise else None
        return torch.cat(ys), MemoryState.join_rows(states), joined

    def _read_recomputed(
        self, place: Place, state: MemoryState, want_surprise: bool
    ) -> tuple[Tensor, MemoryState, Tensor | None]:
        """`_read_segment` on segments of √n of n chunks, each computed again by the backward pass."""
        chunk = max(self.system.chunk_sizes)
        size = chunk * math.isqrt(math.ceil(place.x.shape[1] / chunk))
        history, ys, surprises = None, [], []
        for segment in place.segments(size):
            arguments = (segment, state, history, want_surprise)
            y, state, surprise, history = recomputed(self._read_segment, arguments, list(self.parameters()))
            ys.append(y)
            surprises.append(surprise)
        joined = torch.cat([s.detach() for s in surprises if s is not None], 1) if want_surprise else None
        return torch.cat(ys, dim=1), state, joined

    def _read_segment(
        self, place: Place, state: MemoryState, history: Tensor | None, want_surprise: bool
    ) -> tuple[Tensor, MemoryState, Tensor | None, Tensor | None]:
        """Prepare, run, finish: y [B, C, D], the state after the segment, the surprise [B, C], and the next
        segment's history."""
        x, dtype = place.x, next(iter(state.current.values())).dtype
        paths, gate, (logits, readouts) = self.in_proj(x), self.gate_proj(x), self._gates(x, dtype)
        how = How(self.backend, gate.dtype, want_surprise, self.compile_step, self.recompute is not None)
        with full_precision(x.device):
            vectors, tail, history = self._prepare(paths.to(dtype), place, state.conv_tail, history)
            inputs = Inputs(vectors, logits, readouts, place.real)
            state = MemoryState(state.anchor, state.current, state.momentum, state.position, tail)
            initial = {name: W.to(dtype) for name, W in self._initial().items()}
            y, state, surprise = engine.run(self.system, initial, state, inputs, place.boundaries, how)
            norm = self.out_norm
            gain = norm.weight if is_plain(norm) else effective_gain(norm, self.head_dim, x)
            y = gated_norm(y.transpose(1, 2), gate, gain.to(dtype), NORM_EPS)
        return self.out_proj(y), state, surprise, history

    def _prepare(
        self, paths: Tensor, place: Place, tail: Tensor | None, history: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """From projections [B, C, 3D] to the memories' inputs, by path [B, H, C, d].

        Also returns the convolution's tail after the segment, and the columns before the next segment (of
        rows that are packed; elsewhere they are the tail).
        """
        before, weight, length = None, None, self.conv_size - 1
        if self.conv is not None:
            kernel = self.conv.weight if is_plain(self.conv) else effective_kernel(self.conv, paths)
            weight = kernel.to(paths.dtype)
            if place.layout is not None:
                first = int(place.boundaries.first)
                paths, before, tail, history = packed_history(
                    paths, place.layout, first, length, tail, history
                )
            else:
                before, tail = tail, last_inputs(tail, paths, length)
                if before is not None and place.real is not None:  # one token, which may be padding
                    tail = torch.where(place.real.unsqueeze(-1), tail, before)
        heads = Heads(tuple(name in self.system.unit for name in PATHS), self.num_heads)
        vectors = unit_heads(paths, before, weight, heads)
        return dict(zip(PATHS, vectors, strict=True)), tail, history

    def _gates(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Readouts | None]:
        """Sources of the gates: logits [gates, B, H, C] that are linear in x, or readouts of memories."""
        if not self.system.gates:
            return None, None
        gates = cast(list[nn.Linear], [self.gates[name] for name in self.system.gates])
        plain = all(is_plain(gate) for gate in gates)
        if self.gates_generated:
            pairs = [(gate.weight, gate.bias) if plain else effective(gate, x) for gate in gates]
            weights, biases = (torch.cat(cast("list[Tensor]", part)) for part in zip(*pairs, strict=True))
            shape = len(gates), self.num_heads
            return None, Readouts(weights.to(dtype).view(*shape, -1), biases.to(dtype).view(shape))
        if plain:
            logits = F.linear(x, torch.cat([g.weight for g in gates]), torch.cat([g.bias for g in gates]))
        else:
            logits = torch.cat([gate(x) for gate in gates], -1)
        logits = logits.to(dtype)  # [B, C, gates · H]
        return logits.unflatten(-1, (len(gates), self.num_heads)).permute(2, 0, 3, 1), None

    # Where the tokens stand, what they start from -----------------------------------------------------------

    def _place(self, x: Tensor, state: MemoryState | None, real: Tensor | None, aligned: bool) -> Place:
        """The columns that the memories read, and where their chunks end."""
        B, T, _ = x.shape
        period = self.system.period
        aligned = aligned or state is None
        if aligned and real is None:
            position = torch.full((B,), T % period, dtype=torch.long, device=x.device)
            return Place(x, None, Boundaries(common=True), position)
        if state is not None and T == 1:
            x = x if real is None else without_padding(x, real)
            end = state.position + (1 if real is None else real[:, 0])
            boundaries = Boundaries(False, state.position, end=None if real is None else end)
            return Place(x, real, boundaries, end % period)
        if real is None:
            real = torch.ones(B, T, dtype=torch.bool, device=x.device)
        if state is None or aligned:
            layout = row_layout(real, torch.zeros(B, dtype=torch.long, device=x.device), T)
        else:
            layout = row_layout(real, state.position, period - 1 + T)
        boundaries = Boundaries(False, 0, layout.offset, layout.end)
        return Place(layout.pack(x), layout.real, boundaries, layout.end % period, layout)

    def _start(self, state: MemoryState | None, position: Tensor, dtype: torch.dtype) -> MemoryState:
        """The state that the run starts from, with the `position` that it will end at."""
        if state is None:
            weights = self.initial_weights(position.shape[0], dtype)
            return MemoryState(weights, weights, None, position)
        if torch.is_grad_enabled():
            state = state.recordable()
        if any(W.dtype != dtype for W in state.current.values()):  # from a session in another precision
            state = state.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        return MemoryState(state.anchor, state.current, state.momentum, position, state.conv_tail)

    def check_state(self, state: MemoryState, x: Tensor) -> None:
        """ValueError where a state does not fit the layer or the rows of x."""
        if not isinstance(state, MemoryState):
            raise ValueError(
                f"state must be a MemoryState, got {type(state).__name__}: it is another layer's"
            )
        if state.position.shape[0] != len(x):
            raise ValueError(f"state holds {state.position.shape[0]} rows, x has {len(x)}")
        elsewhere = {t.device for t in (state.position, *state.current.values())} - {x.device}
        if elsewhere:
            raise ValueError(
                f"state is on {', '.join(sorted(map(str, elsewhere)))}, the layer on {x.device}; move it "
                "with state.to(device)"
            )
        if check.enabled():
            check.check_values("state", **state.to_tensors())
        for name, wanted in self._state_shapes.items():
            kept: Tensor | Weights | None = getattr(state, name)
            got: object = None
            if isinstance(kept, dict):
                got = {matrix: tuple(tensor.shape[1:]) for matrix, tensor in kept.items()}
            elif kept is not None:
                got = tuple(kept.shape[1:])
            if got != wanted:
                raise ValueError(
                    f"state.{name} has shapes {got} per row, this layer's {wanted}: the state belongs to a "
                    "layer with other options"
                )


class Place(NamedTuple):
    """The columns of a call, or of one segment of it: where each row's tokens stand."""

    x: Tensor  # [B, C, D]
    real: Tensor | None  # [B, C] bool, False = a column without a token; None: there is none
    boundaries: Boundaries  # counted from the first column
    position: Tensor  # [B] of the state after the call
    layout: RowLayout | None = None  # where the rows' tokens were packed to; None: they stand as they came

    def segments(self, size: int) -> list[Place]:
        """Cut into segments of `size` columns, of which all chunk lengths are divisors."""
        if size >= self.x.shape[1]:
            return [self]
        xs = self.x.split(size, dim=1)
        reals = (None,) * len(xs) if self.real is None else self.real.split(size, dim=1)
        return [
            Place(x, real, self.boundaries._replace(first=i * size), self.position, self.layout)
            for i, (x, real) in enumerate(zip(xs, reals, strict=True))
        ]


def _check_half_life(longest: float | None, system: MemorySystem) -> None:
    if longest is None:
        return
    if not SHORTEST_HALF_LIFE <= longest < math.inf:
        raise ValueError(
            f"max_half_life must be at least {SHORTEST_HALF_LIFE:.1f} tokens, got {longest!r}; "
            "leave it at None for the same half-life in all heads"
        )
    if "alpha" not in system.gates:
        raise ValueError(
            f"max_half_life={longest} starts a data-dependent retention, but this memory's is "
            f"{system.retention.decay!r}; leave it at None"
        )


def _spread_bias(num_heads: int, longest: float) -> Tensor:
    """Biases b [H] with half-lives of sigmoid(b) from the shortest to `longest`, in equal ratios."""
    steps = torch.linspace(0, 1, num_heads, dtype=torch.float64)
    half_lives = SHORTEST_HALF_LIFE * (longest / SHORTEST_HALF_LIFE) ** steps
    log_alpha = -math.log(2) / half_lives
    return log_alpha - torch.log(-torch.expm1(log_alpha))  # the logit of alpha
