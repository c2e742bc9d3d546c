"""`cms_update="lm"` on documents in a row: each learns as it would alone, no pair is of two of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nested_learning.memory.state import State
from nested_learning.models.hope.block_hope import Blocks, Piece, States, Tokens
from nested_learning.models.hope.lm_update import LMUpdate
from nested_learning.models.hope.modeling_hope import HopeForCausalLM
from nested_learning.ops.documents import Documents
from tests.models.small_models import VOCAB, small_model

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
MIXERS = ["attention", "titans"]
LEVELS: list[dict[str, Any]] = [{"chunk_size": 2}, {"chunk_size": 6, "rule": "momentum"}]


def learner(
    levels: list[dict[str, Any]], mixers: list[str] = MIXERS, **overrides: Any
) -> tuple[HopeForCausalLM, LMUpdate]:
    levels = [{"lr": 0.5, "expansion": 0.5, **level} for level in levels]
    model = small_model(mixers, cms_levels=levels, cms_update="lm", **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    blocks = Blocks(model.model.layers, model.model.norm, keep_hidden=True, want_surprise=True)
    exact = model.config.cms_meta_gradient == "exact"
    return model, LMUpdate(blocks, model.model.embed_tokens, model.lm_head, exact)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def rows_of(states: States, row: int) -> States:
    return {name: state.select_rows(torch.tensor([row])) for name, state in states.items()}


def alone(
    reader: LMUpdate, tokens: Tokens, begins: Tensor, states: States
) -> tuple[list[tuple[int, Tensor, Piece]], list[States]]:
    """Every document in a call of its own: row, columns and results of each, and each row's states."""
    x, ids, real, learn, _ = tokens
    assert ids is not None
    pieces, after = [], []
    for b in range(len(x)):
        columns = range(x.shape[1]) if real is None else real[b].nonzero().squeeze(1).tolist()
        cuts = [i for i, t in enumerate(columns) if i == 0 or begins[b, t]]
        own = rows_of(states, b)
        for start, stop in itertools.pairwise([*cuts, len(columns)] if len(columns) else []):
            at = torch.tensor(columns[start:stop])
            own = {} if begins[b, at[0]] else own
            taught = None if learn is None else learn[b : b + 1, at]
            piece, own = reader.read(Tokens(x[b : b + 1, at], ids[b : b + 1, at], None, taught), own)
            pieces.append((b, at, piece))
        after.append(own)
    return pieces, after


def seen(state: State) -> list[Tensor]:
    """Floating tensors of a state, keys and values without padding."""
    tensors = [t for t in state.tensors() if t.is_floating_point()]
    positions = getattr(state, "positions", None)
    if positions is None:
        return tensors
    return [t[:, :, positions[0] >= 0] for t in tensors]


def probe(t: Tensor, at: Tensor | slice = slice(None), row: int = 0) -> Tensor:
    """A sum with random weights, those of a row and of columns."""
    width = t.shape[2:]
    weights = torch.randn(4, 64, *width, generator=torch.Generator().manual_seed(5), dtype=t.dtype)
    return (t[0] * weights[row, at]).sum()


def compare(reader: LMUpdate, model: HopeForCausalLM, tokens: Tokens, begins: Tensor, states: States) -> None:
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if t.is_floating_point():
            leaves.append(t.detach().requires_grad_())
            return leaves[-1]
        return t

    states = {name: state.map(leaf) for name, state in states.items()}
    x = tokens.x.detach().requires_grad_()
    tokens = tokens._replace(x=x)
    pieces, wanted_after = alone(reader, tokens, begins, states)
    inputs = [x, *leaves, *model.parameters()]
    wanted_sum = sum((probe(t, at, b) for b, at, p in pieces for t in (p.y, *p.hidden)), x.new_zeros(()))
    for keep in (True, False):
        documents = Documents(begins, tokens.real, keep)
        got, after = reader.read(tokens._replace(documents=documents), states)
        for b, at, piece in pieces:
            ours = [
                t[b : b + 1, at] for t in (got.y, *got.hidden, *(s for s in got.surprise if s is not None))
            ]
            theirs = [piece.y, *piece.hidden, *(s for s in piece.surprise if s is not None)]
            for a, c in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, c, **CLOSE)
        total, want = x.new_zeros(()), wanted_sum
        for b, at, _ in pieces:
            total = total + sum(probe(t[b : b + 1, at], at, b) for t in (got.y, *got.hidden))
        assert bool(after) == keep
        for b, own in enumerate(wanted_after if keep else []):
            if not own:
                continue  # a row of padding alone, without a state
            row = rows_of(after, b)
            assert own.keys() == row.keys()
            for name in own:
                for a, c in zip(seen(row[name]), seen(own[name]), strict=True):
                    torch.testing.assert_close(a, c, **CLOSE)
                    total, want = total + a.square().sum(), want + c.square().sum()
        grads = [torch.autograd.grad(s, inputs, retain_graph=True, allow_unused=True) for s in (total, want)]
        for a, c, of in zip(*grads, inputs, strict=True):
            filled = (torch.zeros_like(of) if g is None else g for g in (a, c))
            torch.testing.assert_close(*filled, rtol=1e-8, atol=1e-10)


