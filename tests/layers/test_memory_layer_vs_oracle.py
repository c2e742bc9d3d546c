"""SelfModifyingTitans and Titans against the token loop: outputs, surprise, final state and every gradient.

Float64, relative tolerance 1e-9 per tensor. The oracle knows the equations alone and reads no library code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nested_learning.layers import SelfModifyingTitans, Titans
from tests.oracles import memory_layer as oracle

D, H, B = 8, 2, 2
TOLERANCE = 1e-9
RULES = ("dgd", "dgd_literal", "gd")


@dataclass(frozen=True)
class Case:
    """One comparison; `projection` None is Titans, `pieces` None feeds the sequence whole."""

    rule: str = "dgd"
    chunk: int = 4
    projection: int | None = 4
    momentum: bool = False
    momentum_scaled: bool = True
    read: str = "token"
    adaptive: str = "kv"
    decay: str = "gated"
    expansion: float = 1.0
    tokens: int = 11
    mask: str = "none"
    conv_size: int = 4
    pieces: tuple[int, ...] | None = None
    projection_eta_max: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        chunks = f"{self.chunk}" if self.projection is None else f"{self.chunk}/{self.projection}"
        flags = ["momentum"] if self.momentum else []
        flags += [] if self.adaptive == "kv" else [f"adaptive-{self.adaptive}"]
        flags += [] if self.decay == "gated" else [f"decay-{self.decay}"]
        flags += [] if self.momentum_scaled else ["unscaled"]
        flags += ["streamed"] if self.pieces else []
        flags += [] if self.projection_eta_max is None else [f"projection-{self.projection_eta_max:g}"]
        sizes = [f"e{self.expansion:g}", f"T{self.tokens}", f"conv{self.conv_size}", f"mask-{self.mask}"]
        return "-".join([self.rule, f"chunks{chunks}", f"read-{self.read}", *flags, *sizes])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_mask(kind: str, tokens: int) -> Tensor | None:
    """[B, T], True = real; the two rows always differ, so their chunk boundaries do too."""
    if kind == "none":
        return None
    mask = torch.ones(B, tokens, dtype=torch.bool)
    if kind == "left":
        mask[0, :1] = False
        mask[1, :3] = False
    elif kind == "holes":
        mask[0, 2:4] = False
        mask[1, ::3] = False
    elif kind == "empty_row":
        mask[0, -2:] = False
        mask[1] = False
    else:
        raise ValueError(kind)
    return mask


def options_of(case: Case) -> dict[str, Any]:
    """The keywords that the layers' constructors and the oracle share."""
    names = ["rule", "momentum", "momentum_scaled", "read", "conv_size"]
    options = {name: getattr(case, name) for name in names}
    options |= {"num_heads": H, "chunk_size": case.chunk}
    if case.projection is not None:
        options |= {"projection_chunk_size": case.projection, "decay": case.decay}
        options["projection_eta_max"] = case.projection_eta_max
    return options


def build(case: Case, params: dict[str, Tensor], eta_max: float | None) -> torch.nn.Module:
    layer_type, adaptive = Titans, {}
    if case.projection is not None:
        layer_type = SelfModifyingTitans
        adaptive = {f"adaptive_{path}": path in case.adaptive for path in "kvq"}
    options = adaptive | options_of(case)
    layer = layer_type(hidden_size=D, expansion=case.expansion, eta_max=eta_max, **options).double()
    layer.load_state_dict(params)
    return layer


def run_library(layer: torch.nn.Module, x: Tensor, mask: Tensor | None, pieces: tuple[int, ...] | None):
    """Whole, or in pieces with the state carried; the state comes back as the oracle's dict."""
    sizes = list(pieces) if pieces else [x.shape[1]]
    assert sum(sizes) == x.shape[1]
    masks = [None] * len(sizes) if mask is None else mask.split(sizes, dim=1)
    outputs, surprises, state = [], [], None
    for x_piece, mask_piece in zip(x.split(sizes, dim=1), masks, strict=True):
        y, state, surprise = layer(x_piece, state=state, mask=mask_piece, return_surprise=True)
        outputs.append(y)
        surprises.append(surprise)
    assert state is not None
    fields = ("current", "anchor", "momentum", "position", "conv_tail")
    return (
        torch.cat(outputs, dim=1),
        {field: getattr(state, field) for field in fields},
        torch.cat(surprises, dim=1),
    )


def run_oracle(case: Case, params: dict[str, Tensor], x: Tensor, mask: Tensor | None, eta_max: float):
    if case.projection is None:
        return oracle.titans(params, x, mask=mask, eta_max=eta_max, **options_of(case))
    options = {"adaptive": case.adaptive, **options_of(case)}
    return oracle.self_modifying_titans(params, x, mask=mask, eta_max=eta_max, **options)


