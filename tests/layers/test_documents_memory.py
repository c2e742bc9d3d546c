"""Documents in a row in the layers with a memory: each as if it stood in a row of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nested_learning.layers import LowRankSelfModifyingMLP, SelfModifyingLinear, set_recompute
from nested_learning.layers.attention import AttentionState, MemoryAttentionState
from nested_learning.layers.memory import MemoryLayer
from nested_learning.layers.memory import layer as memory_layer
from nested_learning.layers.memory.row import MemoryRow
from nested_learning.layers.registry import MIXERS, build_mixer
from nested_learning.layers.token_inputs import find_documents
from nested_learning.memory import engine
from nested_learning.memory.engines import chunked, generic, token
from nested_learning.memory.running import MemoryState

D = 8
ROWS = sorted(name for name, kind in MIXERS.items() if isinstance(kind, type) and issubclass(kind, MemoryRow))


def mixer(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: build_mixer(name, D, 2, options)


LAYERS: dict[str, Callable[[], nn.Module]] = {name: mixer(name, chunk_size=4) for name in ROWS}
LAYERS |= {
    "self_modifying_titans, two chunk lengths": mixer(
        "self_modifying_titans", chunk_size=2, projection_chunk_size=6
    ),
    "self_modifying_titans, the other way round, momentum, chunk": mixer(
        "self_modifying_titans",
        chunk_size=4,
        projection_chunk_size=2,
        momentum=True,
        read="chunk",
        adaptive_q=True,
        conv_size=0,
    ),
    "titans, chunk, long convolution": mixer("titans", chunk_size=3, read="chunk", conv_size=7),
    "gated_deltanet, chunks of 1": mixer("gated_deltanet", chunk_size=1),
    "composed": mixer("memory", parts={"architecture": "swiglu", "objective": "huber", "chunk_size": 3}),
    "composed, lq": mixer("memory", parts={"form": "lq", "objective": "lp", "chunk_size": 3}),
    "mag": mixer("mag", window=3, memory_options={"chunk_size": 4}, persistent_tokens=2),
    "mag, no persistent tokens": mixer("mag", window=4, memory="gated_deltanet", persistent_tokens=0),
    "mal": mixer("mal", window=4, memory_options={"chunk_size": 3}, persistent_tokens=5),
    "mac": mixer("mac", segment=4),
    "mac, self-modifying": mixer("mac", segment=3, memory="self_modifying_titans", persistent_tokens=0),
    "linear": lambda: SelfModifyingLinear(D, D, chunk_size=4),
    "linear, literal": lambda: SelfModifyingLinear(D, D, chunk_size=4, mode="literal"),
    "mlp": lambda: LowRankSelfModifyingMLP(D, chunk_size=4),
}


@functools.cache
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)  # matrix memories, and what the drop-ins learn, start empty
    return layer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call(layer: nn.Module, *args: Any, **said: Any) -> tuple[Tensor, Any, Tensor]:
    """y, state, surprise; zeros where the layer has no surprise."""
    if getattr(layer, "has_surprise", False):
        return layer(*args, return_surprise=True, **said)
    y, state = layer(*args, **said)
    return y, state, torch.zeros(y.shape[:2], dtype=y.dtype)


def alone(layer: nn.Module, x: Tensor, anew: Tensor, real: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
    """Every document in a call of its own; `anew` [B, T] marks the tokens that begin one."""
    ys, surprises, states = [], [], []
    for b in range(len(x)):
        own = None if state is None else state.slice_rows(slice(b, b + 1))
        columns = real[b].nonzero().squeeze(1).tolist()
        cuts = [i for i, c in enumerate(columns) if i == 0 or anew[b, c]]
        y, surprise = torch.zeros_like(x[b]), torch.zeros_like(x[b, :, 0])
        for start, stop in itertools.pairwise([*cuts, len(columns)]):
            at = columns[start:stop]
            out, own, error = call(layer, x[b : b + 1, at], None if anew[b, at[0]] else own)
            y = y.index_copy(0, torch.tensor(at), out[0])
            surprise = surprise.index_copy(0, torch.tensor(at), error[0])
        if not columns:  # nothing but padding, which leaves a state as it is
            before, own = own, call(layer, x[b : b + 1], own, real[b : b + 1])[1]
            if before is not None:  # places of a segment that are not filled are zero and take no gradient
                torch.testing.assert_close(own.tensors(), before.tensors(), rtol=0, atol=0)
        ys.append(y)
        surprises.append(surprise)
        states.append(own)
    return torch.stack(ys), join(states), torch.stack(surprises)


def join(states: list[Any]) -> Any:
    """Rows as one state; of attention, those that hold fewer tokens are filled up in front."""
    if isinstance(states[0], MemoryAttentionState):
        parts = [state.attention for state in states]
        longest = max(part.positions.shape[1] for part in parts)
        attention = AttentionState.join_rows([filled(part, longest) for part in parts])
        return MemoryAttentionState(MemoryState.join_rows([state.memory for state in states]), attention)
    return type(states[0]).join_rows(states)


def filled(state: AttentionState, length: int) -> AttentionState:
    """With as many columns of padding in front as make it so long."""
    missing = length - state.positions.shape[1]
    key, value = (F.pad(t, (0, 0, missing, 0)) for t in (state.key, state.value))
    return AttentionState(key, value, F.pad(state.positions, (missing, 0), value=-1))


def comparable(layer: nn.Module, state: Any) -> list[Tensor]:
    """Tensors of a state; of attention, whose columns may stand in any order, what a token more reads."""
    if not isinstance(state, MemoryAttentionState):
        return state.tensors()
    return [*state.memory.tensors(), layer(normal(len(state.memory.position), 1, D), state)[0]]


def floats(state: Any) -> list[Tensor]:
    return [t for t in state.tensors() if t.is_floating_point()]


def grown(layer: nn.Module, B: int) -> Any:
    """A state in the middle of chunks, another place for each row, with tensors that take gradients."""
    mask = torch.arange(9).expand(B, -1) < 9 - 2 * torch.arange(B).unsqueeze(1)
    state = call(layer, normal(B, 9, D, seed=5), None, mask)[1]
    copies = {id(t): t.detach().clone().requires_grad_(t.is_floating_point()) for t in state.tensors()}
    return state.map(lambda t: copies[id(t)])  # what is one tensor stays one


Result = tuple[Tensor, Any, Tensor]  # y, state, surprise


def compare(layer: nn.Module, got: Result, wanted: Result, leaves: list[Tensor]) -> None:
    """Outputs, states, surprise, and the gradients to all leaves."""
    both = [[y, surprise, *comparable(layer, state)] for y, state, surprise in (got, wanted)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    gradients = []
    for values in both:
        known = [t for t in values if t.requires_grad]
        total = sum((t * normal(*t.shape, seed=2)).sum() for t in known)
        gradients.append(
            torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
        )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@contextmanager
def only(*engines: Any) -> Iterator[None]:
    """With no other engines than these."""
    every = engine.ENGINES
    engine.ENGINES = engines
    engine.choose.cache_clear()
    try:
        yield
    finally:
        engine.ENGINES = every
        engine.choose.cache_clear()


Batch = tuple[Tensor, Tensor, Tensor]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """x [B, T, D], which tokens begin a document and which are real, both [B, T]."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    begins = draw(st.lists(st.sampled_from([True, False, False]), min_size=B * T, max_size=B * T))
    real = [True] * (B * T)
    if draw(st.booleans()):
        real = draw(st.lists(st.sampled_from([True, True, False]), min_size=B * T, max_size=B * T))
    x = normal(B, T, D, seed=draw(st.integers(0, 9)))
    return x, torch.tensor(begins).view(B, T), torch.tensor(real).view(B, T)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(LAYERS)),
    batch=batches(),
    stateful=st.booleans(),
    by_position=st.booleans(),
    keep=st.booleans(),
)
def test_packed_is_alone(name: str, batch: Batch, stateful: bool, by_position: bool, keep: bool) -> None:
    check_packed_is_alone(name, batch, stateful, by_position, keep)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=15, deadline=None)
