"""torch.export with open sizes, and ONNX of given ones."""

import pytest
import torch
from torch import nn

from tests.models.small_models import OPTIONS, VOCAB, small_model

# Mixers whose exported program may leave the length open, and others, whose chunks are counted.
# The slow ones are made of the operations of the first.
ANY_LENGTH = ["gated_deltanet", pytest.param("linear_attention", marks=pytest.mark.slow), "attention"]
GIVEN_LENGTH = ["self_modifying_titans", pytest.param("titans", marks=pytest.mark.slow)]
ROWS = torch.export.Dim("rows", min=2, max=16)
TOKENS = torch.export.Dim("tokens", min=4, max=64)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def logits_of(name, monkeypatch):
    monkeypatch.setitem(OPTIONS, name, OPTIONS.get(name, {}))
    return Logits(small_model([name]).float()).eval()


def ids_of(rows, tokens):
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))


@torch.no_grad()
def check(program, model, sizes):
    for rows, tokens in sizes:
        ids = ids_of(rows, tokens)
        torch.testing.assert_close(program(ids), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ANY_LENGTH)
def test_any_number_of_rows_and_tokens(name, monkeypatch):
    model = logits_of(name, monkeypatch)
    with torch.no_grad():
        program = torch.export.export(model, (ids_of(2, 13),), dynamic_shapes=({0: ROWS, 1: TOKENS},))
    check(program.module(), model, [(2, 13), (3, 4), (5, 33), (2, 64)])


def test_a_model_is_exported_as_it_is(monkeypatch):
    """Without a word on caches, which a program cannot return; the default of a plain call is one."""
    model = logits_of("gated_deltanet", monkeypatch).model
    ids = ids_of(2, 5)
    with torch.no_grad():
        assert model(ids).past_key_values is not None
        found = torch.export.export(model, (ids,)).module()(ids)
        torch.testing.assert_close(found.logits, model(ids).logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=r"use_cache is True, .* give use_cache=False"):
            torch.export.export(model, (ids,), kwargs={"use_cache": True})


@pytest.mark.parametrize("name", GIVEN_LENGTH)
def test_any_number_of_rows(name, monkeypatch):
    """Two chunks, of which the second is not full."""
    options = dict.fromkeys(OPTIONS[name], 4)
    monkeypatch.setitem(OPTIONS, name, options)
    model = logits_of(name, monkeypatch)
    with torch.no_grad():
        program = torch.export.export(model, (ids_of(2, 5),), dynamic_shapes=({0: ROWS},))
    check(program.module(), model, [(2, 5), (5, 5)])


@pytest.mark.parametrize(
    ("name", "tokens"),  # within the projections' chunk, and beyond
    [
        ("titans", 7),
        pytest.param("self_modifying_titans", 7, marks=pytest.mark.slow),
        pytest.param("titans", 9, marks=pytest.mark.slow),
        pytest.param("self_modifying_titans", 9, marks=pytest.mark.slow),
    ],
)
def test_a_length_whose_chunks_are_counted_is_not_left_open(name, tokens, monkeypatch):
    model = logits_of(name, monkeypatch)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        torch.export.export(model, (ids_of(2, tokens),), dynamic_shapes=({1: TOKENS},))


@pytest.mark.parametrize("name", ["gated_deltanet", "attention", "titans"])
def test_onnx_of_a_given_length(name, monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, ids = logits_of(name, monkeypatch), ids_of(2, 8)
    with torch.no_grad():
        program = torch.onnx.export(model, (ids,), dynamo=True, verbose=False)
        expected = model(ids)
    program.save(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (got,) = session.run(None, {session.input_names[0]: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=1e-5)
