"""Every row of docs/models.md against the token loop: outputs, surprise, final state and every gradient.

Float64, relative tolerance 1e-9 per tensor. The oracle knows the equations alone and reads no library code.
Titans and self-modifying Titans are in test_memory_layer_vs_oracle.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nested_learning import layers
from tests.layers.test_memory_layer_vs_oracle import assert_close, gradients, make_mask, normal, run_library
from tests.oracles import memory_table as oracle

D, H, B = 8, 2, 2


@dataclass(frozen=True)
class Case:
    """One comparison; `pieces` None feeds the sequence whole, `parts` are those of a ComposedMemory."""

    layer: str
    model: oracle.Model
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] | None = None
    expansion: float = 1.0
    eta_max: float = 0.5
    chunk: int = 4
    tokens: int = 11
    mask: str = "none"
    conv_size: int = 4
    pieces: tuple[int, ...] | None = None
    scale_initial: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        chosen = {**self.options, **(self.parts or {})}
        flags = [f"{name}={value}" for name, value in chosen.items() if name != "eta_max"]
        flags += ["streamed"] if self.pieces else []
        return "-".join([self.layer, *flags, f"chunk{self.chunk}", f"T{self.tokens}", f"mask-{self.mask}"])


def build(case: Case) -> torch.nn.Module:
    options = {"num_heads": H, "conv_size": case.conv_size, **case.options}
    if case.parts is None:
        options["chunk_size"] = case.chunk
    else:
        options["parts"] = {"chunk_size": case.chunk, **case.parts}
    return getattr(layers, case.layer)(D, **options).double()


def leaves_of(case: Case) -> dict[str, Tensor]:
    """The layer's input and parameters."""
    params = oracle.random_params(
        case.model, D, H, expansion=case.expansion, conv_size=case.conv_size, seed=case.seed
    )
    params |= {name: case.scale_initial * W for name, W in params.items() if name.startswith("initial.")}
    return {"x": normal(B, case.tokens, D, seed=case.seed + 1), **params}


def run_layer(case: Case, values: dict[str, Tensor], mask: Tensor | None):
    """Results of the library and the leaves that they depend on."""
    layer = build(case)
    layer.load_state_dict({name: value for name, value in values.items() if name != "x"})
    leaves = {"x": values["x"].clone().requires_grad_(), **dict(layer.named_parameters())}
    return run_library(layer, leaves["x"], mask, case.pieces), leaves


def run_oracle(case: Case, values: dict[str, Tensor], mask: Tensor | None):
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    params = {name: value for name, value in leaves.items() if name != "x"}
    chosen = {**case.options, **(case.parts or {})}.get("eta_max")
    eta_max = (chosen or 1.0) if case.model.gradient == "token" else case.eta_max
    results = oracle.memory_layer(
        case.model,
        params,
        leaves["x"],
        num_heads=H,
        chunk_size=case.chunk,
        eta_max=eta_max,
        mask=mask,
        conv_size=case.conv_size,
    )
    return results, leaves


def differentiable_parts(results: tuple[Tensor, dict[str, Any], Tensor]) -> dict[str, Tensor]:
    y, state, surprise = results
    parts = {"y": y, "surprise": surprise}
    for name in ("current", "anchor", "momentum"):
        parts |= {f"{name}.{matrix}": value for matrix, value in (state[name] or {}).items()}
    if state["conv_tail"] is not None and state["conv_tail"].numel():
        parts["conv_tail"] = state["conv_tail"]
    return parts