@given(batch=batches(), stateful=st.booleans(), by_position=st.booleans(), keep=st.booleans())
def test_packed_is_alone_in_every_layer(
    name: str, batch: Batch, stateful: bool, by_position: bool, keep: bool
) -> None:
    check_packed_is_alone(name, batch, stateful, by_position, keep)


def check_packed_is_alone(name: str, batch: Batch, stateful: bool, by_position: bool, keep: bool) -> None:
    layer = build(name)
    x, begins, real = batch
    x.requires_grad_()
    state = grown(layer, len(x)) if stateful else None
    mask = None if real.all() else real
    if by_position:  # real tokens at other places than 0 go on
        said = {"position_ids": torch.where(begins, 0, torch.where(real, 3, 0))}
        anew = begins
    else:
        inside = begins & real
        said = {"documents": inside.cumsum(1)}
        first = real & (real.cumsum(1) == 1)
        anew = inside & ~first  # the first of a row goes on
    wanted = alone(layer, x, anew, real, state)
    leaves = [x, *layer.parameters(), *([] if state is None else floats(state))]
    compare(layer, call(layer, x, state, mask, **said), wanted, leaves)
    if keep:
        return
    found = find_documents(x, mask, stateful, **said, keep=False)
    if found is not None:
        y, nothing, surprise = call(layer, x, state, mask, documents=found)
        assert nothing is None
        compare(layer, (y, wanted[1], surprise), wanted, leaves)