def case(data: st.DataObject, model: HopeForCausalLM, reader: LMUpdate) -> tuple[Tokens, Tensor, States]:
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 22))
    drawn = st.lists(st.floats(0, 1), min_size=rows * columns, max_size=rows * columns)
    begins = torch.tensor(data.draw(drawn)).view(rows, columns) < 0.15
    real = torch.tensor(data.draw(drawn)).view(rows, columns) < 0.8 if data.draw(st.booleans()) else None
    if real is not None and not real.any():
        real[0, 0] = True
    learn = torch.tensor(data.draw(drawn)).view(rows, columns) < 0.7 if data.draw(st.booleans()) else None
    states: States = {}
    embed = model.model.embed_tokens
    if data.draw(st.booleans()):
        ids = numbers(rows, 7, seed=3)
        before = torch.rand(rows, 7, generator=torch.Generator().manual_seed(rows)) < 0.7
        states = reader.read(Tokens(embed(ids), ids, before, None), {})[1]
    ids = numbers(rows, columns)
    return Tokens(embed(ids), ids, real, learn), begins, states


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_documents_learn_as_if_alone(variant: str, data: st.DataObject) -> None:
    model, reader = learner(LEVELS, cms_variant=variant)
    compare(reader, model, *case(data, model, reader))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("meta", ["first_order", "exact"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_many_documents_learn_as_if_alone(variant: str, meta: str, data: st.DataObject) -> None:
    levels = data.draw(st.sampled_from([LEVELS, [{"chunk_size": 3}], [{"chunk_size": 1}, {"chunk_size": 8}]]))
    mixers = data.draw(st.sampled_from([MIXERS, ["sliding_window_attention", "self_modifying_titans"]]))
    model, reader = learner(levels, mixers, cms_variant=variant, cms_meta_gradient=meta)
    model.train()
    compare(reader, model, *case(data, model, reader))


def test_exact_meta_gradients_are_those_of_each_document() -> None:
    model, reader = learner([{"chunk_size": 2}, {"chunk_size": 4}], cms_meta_gradient="exact")
    ids = numbers(1, 13)
    begins = torch.zeros(1, 13, dtype=torch.bool)
    begins[0, [0, 5, 9]] = True
    learn = torch.arange(13)[None] % 5 != 3
    compare(reader, model, Tokens(model.model.embed_tokens(ids), ids, None, learn), begins, {})


def test_nothing_of_a_document_reaches_another() -> None:
    """Other tokens, or NaN in them, leave every bit of the others; another length leaves them to rounding."""
    model, reader = learner([{"chunk_size": 2}, {"chunk_size": 4}, {"chunk_size": 24}])
    embed = model.model.embed_tokens

    def results(ids: Tensor, a: int, spoil: bool = False) -> list[Tensor]:
        """Outputs and input gradients without the a tokens from column 11 on, and the states."""
        x = embed(ids).detach()
        if spoil:
            x[:, 11 : 11 + a] = float("nan")
        x.requires_grad_()
        begins = torch.zeros(1, ids.shape[1], dtype=torch.bool)
        begins[0, [0, 11, 11 + a]] = True
        piece, states = reader.read(Tokens(x, ids, None, None, Documents(begins)), {})
        others = [torch.cat([t[:, :11], t[:, 11 + a :]], 1) for t in (piece.y, *piece.hidden)]
        (grad,) = torch.autograd.grad(sum(probe(t, slice(t.shape[1])) for t in others), x)
        after = [t for name in sorted(states) for t in seen(states[name])]
        return [*others, grad[:, :11], grad[:, 11 + a :], *after]

    ids = numbers(1, 30)
    other, longer = ids.clone(), torch.cat([ids[:, :11], numbers(1, 12, seed=9), ids[:, 18:]], 1)
    other[:, 11:18] = numbers(1, 7, seed=4)
    before = results(ids, 7)
    for changed in (results(other, 7), results(ids, 7, spoil=True)):
        for a, b in zip(before, changed, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(before, results(longer, 12), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("update", ["lm", "regression"])
def test_a_model_reads_documents_as_rows(update: str) -> None:
    """From `position_ids` to logits and the cache, with padding; and a stream goes on block by block."""
    levels = [{"lr": 0.5, "expansion": 0.5, **level} for level in LEVELS]
    model = small_model(MIXERS, cms_levels=levels, cms_update=update)
    ids, lengths = numbers(1, 17), (6, 8, 3)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        out = model(ids, position_ids=positions, use_cache=True)
        parts = [model(part, use_cache=True) for part in ids.split(lengths, 1)]
        torch.testing.assert_close(out.logits, torch.cat([p.logits for p in parts], 1), **CLOSE)
        nextid = numbers(1, 5, seed=2)
        more = model(nextid, past_key_values=out.past_key_values).logits
        wanted = model(nextid, past_key_values=parts[-1].past_key_values).logits
        torch.testing.assert_close(more, wanted, **CLOSE)
