"""A run as one operator of a compiled graph: the engines' numbers, and no more graph for more tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nested_learning.layers import MIXERS, SelfModifyingTitans, Titans
from nested_learning.layers.memory import set_recompute
from nested_learning.layers.registry import build_mixer
from nested_learning.memory.engines import operator
from nested_learning.memory.engines.operator import library
from nested_learning.memory.system import SYSTEMS

WIDTH, CHUNK = 8, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {},
    "sliding_window_attention": {"window": 4},
    "mac": {"segment": 4, "persistent_tokens": 2},
    "mag": {"window": 4, "memory_options": {"chunk_size": CHUNK}},
    "mal": {"window": 4, "memory_options": {"chunk_size": CHUNK}},
}
MEMORIES = [name for name in sorted(MIXERS) if name not in (*OPTIONS, "memory")]
# A system of each way to keep what the backward pass needs: chunks by hand, segments, closed forms.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("self_modifying_titans", {"projection_chunk_size": CHUNK}),
    ("self_modifying_titans", {"projection_chunk_size": CHUNK, "adaptive_q": True}),
    ("self_modifying_titans", {"projection_chunk_size": 2 * CHUNK}),
    ("titans", {}),
    ("titans", {"momentum": False, "read": "chunk"}),
    ("gated_deltanet", {}),
]


def with_kinds(counts: list[int], kinds: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Every kind with every number of tokens; every other pair is fast, so that each of both has one."""
    return [
        pytest.param(*kind, count, marks=[pytest.mark.slow] * ((i + j) % 2), id=f"{kind}-{count}")
        for i, kind in enumerate(kinds)
        for j, count in enumerate(counts)
    ]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {**OPTIONS.get(name, {"chunk_size": CHUNK}), **options}
    layer = build_mixer(name, WIDTH, 2, options).double()
    with torch.no_grad():  # larger gates than at the start of training: every term counts
        for gate in getattr(layer, "gates", {}).values():
            gate.weight.normal_()
    return layer


def tokens(rows: int, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, count, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def results(call, layer, *pieces: Tensor, **options: Any) -> dict[str, Tensor]:
    """Outputs, the last state, and all gradients of a function of both; the pieces are read one by one."""
    state, found = None, {}
    for i, x in enumerate(pieces):
        y, state, *surprise = call(x, state, **options)
        found |= {f"y{i}": y, **{f"surprise{i}": s for s in surprise}}
    found |= {f"state{i}": t for i, t in enumerate(state.tensors())}
    total = sum(
        (t * torch.arange(t.numel()).view_as(t).cos()).sum() for t in found.values() if t.requires_grad
    )
    leaves = {f"x{i}": x for i, x in enumerate(pieces)} | dict(layer.named_parameters())
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return found | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert list(got) == list(want)
    for name, a in got.items():
        torch.testing.assert_close(
            a, want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def compiled(layer: torch.nn.Module, backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(layer, backend=backend, fullgraph=True, **options)


class Graphs:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Any:
        self.found.append(graph)
        return graph.forward

    @property
    def nodes(self) -> list[int]:
        return [len(graph.graph.nodes) for graph in self.found]


ANY_LENGTH = [
    "self_modifying_titans",
    "titans",
    "dla",
    "deltanet",
]  # in one graph: the next test


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("mac", *ANY_LENGTH) else name
        for name in [*sorted(OPTIONS), *MEMORIES]
    ],
)
def test_one_graph_for_every_mixer(name):
    """No break, and the same numbers; of a memory, a graph that does not grow with the number of chunks."""
    layer, graphs = build(name), Graphs()
    step = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=False)
    for count in (2 * CHUNK, 3 * CHUNK):
        x = tokens(2, count)
        assert_same(results(step, layer, x), results(layer, layer, x))
    assert len(graphs.found) == 2
    if name != "mac":  # whose segments are read one after the other
        assert graphs.nodes[0] == graphs.nodes[1]


@pytest.mark.parametrize("name", ANY_LENGTH)
def test_one_graph_for_all_lengths(name):
    layer, graphs = build(name, chunk_size=2 * CHUNK), Graphs()
    step = torch.compile(layer, backend=graphs, fullgraph=True)
    for count in (4 * CHUNK, 32 * CHUNK, 4 * CHUNK + 3, CHUNK + 1):
        x = tokens(2, count)
        torch._dynamo.maybe_mark_dynamic(x, 1)
        assert_same(results(step, layer, x), results(layer, layer, x))
    assert len(graphs.found) == 1


COUNTS = [5 * CHUNK, 3 * CHUNK + 1, CHUNK - 1, operator.SEGMENT * 2 * CHUNK + 5]


