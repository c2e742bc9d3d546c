"""Documents read as rows of their own give what each would give alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_learning.ops.document_plan import CALL, _cuts
from nested_learning.ops.documents import Documents

STEP = 4


def read(
    inputs: dict[str, Tensor], state: dict[str, Tensor] | None, real: Tensor | None, aligned: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A memory in small: a sum that is decayed by a factor of the last boundary's value, token by token."""
    x = inputs["x"]
    if state is None:
        zero = x.new_zeros(len(x))
        state = {"sum": zero, "anchor": zero, "position": torch.zeros(len(x), dtype=torch.long)}
    total, anchor, position = state["sum"], state["anchor"], state["position"]
    if aligned:
        assert bool((position % STEP == 0).all())
    outputs = []
    for t in range(x.shape[1]):
        here = torch.ones_like(position, dtype=torch.bool) if real is None else real[:, t]
        anchor = torch.where(here & (position % STEP == 0), total, anchor)
        total = torch.where(here, total * torch.cos(anchor) + x[:, t], total)
        position = position + here
        outputs.append(total + anchor)
    y = torch.stack(outputs, 1)
    return {"y": y, "twice": torch.stack([y, y], -1)}, {"sum": total, "anchor": anchor, "position": position}


def alone(
    x: Tensor, begins: Tensor, real: Tensor, state: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every document in a call of its own."""
    y, after = torch.zeros_like(x), []
    for b in range(len(x)):
        own = None if state is None else {name: t[b : b + 1] for name, t in state.items()}
        for t in range(x.shape[1]):
            if not real[b, t]:
                continue
            if begins[b, t]:
                own = None
            out, own = read({"x": x[b : b + 1, t : t + 1]}, own, None, False)
            y[b, t] = out["y"][0, 0]
        if own is None:
            own = read({"x": x[b : b + 1, :1]}, None, torch.zeros(1, 1, dtype=torch.bool), False)[1]
        after.append(own)
    return y, {name: torch.cat([own[name] for own in after]) for name in after[0]}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), columns=st.integers(1, 23), stateful=st.booleans())
def test_documents_read_as_if_alone(data: st.DataObject, rows: int, columns: int, stateful: bool) -> None:
    flags = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    begins = torch.tensor(data.draw(flags)).view(rows, columns)
    real = torch.tensor(data.draw(flags)).view(rows, columns) if data.draw(st.booleans()) else None
    if real is not None and not real.any():
        real[0, 0] = True
    x = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    state = None
    if stateful:
        state = read({"x": x}, None, torch.rand(rows, columns) < 0.7, False)[1]
    held = torch.ones(rows, columns, dtype=torch.bool) if real is None else real
    x.requires_grad_()
    documents = Documents(begins, real)
    got, after = documents.read(read, {"x": x}, state, STEP)
    wanted, wanted_after = alone(x, begins, held, state)
    torch.testing.assert_close(got["y"], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(got["twice"][..., 1], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(after["position"], wanted_after["position"])
    torch.testing.assert_close(after["sum"], wanted_after["sum"], rtol=0, atol=1e-12)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad((y * weight).sum() + s.sum(), x)[0]
        for y, s in ((got["y"], after["sum"]), (wanted, wanted_after["sum"]))
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    bare, nothing = Documents(begins, real, keep=False).read(read, {"x": x}, state, STEP)
    assert nothing is None
    torch.testing.assert_close(bare["y"], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_a_reader_is_told_where_all_rows_stand(keep: bool) -> None:
    """`first` is each row's place where whole chunks are read; else less than a chunk is, or any state."""
    begins = torch.zeros(2, 40, dtype=torch.bool)
    begins[0, [9, 22, 36]] = True
    begins[1, [0, 17, 33]] = True
    x = torch.randn(2, 40, dtype=torch.float64)
    state = read({"x": x[:, :5]}, None, None, True)[1]
    told = []

    def reader(
        inputs: dict[str, Tensor],
        state: dict[str, Tensor] | None,
        real: Tensor | None,
        aligned: bool,
        first: int | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        told.append(first)
        if first is not None:
            assert aligned
            assert real is None
            assert inputs["x"].shape[1] % STEP == 0
            assert first == 0 if state is None else bool((state["position"] == first).all())
        elif aligned:
            assert inputs["x"].shape[1] < STEP
        return read(inputs, state, real, aligned)

    documents = Documents(begins, keep=keep)
    got, _ = documents.read(reader, {"x": x}, state, STEP, tell_first=True)
    wanted, _ = documents.read(read, {"x": x}, state, STEP)
    assert torch.equal(got["y"], wanted["y"])
    assert {0, None} <= set(told)


def test_a_prefix_stands_in_front_of_every_document_that_begins() -> None:
    begins = torch.tensor([[False, False, True, False, False, True]])
    x, p = torch.randn(1, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    state = read({"x": x[:, :2]}, None, None, True)[1]
    got, after = Documents(begins).read(lambda t, *rest: read({"x": t}, *rest), x, state, STEP, prefix=p)
    first, _ = read({"x": x[:, :2]}, state, None, False)
    second, _ = read({"x": torch.cat([p[None], x[:, 2:5]], 1)}, None, None, True)
    third, last = read({"x": torch.cat([p[None], x[:, 5:]], 1)}, None, None, True)
    wanted = torch.cat([first["y"], second["y"][:, 3:], third["y"][:, 3:]], 1)
    torch.testing.assert_close(got["y"], wanted)
    torch.testing.assert_close(after["sum"], last["sum"])


def test_work_is_that_of_the_documents_chunks() -> None:
    """Without states to keep, columns beyond the documents' own chunks are few."""
    lengths = [1000, 700, 650, 300, 129, 64, 33, 32, 20]
    begins = torch.zeros(1, sum(lengths), dtype=torch.bool)
    begins[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    plan = Documents(begins, keep=False).plan(32, given=False)
    columns = sum(n * length for n, length in plan.layout.shapes)
    own = sum(-(-n // 32) * 32 for n in lengths)
    assert own <= columns <= own + CALL * len(plan.steps)
    assert len(plan.steps) < len(lengths)


def test_facts_about_documents() -> None:
    begins = torch.tensor([[True, False, False, True], [False, False, True, False]])
    real = torch.tensor([[True, True, False, True], [False, True, True, True]])
    documents = Documents(begins, real)
    assert documents.positions().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert documents.of_tokens(torch.tensor([5, 6, 7, 8])).tolist() == [[5, 5, 0, 6], [0, 7, 8, 8]]
    assert documents.goes_on(True).tolist() == [False, False, True, False]
    assert documents.last().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("ends", "forced", "wanted"), [([8], [], [8]), ([8, 8, 4], [4], [4, 8]), ([], [], [])]
)
def test_cuts(ends: list[int], forced: list[int], wanted: list[int]) -> None:
    assert _cuts(ends, forced) == wanted