def gradients_of(parts: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of everything but the surprise, which is a report: nothing is learned through it."""
    learned = {name: part for name, part in parts.items() if name != "surprise"}
    return {f"gradient of {name}": slope for name, slope in gradients(learned, leaves).items()}


def compare(case: Case) -> None:
    values, mask = leaves_of(case), make_mask(case.mask, case.tokens)
    results, leaves = run_layer(case, values, mask)
    results_ref, leaves_ref = run_oracle(case, values, mask)

    parts, parts_ref = differentiable_parts(results), differentiable_parts(results_ref)
    assert parts.keys() == parts_ref.keys()
    for name in parts_ref:
        assert_close(parts[name], parts_ref[name], name)
    assert results[1]["position"].tolist() == results_ref[1]["position"].tolist()
    if mask is not None:
        assert not results[0][~mask].any(), "a padded token has an output"

    slopes, slopes_ref = gradients_of(parts, leaves), gradients_of(parts_ref, leaves_ref)
    assert slopes.keys() == slopes_ref.keys()
    for name in slopes_ref:
        assert_close(slopes[name], slopes_ref[name], name)


def laps(case: Case) -> list[Case]:
    """Whole; left-padded; with holes and in pieces with the state carried."""
    streamed = replace(case, mask="holes", pieces=(1, 4, 2, 3, 1), seed=case.seed + 20)
    return [case, replace(case, mask="left", seed=case.seed + 10), streamed]


def row(layer: str, model: oracle.Model, seed: int, **options: Any) -> Case:
    """A class of the table; memories whose gradients come from an anchor get a largest rate of 0.5."""
    options |= {"eta_max": 0.5} if model.gradient == "anchor" else {}
    return Case(layer, model, options, expansion=options.get("expansion", 1.0), seed=seed)


def composed(model: oracle.Model, seed: int, **parts: Any) -> Case:
    parts |= {"eta_max": 0.5} if model.gradient == "anchor" else {}
    return Case("ComposedMemory", model, parts=parts, expansion=parts.get("expansion", 1.0), seed=seed)


DGD = {"architecture": "matrix", "objective": "dot", "rule": "dgd", "gradient": "token"}
EXACT_ROWS = [
    row("LinearAttention", oracle.LINEAR_ATTENTION, 100),
    row("RetNet", oracle.RETNET, 200),
    row("DeltaNet", oracle.DELTANET, 300),
    row("GatedDeltaNet", oracle.GATED_DELTANET, 400),
    row("OjaNet", oracle.OJA, 500),
    composed(oracle.DGD_DOT, 600, **DGD),
    composed(replace(oracle.DGD_DOT, momentum=True), 700, **DGD, momentum=True),
]
ANCHORED_ROWS = [
    row("TTTLinear", oracle.TTT_LINEAR, 1000),
    row("TTTMLP", oracle.TTT_MLP, 1100, expansion=2.0),
    row("DLA", oracle.DLA, 1200),
    row("Moneta", oracle.MONETA, 1300, expansion=2.0),
    row("Yaad", oracle.YAAD, 1400, expansion=2.0),
    row("Memora", oracle.MEMORA, 1500, expansion=2.0),
    composed(oracle.SWIGLU, 1600, architecture="swiglu", expansion=2.0),
]
GELU_MLP = oracle.mlp(2, F.gelu)  # MIRAS' rows keep their activation with norm="hidden"


def depth(levels: int) -> Case:
    return row("TTTMLP", oracle.with_depth(oracle.TTT_MLP, levels), 2000 + levels, depth=levels)


def momentum(layer: str, model: oracle.Model, seed: int) -> Case:
    return row(layer, replace(model, momentum=True), seed, expansion=2.0, momentum=True)


def read_chunk(layer: str, model: oracle.Model, seed: int) -> Case:
    return row(layer, replace(model, read="chunk"), seed, expansion=2.0, read="chunk")


def hidden_norm(layer: str, model: oracle.Model, seed: int) -> Case:
    return row(layer, replace(model, answer=GELU_MLP), seed, expansion=2.0, norm="hidden")


MATRIX = oracle.Model()
VARIANTS = [
    *(depth(levels) for levels in (1, 3, 4)),
    laps(depth(3))[2],
    row("Moneta", replace(oracle.MONETA, p=2.5, q=3.0), 2100, expansion=2.0, p=2.5, q=3.0),
    hidden_norm("Moneta", oracle.MONETA, 2200),
    hidden_norm("Yaad", replace(oracle.YAAD, clip_output=False), 2210),
    hidden_norm("Memora", oracle.MEMORA, 2220),
    momentum("TTTMLP", oracle.TTT_MLP, 2300),
    momentum("Moneta", oracle.MONETA, 2310),
    laps(momentum("Yaad", oracle.YAAD, 2320))[2],
    laps(momentum("Memora", oracle.MEMORA, 2330))[2],
    row("DLA", replace(oracle.DLA, momentum=False), 2340, momentum=False),
    replace(read_chunk("TTTLinear", oracle.TTT_LINEAR, 2400), options={"read": "chunk", "eta_max": 0.5}),
    read_chunk("TTTMLP", oracle.TTT_MLP, 2410),
    laps(read_chunk("DLA", oracle.DLA, 2420))[2],
    read_chunk("Moneta", oracle.MONETA, 2430),
    read_chunk("Yaad", oracle.YAAD, 2440),
    composed(replace(oracle.SWIGLU, momentum=True), 2500, architecture="swiglu", momentum=True),
    composed(replace(oracle.MLP, decay="constant"), 2510, decay="constant"),
    composed(replace(oracle.MLP, decay="none", objective="huber"), 2520, decay="none", objective="huber"),
    composed(
        replace(oracle.DLA, momentum_scaled=False, decay="none"),
        2530,
        objective="dot",
        decay="none",
        momentum=True,
        momentum_scaled=False,
    ),
    composed(
        replace(oracle.DGD_DOT, momentum=True, momentum_scaled=False, decay="none"),
        2540,
        **DGD,
        decay="none",
        momentum=True,
        momentum_scaled=False,
    ),
    composed(replace(MATRIX, objective="huber"), 2550, architecture="matrix", objective="huber"),
    composed(
        replace(MATRIX, objective="lp", clip_output=True, momentum=True),
        2560,
        architecture="matrix",
        objective="lp",
        momentum=True,
    ),
    composed(
        replace(oracle.MONETA, objective="l2", decay="constant"),
        2570,
        norm="output",
        activation="gelu",
        form="lq",
        decay="constant",
    ),
]
EDGES = [
    # The mask of a row that has no token at all.
    *(replace(case, tokens=6, mask="empty_row") for case in (EXACT_ROWS[3], ANCHORED_ROWS[2])),
    *(replace(case, tokens=6, pieces=(1,) * 6) for case in (EXACT_ROWS[4], ANCHORED_ROWS[3])),
    *(replace(case, tokens=1) for case in (EXACT_ROWS[1], ANCHORED_ROWS[4])),
    replace(EXACT_ROWS[3], tokens=6, conv_size=0),
    replace(ANCHORED_ROWS[1], tokens=6, conv_size=1),
    replace(ANCHORED_ROWS[5], tokens=5, chunk=1),
    replace(ANCHORED_ROWS[6], tokens=5, chunk=16),
    # Norms below the floors of Moneta's form: 0.1, so that the scale does not depend on what is stored.
    replace(ANCHORED_ROWS[3], scale_initial=0.01, eta_max=1e-3, options={"expansion": 2.0, "eta_max": 1e-3}),
]


@pytest.mark.parametrize("case", [lap for case in EXACT_ROWS for lap in laps(case)], ids=str)
def test_gradient_at_every_token(case):
    compare(case)


@pytest.mark.parametrize("case", [lap for case in ANCHORED_ROWS for lap in laps(case)], ids=str)
def test_gradient_at_the_anchor(case):
    compare(case)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants(case):
    compare(case)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(case):
    compare(case)


@pytest.mark.parametrize("case", EXACT_ROWS, ids=str)
def test_the_chunk_length_of_an_exact_row_changes_nothing(case):
    """The oracle has no chunks there; a chunk of 4 is compared with it above."""
    values, mask = leaves_of(case), make_mask("holes", case.tokens)
    results = []
    for chunk in (4, 1, 3, 64):
        outcome, leaves = run_layer(replace(case, chunk=chunk), values, mask)
        parts = differentiable_parts(outcome)
        results.append(parts | gradients_of(parts, leaves))
    for other in results[1:]:
        for name, expected in results[0].items():
            assert_close(other[name], expected, name)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (ANCHORED_ROWS[0], 0.25),
        (ANCHORED_ROWS[2], 0.25),
        (ANCHORED_ROWS[3], 0.25 / 6),
        (row("Moneta", replace(oracle.MONETA, p=2.5), 1310, expansion=2.0, p=2.5), 0.25 / 3.75),
        (ANCHORED_ROWS[4], 0.25),
        (ANCHORED_ROWS[5], 0.25),
        (ANCHORED_ROWS[6], 0.25),
    ],
    ids=str,
)
def test_default_largest_rate(case, expected):
    """min(0.5, 4 / chunk), divided by p (p − 1) for L_p; 0.5 at a chunk of 4."""
    for chunk, eta_max in ((16, expected), (4, 2 * expected)):
        options, parts = dict(case.options), dict(case.parts or {})
        (parts if case.parts is not None else options)["eta_max"] = None
        parts_or_none = parts if case.parts is not None else None
        compare(replace(case, options=options, parts=parts_or_none, eta_max=eta_max, chunk=chunk, tokens=5))


def test_cases_reach_both_sides_of_every_threshold(monkeypatch):
    """Gradients above and below the clip, errors above and below δ, norms above and below Moneta's floor."""
    seen: set[tuple[str, bool]] = set()
    clip, slope, weights_of = oracle.clip, oracle.slope, oracle.weights_of

    def watch_clip(g: Tensor) -> Tensor:
        seen.add(("clip", bool(g.norm() > 1)))
        return clip(g)

    def watch_slope(model, answer, token):
        if token.width is not None:
            seen.add(("width", bool((answer - token.v).norm() > token.width)))
        return slope(model, answer, token)

    def watch_norm(model, stored, anchor):
        if model.form == "q_norm":
            norms = [A.abs().pow(model.q).sum() ** (1 / model.q) for A in anchor.values()]
            seen.update(("norm", bool(norm > 0.1)) for norm in norms)
        return weights_of(model, stored, anchor)

    monkeypatch.setattr(oracle, "clip", watch_clip)
    monkeypatch.setattr(oracle, "slope", watch_slope)
    monkeypatch.setattr(oracle, "weights_of", watch_norm)
    for case in (ANCHORED_ROWS[3], ANCHORED_ROWS[4], EDGES[-1]):
        run_oracle(case, leaves_of(case), None)
    assert seen == {(name, side) for name in ("clip", "width", "norm") for side in (True, False)}


HIGH = [
    row("DeltaNet", oracle.DELTANET, 3000, eta_max=1.9),
    row("GatedDeltaNet", oracle.GATED_DELTANET, 3100, eta_max=2.0),
    row("OjaNet", oracle.OJA, 3200, eta_max=1.9),
    composed(oracle.DGD_DOT, 3300, **DGD, eta_max=2.0),
    composed(replace(oracle.DGD_DOT, momentum=True), 3400, **DGD, momentum=True, eta_max=1.9),
]


@pytest.mark.parametrize("case", [lap for case in HIGH for lap in laps(case)], ids=str)
def test_rates_above_one(case):
    compare(case)