@pytest.mark.parametrize(("name", "options", "count"), with_kinds(COUNTS, KINDS))
def test_outputs_state_surprise_and_gradients(name, options, count):
    layer, x = build(name, **options), tokens(2, count)
    want = results(layer, layer, x, return_surprise=True)
    assert_same(results(compiled(layer, "eager"), layer, x, return_surprise=True), want)


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_through_ahead_of_time_autograd(name, options):
    layer, x = build(name, **options), tokens(2, 3 * CHUNK + 2)
    assert_same(results(compiled(layer), layer, x), results(layer, layer, x))


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_padding_and_a_state_within_a_chunk(name, options):
    layer = build(name, **options)
    pieces = tokens(2, CHUNK + 3), tokens(2, 3 * CHUNK, seed=2)
    step = compiled(layer, "eager", dynamic=False)
    assert_same(results(step, layer, *pieces), results(layer, layer, *pieces))
    mask = torch.ones(2, 3 * CHUNK, dtype=torch.bool)
    mask[0, :5] = mask[1, -2:] = False
    x = pieces[1]
    assert_same(results(step, layer, x, mask=mask), results(layer, layer, x, mask=mask))


@pytest.mark.parametrize("name", ["self_modifying_titans", "titans", "yaad", "gated_deltanet"])
def test_recomputing_keeps_little_and_changes_nothing(name):
    layer, x = build(name), tokens(2, (2 * operator.SEGMENT + 1) * CHUNK + 1)
    want = results(layer, layer, x)
    set_recompute(layer, "chunk")
    assert_same(results(compiled(layer, "eager"), layer, x), want)


@pytest.mark.parametrize("name", ["self_modifying_titans", "dla"])
def test_checkpointed(name):
    layer, x = build(name), tokens(2, 3 * CHUNK)

    def call(x, state):
        return checkpoint(layer, x, state, use_reentrant=False)

    assert_same(
        results(torch.compile(call, backend="aot_eager", fullgraph=True), layer, x), results(layer, layer, x)
    )


@pytest.mark.parametrize("name", ["self_modifying_titans", "titans", "gated_deltanet"])
def test_bfloat16_autocast(name):
    """Factors are rounded as without a compiler, the backward pass runs outside of the region."""
    layer, x = build(name).float(), tokens(2, 3 * CHUNK).detach().float().requires_grad_()
    step = compiled(layer)

    def run(call):
        with torch.autocast("cpu", torch.bfloat16):
            y, state = call(x)
        total = y.float().square().sum() + sum(W.square().sum() for W in state.current.values())
        return y, *torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True)

    for a, b in zip(run(step), run(layer), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max()))


@pytest.mark.parametrize(
    ("name", "options", "count"),
    with_kinds([2 * CHUNK, 2 * CHUNK + 1], KINDS[:1] + KINDS[2:4] + KINDS[5:]),
)
def test_as_the_library_has_operators(name, options, count, monkeypatch):
    """torch's own checks: schema, autograd registration, the fake functions, dynamic shapes."""
    layer, calls = build(name, **options), []
    op = library.read

    def record(*arguments):
        calls.append(arguments)
        return op(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(library, "read", record)
        torch.compile(layer, backend="eager", dynamic=False)  # nothing is traced before a call
        patch.setattr("nested_learning.memory.engine.one_operator", lambda: True)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(tokens(2, count))
    [(tensors, plan)] = calls
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    torch.library.opcheck(op, (tensors, plan))


def test_what_cannot_see_into_an_operator():
    """A transform of torch.func follows the operations, and second derivatives are refused by torch."""
    layer, x = build("self_modifying_titans"), tokens(3, 2 * CHUNK)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],))[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    want = per_sample(parameters, x.detach())
    for row in range(3):
        [g] = torch.autograd.grad(layer(x[row : row + 1])[0].square().sum(), [layer.in_proj.weight])
        torch.testing.assert_close(want["in_proj.weight"][row], g, rtol=1e-10, atol=1e-10)
    # torch.compile takes no autograd function below vmap
    with pytest.raises(RuntimeError, match="vmap"):
        torch.compile(per_sample, backend="eager")(parameters, x.detach())

    def penalty(call):
        [g] = torch.autograd.grad(call(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert penalty(layer).abs().sum() > 0
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(compiled(layer))


def test_forward_derivatives_are_those_without_a_compiler():
    layer, x = build("titans"), tokens(1, 2 * CHUNK).detach()

    def along(x, v):
        return torch.func.jvp(lambda x: layer(x)[0], (x,), (v,))

    want = along(x, torch.ones_like(x))
    got = torch.compile(along, backend="eager")(x, torch.ones_like(x))
    torch.testing.assert_close(got, want)


def test_a_system_is_found_by_its_text():
    """Also that of a copy, or of one that came from another process."""
    system = build("titans").system
    assert SYSTEMS[system.key] == system
    for other in (copy.deepcopy, lambda system: pickle.loads(pickle.dumps(system))):
        del SYSTEMS[system.key]
        assert SYSTEMS[other(system).key] == system


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize("kind", [SelfModifyingTitans, Titans])
def test_two_steps_of_training_by_inductor(kind):
    def train(use):
        torch.manual_seed(0)
        layer = kind(16, 2, chunk_size=8)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        call = use(layer)
        x = torch.randn(2, 20, 16)
        losses = []
        for _ in range(2):
            loss = (call(x)[0] - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert train(torch.compile) == pytest.approx(train(lambda layer: layer), rel=1e-5)