PACKED = torch.tensor([[0] * 13 + [1] * 2 + [2] * 9, [0] * 3 + [1] * 17 + [2] * 4])
LENGTHS = torch.zeros(2, 24, dtype=torch.bool)
LENGTHS[:, 1:] = PACKED[:, 1:] != PACKED[:, :-1]


@pytest.mark.parametrize(
    ("name", "how", "stateful"),
    [
        ("titans", "generic", True),
        ("self_modifying_titans", "generic", False),
        ("self_modifying_titans", "recompute", True),
        ("gated_deltanet", "recompute", False),
        ("mac", "recompute", True),
        ("titans", "groups", False),
        ("yaad", "groups", True),
        ("mac", "checked", False),
        ("self_modifying_titans", "checked", True),
    ],
)
def test_every_way_of_computing(name: str, how: str, stateful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(name)
    x = normal(2, 24, D).requires_grad_()
    state = grown(layer, 2) if stateful else None
    wanted = alone(layer, x, LENGTHS, torch.ones(2, 24, dtype=torch.bool), state)
    leaves = [x, *layer.parameters(), *([] if state is None else floats(state))]
    if how == "generic":
        with only(generic):
            compare(layer, call(layer, x, state, documents=PACKED), wanted, leaves)
        return
    if how == "groups":
        monkeypatch.setattr(memory_layer, "ROWS", 4 * D)
    elif how == "checked":
        monkeypatch.setenv("NESTED_LEARNING_CHECK", "1")
    else:
        set_recompute(layer, "chunk")
    try:
        compare(layer, call(layer, x, state, documents=PACKED), wanted, leaves)
    finally:
        set_recompute(layer, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yaad", "gated_deltanet", "ttt_mlp"])
def test_compiled_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(name)
    x = normal(2, 24, D).requires_grad_()
    wanted = alone(layer, x, LENGTHS, torch.ones(2, 24, dtype=torch.bool), None)
    monkeypatch.setattr(layer, "compile_step", True)
    compare(layer, call(layer, x, None, documents=PACKED), wanted, [x, *layer.parameters()])


def test_whole_chunks_run_by_the_written_out_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a state at a boundary too; nothing else runs where no state is kept."""
    columns: list[tuple[str, int, int]] = []
    for module in (chunked, generic):
        run = module.run

        def counted(
            system: Any, initial: Any, state: Any, inputs: Any, *rest: Any, by: Any = (module, run)
        ) -> Any:
            columns.append((by[0].__name__.rpartition(".")[2], *inputs.paths["k"].shape[::2]))
            return by[1](system, initial, state, inputs, *rest)

        monkeypatch.setattr(module, "run", counted)
    monkeypatch.setattr("nested_learning.ops.document_plan.CALL", 0)
    layer = build("self_modifying_titans")
    x = normal(2, 24, D)
    found = find_documents(x, None, False, documents=PACKED, keep=False)
    layer(x, documents=found)
    assert columns == [("chunked", 6, 4), ("chunked", 3, 8), ("chunked", 2, 4), ("chunked", 1, 4)]
    columns.clear()
    layer(x, documents=PACKED)  # the states of 9 and 4 tokens are kept: one token more after 8
    assert columns == [
        ("chunked", 6, 4),
        ("chunked", 3, 4),
        ("chunked", 2, 8),
        ("chunked", 1, 4),
        ("generic", 1, 1),
    ]


@pytest.mark.parametrize(
    "name", ["self_modifying_titans", "titans", "gated_deltanet", "mal", "mac", "linear"]
)
def test_token_by_token(name: str) -> None:
    """Rows whose token stands at position 0 begin anew, the others go on."""
    layer = build(name)
    x, anew = normal(2, 12, D), LENGTHS[:, 6:18]
    state = grown(layer, 2).detach()
    wanted = alone(layer, x, anew, torch.ones_like(anew), state)
    ys = []
    with torch.no_grad():
        for t in range(12):
            positions = torch.where(anew[:, t : t + 1], 0, 7)
            y, state, _ = call(layer, x[:, t : t + 1], state, position_ids=positions)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), wanted[0], rtol=1e-11, atol=1e-11)
    for a, b in zip(comparable(layer, state), comparable(layer, wanted[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_single_tokens_run_by_the_token_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = token.run
    monkeypatch.setattr(
        token,
        "run",
        lambda s, i, state, inputs, *rest: (
            rows.append(len(inputs.paths["k"])) or run(s, i, state, inputs, *rest)
        ),
    )
    layer = build("self_modifying_titans")
    with torch.no_grad():
        state = grown(layer, 3)
        layer(normal(3, 1, D), state, position_ids=torch.tensor([[4], [0], [9]]))
    assert rows == [2, 1]


@pytest.mark.parametrize(
    ("name", "stateful"),
    [(name, True) for name in (*ROWS, "mag", "mal", "mac", "linear", "mlp")]
    + [(name, False) for name in ("self_modifying_titans", "mal")],
)
def test_another_document_changes_no_bit(name: str, stateful: bool) -> None:
    layer = build(name)
    x = normal(2, 24, D)
    state = grown(layer, 2) if stateful else None
    others = PACKED[:, None, :] != torch.tensor([[1], [2]])[..., None]  # [2, 1, 24]: all but one document
    others = others.squeeze(1)
    results = []
    for content in (x, normal(2, 24, D, seed=1), torch.full_like(x, float("nan")), torch.full_like(x, 1e308)):
        own = torch.where(others.unsqueeze(-1), content, x).requires_grad_()
        y, after, surprise = call(layer, own, state, documents=PACKED)
        (g,) = torch.autograd.grad(y[~others].sum() + sum(t[1].sum() for t in floats(after)), own)
        # the second row's last document is the one that stays
        results.append((y[~others], surprise[~others], g[~others], *(t[1] for t in after.tensors())))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["titans", "self_modifying_titans", "gated_deltanet", "mal", "mac", "linear"]
)
def test_another_length_changes_rounding_alone(name: str) -> None:
    layer = build(name)
    x = normal(1, 19, D)
    results = []
    for length in (3, 8, 12):
        own = torch.cat([normal(1, length, D, seed=length), x], 1).requires_grad_()
        numbers = torch.arange(length + 19).unsqueeze(0) >= length
        y, after, _ = call(layer, own, documents=numbers.int())
        (g,) = torch.autograd.grad(y[:, length:].sum(), own)
        results.append((y[:, length:], g[:, length:], *after.tensors()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_groups_of_rows_apply_to_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build("titans")
    assert isinstance(layer, MemoryLayer)
    rows: list[int] = []
    read = layer._read_segment
    monkeypatch.setattr(
        layer, "_read_segment", lambda place, *args: rows.append(len(place.x)) or read(place, *args)
    )
    monkeypatch.setattr(memory_layer, "ROWS", 2 * 4 * D)
    layer(normal(2, 24, D), documents=find_documents(normal(2, 24, D), None, False, PACKED, keep=False))
    assert rows == [2, 2, 2]


def test_padding_of_any_content_changes_nothing() -> None:
    layer = build("self_modifying_titans")
    real = torch.ones(2, 24, dtype=torch.bool)
    real[0, :4], real[1, 11] = False, False
    x = normal(2, 24, D)
    wanted = call(layer, x, None, real, documents=PACKED)
    got = call(layer, x.masked_fill(~real.unsqueeze(-1), float("nan")), None, real, documents=PACKED)
    for a, b in zip(
        (got[0], got[2], *got[1].tensors()), (wanted[0], wanted[2], *wanted[1].tensors()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["titans", "mal", "mac", "linear"])
def test_what_does_not_fit_is_refused(name: str) -> None:
    layer = build(name)
    with pytest.raises(ValueError, match="documents must be an integer tensor"):
        layer(normal(2, 6, D), documents=torch.zeros(2, 5, dtype=torch.long))
    found = find_documents(normal(2, 24, D), None, False, PACKED)
    with pytest.raises(ValueError, match=r"\[2, 24\] tokens, x has \[2, 6\]"):
        layer(normal(2, 6, D), documents=found)
    with pytest.raises(ValueError, match="position"):
        layer(normal(2, 24, D), documents=PACKED, position_ids=torch.arange(24).unsqueeze(0))
