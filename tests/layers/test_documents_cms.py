"""A continuum memory system on documents in a row gives what it gives each of them alone (spec section 8)."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nested_learning.layers import CMSState, ContinuumMemorySystem
from nested_learning.layers.token_inputs import find_documents
from nested_learning.ops.documents import Documents

WIDTH = 6
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
VARIANTS = ["sequential", "nested", "nested, exact", "independent"]
# Levels whose chunks end within most documents, and one that few come to the end of.
SIZES = [(2, 4, 24), (3, 6), (5,), (1, 16)]
RULES: list[dict[str, Any]] = [
    {},
    {"rule": "momentum", "retention": 0.7},
    {"rule": "adam", "lr": 0.05, "activation": "gelu"},
    {"learn_lr": True, "activation": "swiglu", "clip": 0.05},
    {"rule": "dgd"},
]


def system(sizes: tuple[int, ...], variant: str, **options: Any) -> ContinuumMemorySystem:
    """In float64, every parameter random."""
    torch.manual_seed(0)
    variant, _, gradient = variant.partition(", ")
    more = {"nested_gradient": gradient} if gradient else {}
    levels = [{"chunk_size": n, "intermediate_size": 4, "lr": 0.3, **options} for n in sizes]
    cms = ContinuumMemorySystem(WIDTH, levels, variant, "regression", **more).double()
    for name, parameter in cms.named_parameters():
        if "log_lr" not in name:
            nn.init.normal_(parameter, std=0.6)
    return cms


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(
    cms: ContinuumMemorySystem,
    x: Tensor,
    begins: Tensor,
    real: Tensor,
    state: CMSState | None,
    learn: Tensor | None,
) -> tuple[Tensor, CMSState]:
    """Every document in a call of its own."""
    y, after = torch.zeros_like(x), []
    for b, row in enumerate(real):
        own = None if state is None else state.select_rows(torch.tensor([b]))
        columns = row.nonzero().squeeze(1).tolist()
        cuts = [i for i, t in enumerate(columns) if i == 0 or begins[b, t]]
        for start, stop in itertools.pairwise([*cuts, len(columns)] if columns else []):
            at = torch.tensor(columns[start:stop])
            own = None if begins[b, at[0]] else own
            taught = None if learn is None else learn[b : b + 1, at]
            out, own = cms(x[b : b + 1, at], own, learn=taught)
            y = y.index_put((torch.tensor(b), at), out[0])
        after.append(cms.start(cms.learning(x[b : b + 1], x.dtype)) if own is None else own)
    return y, CMSState.join_rows(after)


def gradients(y: Tensor, state: CMSState | None, inputs: list[Tensor]) -> list[Tensor]:
    """Those of random sums of the outputs and of the state."""
    total = (y * random(*y.shape, seed=7)).sum()
    for t in [] if state is None else state.tensors():
        if t.is_floating_point():
            total = total + (t * random(*t.shape, seed=8)).sum()
    found = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def compare(
    cms: ContinuumMemorySystem,
    begins: Tensor,
    real: Tensor | None,
    state: CMSState | None,
    learn: Tensor | None = None,
) -> None:
    x = random(*begins.shape, WIDTH).requires_grad_()
    inputs = [x, *cms.parameters()]
    if state is not None:
        state = state.map(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
        inputs += [t for t in state.tensors() if t.requires_grad]
    held = torch.ones_like(begins) if real is None else real
    wanted, wanted_after = alone(cms, x, begins, held, state, learn)
    got, after = cms(x, state, mask=real, learn=learn, documents=Documents(begins, real))
    bare, nothing = cms(x, state, mask=real, learn=learn, documents=Documents(begins, real, keep=False))
    assert nothing is None
    assert after.position.tolist() == wanted_after.position.tolist()
    for a, b in zip(after.tensors(), wanted_after.tensors(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for y, ours, theirs in ((got, after, wanted_after), (bare, None, None)):
        torch.testing.assert_close(y[held], wanted[held], **CLOSE)
        kept = gradients(y.where(held[..., None], 0), ours, inputs)
        for a, b in zip(kept, gradients(wanted, theirs, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def case(
    data: st.DataObject, cms: ContinuumMemorySystem
) -> tuple[Tensor, Tensor | None, CMSState | None, Tensor | None]:
    """Where documents begin, padding, a state from before and what is learned."""
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    numbers = st.lists(st.floats(0, 1), min_size=rows * columns, max_size=rows * columns)
    begins = torch.tensor(data.draw(numbers)).view(rows, columns) < 0.12
    real = torch.tensor(data.draw(numbers)).view(rows, columns) < 0.8 if data.draw(st.booleans()) else None
    if real is not None and not real.any():
        real[0, 0] = True
    state = None
    if data.draw(st.booleans()):
        before = torch.rand(rows, 13, generator=torch.Generator().manual_seed(rows)) < 0.7
        state = cms(random(rows, 13, WIDTH, seed=3), mask=before)[1]
    learn = torch.tensor(data.draw(numbers)).view(rows, columns) < 0.7 if data.draw(st.booleans()) else None
    return begins, real, state, learn


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_documents_are_read_as_if_alone(variant: str, data: st.DataObject) -> None:
    options = data.draw(st.sampled_from(RULES[:-1] if variant.startswith("nested") else RULES))
    cms = system(data.draw(st.sampled_from(SIZES)), variant, **options)
    with patch("nested_learning.layers.cms.system._STEP", data.draw(st.sampled_from((4, 64)))):
        compare(cms, *case(data, cms))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_many_documents_are_read_as_if_alone(variant: str, data: st.DataObject) -> None:
    options = data.draw(st.sampled_from(RULES[:-1] if variant.startswith("nested") else RULES))
    cms = system(data.draw(st.sampled_from(SIZES)), variant, **options)
    with patch("nested_learning.layers.cms.system._STEP", data.draw(st.sampled_from((4, 64)))):
        compare(cms, *case(data, cms))


def starts(*lengths: int) -> Tensor:
    """[1, Σ lengths], first tokens of documents of these lengths."""
    begins = torch.zeros(1, sum(lengths), dtype=torch.bool)
    begins[0, list(itertools.accumulate((0, *lengths[:-1])))] = True
    return begins


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_a_document_reaches_another(variant: str) -> None:
    """Other tokens leave every bit of the others; another length leaves them to rounding; so does NaN."""
    cms = system((2, 4, 24), variant, rule="momentum")

    def results(x: Tensor, *lengths: int) -> tuple[Tensor, CMSState, Tensor]:
        x = x.requires_grad_()
        y, state = cms(x, documents=Documents(starts(*lengths)))
        return y, state, gradients(y, state, [x])[0]

    def pieces(y: Tensor, state: CMSState, g: Tensor, a: int) -> list[Tensor]:
        """Without the document in the middle, of a tokens."""
        return [t for part in (y, g) for t in (part[:, :30], part[:, 30 + a :])] + state.tensors()

    x = random(1, 68, WIDTH)
    before = pieces(*results(x.clone(), 30, 13, 25), 13)
    for value in (random(13, WIDTH, seed=5), torch.full((13, WIDTH), float("nan"))):
        other = x.clone()
        other[0, 30:43] = value
        for a, b in zip(before, pieces(*results(other, 30, 13, 25), 13), strict=True):
            assert torch.equal(a, b)
    longer = torch.cat([x[:, :30], random(1, 27, WIDTH, seed=5), x[:, 43:]], 1)

    def weighted(x: Tensor, *lengths: int) -> list[Tensor]:
        """Outputs, states, gradients of the outputs of the first and last document and of the state."""
        x = x.requires_grad_()
        y, state = cms(x, documents=Documents(starts(*lengths)))
        outer = torch.cat([y[:, :30], y[:, 30 + lengths[1] :]], 1)
        return pieces(y, state, gradients(outer, state, [x])[0], lengths[1])

    for a, b in zip(weighted(x.clone(), 30, 13, 25), weighted(longer, 30, 27, 25), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("said", ["documents", "position_ids", "ready"])
def test_every_way_to_say_where_documents_begin(said: str) -> None:
    cms = system((2, 4), "sequential")
    x = random(2, 9, WIDTH)
    numbers = torch.tensor([[5, 5, 5, 1, 1, 1, 1, 1, 5], [0, 1, 1, 1, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 0, 1, 2, 3, 4, 0, 1, 2]])
    ready = find_documents(x, None, False, documents=numbers)
    options = {"documents": numbers, "position_ids": positions, "ready": ready}
    y, state = cms(x, **{"documents" if said == "ready" else said: options[said]})
    wanted, after = alone(cms, x, positions == 0, torch.ones(2, 9, dtype=torch.bool), None, None)
    torch.testing.assert_close(y, wanted, **CLOSE)
    for a, b in zip(state.tensors(), after.tensors(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("update", ["none", "lm"])
def test_documents_are_nothing_to_static_blocks(update: str) -> None:
    torch.manual_seed(0)
    cms = ContinuumMemorySystem(WIDTH, [{"chunk_size": 2}, {"chunk_size": 4}], update=update).double()
    x = random(2, 9, WIDTH)
    per_row = [{"up.weight": random(2, *cms.blocks[0].up.weight.shape)}, None]
    for weights in (None, per_row):
        y, state = cms(x, weights=weights, documents=torch.arange(9)[None] // 3)
        assert state is None
        assert torch.equal(y, cms(x, weights=weights)[0])
        assert torch.equal(cms(x, weights=weights, documents=Documents(starts(9).expand(2, 9)))[0], y)
    for said in ({"documents": torch.zeros(2, 8)}, {"position_ids": torch.zeros(9, dtype=torch.long)}):
        with pytest.raises(ValueError, match=r"must be an integer tensor \[batch, tokens\] = \[2, 9\]"):
            cms(x, **said)
    with pytest.raises(ValueError, match=r"those of \[1, 9\] tokens, x has \[2, 9\]"):
        cms(x, documents=Documents(starts(9)))


def test_a_slow_level_costs_no_columns() -> None:
    """Work is that of the documents' chunks of the fastest level, whatever the slower ones' length."""
    seen = []

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(args[0].shape[:2].numel())

    lengths = [900, 500, 200, 70, 64, 40]
    x = random(1, sum(lengths), WIDTH)
    for keep, sizes in itertools.product((True, False), ((64, 2048), (512, 2048))):
        cms = system(sizes, "sequential")
        for block in cms.blocks:
            block.register_forward_hook(count)
        seen.clear()
        cms(x, documents=Documents(starts(*lengths), keep=keep))
        chunks = sum(-(-n // 64) * 64 for n in lengths)
        assert 2 * sum(lengths) <= sum(seen) <= 2 * (chunks + 3 * 256)