def differentiable_parts(y: Tensor, state: dict[str, Any], momentum: bool) -> dict[str, Tensor]:
    parts = {"y": y}
    for field in ("current", "anchor", *(["momentum"] if momentum else [])):
        parts |= {f"{field}.{name}": state[field][name] for name in ("W1", "W2")}
    if state["conv_tail"] is not None and state["conv_tail"].numel():
        parts["conv_tail"] = state["conv_tail"]
    return parts


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Relative to the largest entry of the tensor."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} != {expected.dtype}"
    bound = TOLERANCE * float(expected.detach().abs().max()) + 1e-14
    error = float((actual - expected).detach().abs().max())
    assert error <= bound, f"{name}: error {error:.2e} > {bound:.2e}"


def gradients(parts: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random projection of all parts, to every leaf (zero where nothing depends on it)."""
    total = sum(
        (parts[name] * normal(*parts[name].shape, seed=100 + i)).sum() for i, name in enumerate(parts)
    )
    slopes = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, slopes, strict=True))


def compare(case: Case, eta_max: float | None = 0.5, expected_eta_max: float = 0.5) -> None:
    params = oracle.random_params(
        D,
        H,
        self_modifying=case.projection is not None,
        adaptive=case.adaptive,
        decay=case.decay,
        momentum=case.momentum,
        expansion=case.expansion,
        conv_size=case.conv_size,
        seed=case.seed,
    )
    x, mask = normal(B, case.tokens, D, seed=case.seed + 1), make_mask(case.mask, case.tokens)

    layer = build(case, params, eta_max)
    library_leaves = {"x": x.clone().requires_grad_(), **dict(layer.named_parameters())}
    y, state, surprise = run_library(layer, library_leaves["x"], mask, case.pieces)

    leaves = {name: value.clone().requires_grad_() for name, value in {"x": x, **params}.items()}
    oracle_params = {name: value for name, value in leaves.items() if name != "x"}
    y_ref, state_ref, surprise_ref = run_oracle(case, oracle_params, leaves["x"], mask, expected_eta_max)

    parts = differentiable_parts(y, state, case.momentum)
    parts_ref = differentiable_parts(y_ref, state_ref, case.momentum)
    assert parts.keys() == parts_ref.keys()
    for name in parts_ref:
        assert_close(parts[name], parts_ref[name], name)
    assert_close(surprise, surprise_ref, "surprise")
    assert state["position"].tolist() == state_ref["position"].tolist()
    assert (state["momentum"] is None) == (not case.momentum)
    if mask is not None:
        assert not y[~mask].any(), "a padded token has an output"

    assert library_leaves.keys() == leaves.keys()
    slopes, slopes_ref = gradients(parts, library_leaves), gradients(parts_ref, leaves)
    for name in leaves:
        assert_close(slopes[name], slopes_ref[name], f"gradient of {name}")


def self_modifying_cases() -> list[Case]:
    """Every rule × momentum × read, twice; the other options rotate so that each meets the others."""
    chunks, masks = [(4, 4), (6, 2), (2, 4)], ["none", "left", "holes"]
    cases = []
    for i, (lap, rule, momentum, read) in enumerate(
        product(range(2), RULES, (False, True), ("token", "chunk"))
    ):
        chunk, projection = chunks[(i + lap) % 3]
        cases.append(
            Case(
                rule=rule,
                chunk=chunk,
                projection=projection,
                momentum=momentum,
                read=read,
                adaptive="kvq" if (i // 2 + i // 4 + lap) % 2 == 1 else "kv",
                expansion=1.0 + (i // 4 + i + lap) % 2,
                tokens=(7, 9, 7, 8, 10)[i % 5],
                mask=masks[(i // 3 + lap) % 3],
                seed=10 * i,
            )
        )
    return cases


def titans_cases() -> list[Case]:
    masks = ["none", "left", "holes"]
    return [
        Case(
            rule=rule,
            chunk=(3, 4, 5)[i % 3],
            projection=None,
            momentum=momentum,
            read=read,
            expansion=1.0 + (i // 2) % 2,
            tokens=(7, 9, 7, 8, 10)[i % 5],
            mask=masks[(i // 2) % 3],
            seed=1000 + 10 * i,
        )
        for i, (rule, momentum, read) in enumerate(product(RULES, (False, True), ("token", "chunk")))
    ]


STREAM = Case(momentum=True, tokens=13, pieces=(1, 5, 2, 4, 1), seed=2000)
SINGLE_TOKENS = replace(STREAM, tokens=9, pieces=(1,) * 9)
STREAMED_CASES = [
    replace(STREAM, chunk=6, projection=2, mask="left"),
    replace(STREAM, chunk=2, projection=4, mask="holes", adaptive="kvq", read="chunk"),
    replace(STREAM, rule="gd", momentum=False, mask="empty_row"),
    replace(STREAM, rule="dgd_literal", chunk=4, projection=2, expansion=2.0),
    replace(SINGLE_TOKENS, chunk=4, projection=2, mask="holes"),
    replace(SINGLE_TOKENS, rule="gd", projection=None, chunk=4),
    replace(STREAM, rule="gd", projection=None, mask="left", read="chunk"),
]
EDGE_CASES = [
    Case(chunk=16, projection=16, tokens=7, momentum=True),  # the chunk never ends
    Case(chunk=1, projection=1, tokens=7),  # every token is a boundary
    Case(chunk=4, projection=1, tokens=8, momentum=True),
    Case(tokens=1, mask="none"),
    Case(tokens=8, mask="empty_row", momentum=True),
    Case(momentum=True, momentum_scaled=False, chunk=4, projection=2),
    Case(momentum=True, momentum_scaled=False, projection=None, rule="gd"),
    Case(conv_size=0),
    Case(adaptive="v", mask="holes"),
    Case(adaptive="k", momentum=True, projection=2),
    Case(adaptive="", tokens=9),
    Case(decay="none", mask="left"),
    Case(decay="none", adaptive="kvq", momentum=True, tokens=9),
    Case(decay="none", rule="gd", adaptive="q", projection=2, pieces=(5, 1, 5)),
    Case(conv_size=1, momentum=True),
    Case(conv_size=2, mask="holes", projection=None, rule="gd"),
    Case(tokens=2, mask="left", conv_size=4),  # shorter than the convolution
]


@pytest.mark.parametrize("case", self_modifying_cases(), ids=str)
def test_self_modifying_titans(case):
    compare(case)


@pytest.mark.parametrize("case", titans_cases(), ids=str)
def test_titans(case):
    compare(case)


@pytest.mark.parametrize("case", STREAMED_CASES, ids=str)
def test_streaming_in_uneven_pieces(case):
    compare(case)


@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_edges(case):
    compare(case)


@pytest.mark.parametrize("projection", [16, None], ids=["self_modifying", "titans"])
@pytest.mark.parametrize(("rule", "expected"), [("dgd", 0.5), ("dgd_literal", 0.5), ("gd", 0.25)])
def test_default_eta_max_follows_the_rule(rule, expected, projection):
    """0.5, and min(0.5, 4 / chunk_size) where nothing is erased."""
    case = Case(rule=rule, chunk=16, projection=projection, tokens=7)
    compare(case, eta_max=None, expected_eta_max=expected)


PACES = [
    Case(projection_eta_max=pace, adaptive=adaptive, mask=mask, pieces=pieces, tokens=9, seed=7)
    for pace, adaptive in ((0.0, "kvq"), (0.2, "kv"))
    for mask, pieces in (("none", None), ("holes", (1, 5, 3)))
]
PACES.append(Case(projection_eta_max=0.2, decay="none", tokens=9, seed=7))


@pytest.mark.parametrize("eta_max", [0.5, pytest.param(1.9, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize("case", PACES, ids=str)
def test_generating_memories_at_a_pace_of_their_own(case, eta_max):
    compare(case, eta_max=eta_max, expected_eta_max=eta_max)


@pytest.mark.parametrize(
    "case",
    [
        replace(PACES[2], rule="gd"),
        replace(PACES[2], rule="dgd_literal"),
        replace(PACES[2], momentum=True),
        replace(PACES[2], momentum=True, rule="gd", read="chunk"),
        replace(PACES[2], projection=8),
        replace(PACES[2], projection=2, mask="left"),
    ],
    ids=str,
)
def test_a_pace_of_their_own_with_each_rule_and_schedule(case):
    compare(case)


HIGH = [
    *(Case(tokens=9, seed=8), Case(tokens=9, adaptive="kvq", expansion=2.0, seed=9)),
    Case(tokens=9, mask="holes", pieces=(1, 5, 3), seed=10),
    Case(tokens=9, momentum=True, seed=11),
    *(Case(tokens=9, projection=None, momentum=m, seed=12) for m in (False, True)),
]


@pytest.mark.parametrize("eta_max", [pytest.param(1.5, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize("case", HIGH, ids=str)
def test_rates_above_one(case, eta_max):
    compare(case, eta_max=eta_max, expected_eta_max=eta_max)
