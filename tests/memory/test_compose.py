"""What `compose` refuses and why, and that whatever it accepts runs."""

from __future__ import annotations

import random
import re
from itertools import product
from typing import Any

import pytest
import torch

from nested_learning.layers import ComposedMemory
from nested_learning.memory.architecture import Matrix, ResidualMLP
from nested_learning.memory.compose import compose, compose_parts
from nested_learning.memory.objective import L2, Huber
from nested_learning.memory.system import MatrixRule, MemorySystem, learning_rule

TOKEN = {"architecture": "matrix", "gradient": "token"}

# (parts, what came, how to fix it): both are in the message.
NAMES = [
    ({"architecture": "mpl"}, "'mpl'", "Did you mean 'mlp'?"),
    ({"objective": "hubert"}, "'hubert'", "Did you mean 'huber'?"),
    ({"rule": "dgd_literally"}, "'dgd_literally'", "Did you mean 'dgd_literal'?"),
    ({"decay": "const"}, "'const'", "'none', 'constant' or 'gated'"),
    ({"form": "lp"}, "'lp'", "'linear', 'lq' or 'kl'"),
    ({"gradient": "chunk"}, "'chunk'", "('anchor', 'token')"),
    ({"rate": "constant"}, "'constant'", "('gated', 'one')"),
    ({"read": "anchor"}, "'anchor'", "('token', 'chunk')"),
    ({"activation": "tanh"}, "'tanh'", "activation must be one of"),
    ({"norm": "layer"}, "'layer'", "'hidden' or 'output'"),
    ({"unit": ("k", "queries")}, "queries", "among k, v and q"),
    ({"generated": ("k", "mu")}, "'mu'", "('k', 'v', 'q', 'eta', 'alpha')"),
    ({"generated": ("k", "k")}, "('k', 'k')", "distinct"),
]
NUMBERS = [
    ({"chunk_size": 0}, "got 0", "chunk_size must be a positive integer"),
    ({"chunk_size": 2.0}, "got 2.0", "chunk_size must be a positive integer"),
    ({"chunk_size": True}, "got True", "chunk_size must be a positive integer"),
    (
        {"generated": ("k",), "projection_chunk_size": -4},
        "got -4",
        "projection_chunk_size must be a positive integer",
    ),
    (
        {"generated": ("k",), "chunk_size": 8, "projection_chunk_size": 3},
        "chunk_size=8 and projection_chunk_size=3",
        "6 and 3 would do",
    ),
    ({"eta_max": 0.0}, "0.0", "(0, 1]"),
    ({"eta_max": 1.5}, "1.5", "(0, 1]"),
    ({"eta_max": float("nan")}, "nan", "(0, 1]"),
    ({"eta_max": 2.5, "rule": "dgd", "norm": "hidden"}, "(0, 2], got 2.5", "beyond 2 the erase I − η k kᵀ"),
    ({"eta_max": 1.5, "rule": "dgd", "norm": "output"}, "1.5", "(0, 1]"),
    ({"eta_max": 1.5, "rule": "dgd_literal"}, "1.5", "up to 2 goes with an erase of unit-norm inputs"),
    ({"eta_max": 1.5, "rule": "dgd", "depth": 1, "unit": ("v",)}, "1.5", "(0, 1]"),
    ({"eta_max": 1.5, "architecture": "matrix", "gradient": "token", "unit": ("v", "q")}, "1.5", "(0, 1]"),
    (
        {"generated": ("k",), "projection_eta_max": 0.6, "eta_max": 0.5},
        "[0, eta_max] = [0, 0.5], got 0.6",
        "not faster",
    ),
    ({"generated": ("k",), "projection_eta_max": -0.1}, "got -0.1", "[0, eta_max]"),
    ({"generated": ("k",), "projection_eta_max": float("nan")}, "got nan", "[0, eta_max]"),
    ({"projection_eta_max": 0.05}, "generated is ()", "leave it out"),
    ({"generated": ("k",), "rate": "one", "projection_eta_max": 0.01}, "rate 'one'", "leave it out"),
    ({"depth": 0}, "got 0", "depth must be 1 to"),
    ({"depth": 100}, "got 100", "depth must be 1 to"),
    ({"depth": 2.5}, "got 2.5", "depth must be 1 to"),
    ({"objective": "lp", "p": 0.5}, "0.5", "at least 1"),
    ({"objective": "lp", "p": float("nan")}, "nan", "at least 1"),
    ({"form": "lq", "q": 1.5}, "1.5", "at least 2"),
    ({"form": "lq", "q": float("inf")}, "inf", "at least 2"),
    ({"momentum": "yes"}, "'yes'", "momentum must be True or False"),
    ({"momentum": True, "momentum_scaled": 1}, "got 1", "momentum_scaled must be True or False"),
    ({"self_targets": "no"}, "'no'", "self_targets must be True or False"),
]
WRONG_PART = [
    ({"architecture": "matrix", "depth": 3}, "depth=3 is no option of the 'matrix'", "leave it out"),
    ({"architecture": "matrix", "expansion": 2.0}, "expansion=2.0", "leave it out"),
    ({"architecture": "matrix", "norm": "output"}, "norm='output'", "leave it out"),
    ({"architecture": "swiglu", "depth": 3}, "depth=3 is no option of the 'swiglu'", "leave it out"),
    ({"architecture": "swiglu", "activation": "gelu"}, "activation='gelu'", "leave it out"),
    ({"objective": "l2", "p": 3.0}, "p=3.0 is the exponent of objective='lp'", "leave it out"),
    ({"form": "kl", "q": 4.0}, "q=4.0 is the exponent of form='lq'", "leave it out"),
    ({"rate": "one", "eta_max": 0.5}, "eta_max=0.5 bounds a gated rate", "leave one of them out"),
    ({"projection_chunk_size": 4}, "projection_chunk_size=4", "generated is empty; leave it out"),
]
TOGETHER = [
    ({"generated": ("k", "eta")}, "('k', 'eta')", "both or neither"),
    ({"generated": ("eta", "alpha"), "rate": "one"}, "rate='one'", "must be 'gated'"),
    ({"generated": ("eta", "alpha"), "decay": "none"}, "decay='none'", "eta alone"),
    ({"rule": "dgd", "objective": "huber"}, "rule='dgd' with objective='huber'", "or rule='gd'"),
    (
        {"rule": "dgd_literal", "objective": "lp"},
        "rule='dgd_literal' with objective='lp'",
        "use objective='l2' or 'dot'",
    ),
    ({"rule": "dgd", "form": "lq"}, "'lq' with an erase", "use rule='gd'"),
    ({"rule": "dgd_literal", "form": "kl", "read": "chunk"}, "'kl' with an erase", "use rule='gd'"),
    ({"form": "kl"}, "'kl' cannot be read at every token", "use read='chunk'"),
    ({"objective": "oja", "architecture": "matrix"}, "Oja", "gradient='token'"),
    ({"gradient": "token"}, "'mlp' with 'l2'", "use gradient='anchor'"),
    ({"gradient": "token", "architecture": "swiglu"}, "'swiglu' with 'l2'", "use gradient='anchor'"),
    (TOKEN | {"objective": "huber"}, "'matrix' with 'huber'", "use gradient='anchor'"),
    (TOKEN | {"objective": "lp"}, "'matrix' with 'lp'", "use gradient='anchor'"),
    (TOKEN | {"rule": "dgd_literal"}, "DGD with 'l2'", "use rule='gd'"),
    (TOKEN | {"momentum": True}, "momentum of 'l2' gradients", "use gradient='anchor', or momentum=False"),
    (TOKEN | {"objective": "oja", "momentum": True}, "momentum of 'oja' gradients", "or momentum=False"),
    (TOKEN | {"generated": ("k",)}, "static projections", "use gradient='anchor'"),
    (TOKEN | {"self_targets": True}, "static projections", "use gradient='anchor'"),
    (TOKEN | {"read": "chunk"}, "read='token'", "use gradient='anchor'"),
    (TOKEN | {"form": "lq"}, "linear retention", "use gradient='anchor'"),
]


@pytest.mark.parametrize(("parts", "came", "fix"), [*NAMES, *NUMBERS, *WRONG_PART, *TOGETHER])
def test_refusals_say_what_came_and_how_to_fix_it(parts, came, fix):
    with pytest.raises(ValueError, match=re.escape(fix)) as refusal:
        compose(**parts)
    message = str(refusal.value)
    assert came in message
    with pytest.raises(ValueError, match=re.escape(message)):
        ComposedMemory(8, num_heads=2, parts=parts)


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ({"architecture": "matrix", "expansion": 2.0}, "none"),
        ({"architecture": "swiglu", "depth": 3}, "expansion"),
    ],
)
def test_an_option_of_another_architecture_is_answered_with_those_of_this_one(parts, options):
    with pytest.raises(ValueError, match=f"which takes {options}; leave it out"):
        compose(**parts)


def test_a_part_that_does_not_exist_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown part of a memory 'objectiv'\. Did you mean 'objective'\?"):
        compose_parts({"objectiv": "l2"})


@pytest.mark.parametrize("expansion", [0.0, -1.0, 0.01, float("inf"), float("nan")])
@pytest.mark.parametrize("architecture", ["mlp", "swiglu"])
def test_a_memory_without_hidden_units_is_refused_where_the_head_width_is_known(architecture, expansion):
    with pytest.raises(
        ValueError, match=f"expansion={expansion}.* at head width 4; it must be at least 0.25"
    ):
        ComposedMemory(8, num_heads=2, parts={"architecture": architecture, "expansion": expansion})


def test_a_start_of_the_retention_needs_a_retention_that_is_learned():
    with pytest.raises(ValueError, match=r"max_half_life=100.* 'none'; leave it at None"):
        ComposedMemory(8, num_heads=2, parts={"decay": "none"}, max_half_life=100.0)


def test_a_rule_must_name_the_matrices_of_the_architecture():
    rule = learning_rule(Matrix(), L2(), "gd")
    with pytest.raises(ValueError, match=r"\['W'\], the mlp memory has \['W1', 'W2'\]"):
        MemorySystem(architecture=ResidualMLP(), rule=rule, chunk_size=4)
    erasing = {"W": MatrixRule(objective=Huber(), erase=True, retain="zero")}
    assert MemorySystem(architecture=Matrix(), rule=erasing, chunk_size=4).gates == ("eta", "alpha", "width")


CHOICES = {
    "architecture": ("matrix", "mlp", "swiglu"),
    "objective": ("dot", "l2", "lp", "huber", "oja"),
    "rule": ("gd", "dgd", "dgd_literal"),
    "decay": ("none", "constant", "gated"),
    "form": ("linear", "lq", "kl"),
    "gradient": ("anchor", "token"),
    "momentum": (False, True),
    "read": ("token", "chunk"),
}


def combinations() -> list[dict[str, Any]]:
    return [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]


def makes_sense(parts: dict[str, Any]) -> bool:
    """Why each is refused is in the messages above; here only which."""
    objective, rule = parts["objective"], parts["rule"]
    if rule != "gd" and (objective not in ("dot", "l2") or parts["form"] != "linear"):
        return False
    if parts["form"] == "kl" and parts["read"] == "token":
        return False
    if parts["gradient"] == "anchor":
        return objective != "oja"
    # Under rule="dgd" the output matrix takes the dot product on its residual target, whatever was named.
    hebbian = objective == "dot" or rule == "dgd"
    erases_twice = rule == "dgd_literal" and not hebbian
    return (
        parts["architecture"] == "matrix"
        and objective in ("dot", "l2", "oja")
        and parts["form"] == "linear"
        and parts["read"] == "token"
        and not erases_twice
        and (hebbian or not parts["momentum"])
    )


def test_exactly_the_combinations_that_make_sense_are_accepted():
    for parts in combinations():
        try:
            compose(**parts)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == makes_sense(parts), parts


SENSIBLE = [parts for parts in combinations() if makes_sense(parts)]


def with_generating_memories() -> list[dict[str, Any]]:
    found = []
    for parts in SENSIBLE:
        for names, targets in product((("eta",), ("k", "v"), ("k", "v", "q", "eta", "alpha")), (False, True)):
            try:
                compose(**(chosen := {**parts, "generated": names, "self_targets": targets}))
            except ValueError:
                continue
            found.append(chosen)
    hebbian = [
        p for p in found if p["objective"] == "dot" and p["momentum"] and p["architecture"] == "matrix"
    ]
    # One direction is that of all memories there, and each has a momentum of its own.
    return random.Random(0).sample(hebbian, 8) + random.Random(1).sample(found, 24)


def equal_to_pieces(layer: ComposedMemory, x: torch.Tensor) -> torch.Tensor:
    """The layer's answer to x, which is the same in pieces."""
    whole, _ = layer(x)
    pieces, state = [], None
    for piece in x.split([1, 4, 6], dim=1):
        y, state = layer(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-12)
    return whole


@pytest.mark.parametrize(
    "parts", with_generating_memories(), ids=lambda p: "-".join(map(str, p.values())).replace(" ", "")
)
def test_what_is_accepted_runs_whole_and_in_pieces_with_generating_memories(parts):
    torch.manual_seed(0)
    layer = ComposedMemory(8, num_heads=2, parts={**parts, "chunk_size": 4}).double()
    equal_to_pieces(layer, torch.randn(2, 11, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    "parts", random.Random(0).sample(SENSIBLE, 40), ids=lambda p: "-".join(map(str, p.values()))
)
def test_what_is_accepted_runs_whole_and_in_pieces(parts):
    torch.manual_seed(0)
    layer = ComposedMemory(8, num_heads=2, parts={**parts, "chunk_size": 4}).double()
    for W in layer.initial.values():
        torch.nn.init.normal_(W, std=0.5)  # a matrix starts empty: nothing would be read at the first anchor
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    whole = equal_to_pieces(layer, x)
    whole.square().sum().backward()
    for name, parameter in [("x", x), *layer.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} is given to the layer and does nothing"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"depth": 1, "expansion": 2.0}, "expansion=2.0 describes hidden layers"),
        ({"depth": 1, "activation": "gelu"}, "activation='gelu' describes hidden layers"),
        ({"depth": True}, "depth must be 1 to 4 matrices, got True"),
        ({"momentum_scaled": False}, "but momentum=False"),
        ({"unit": "kv"}, "unit must be a list of names, got 'kv'"),
        ({"generated": "kv"}, "generated must be a list of names, got 'kv'"),
        ({"expansion": "2"}, "expansion must be a number, got '2'"),
        ({"objective": "lp", "p": "3"}, "p must be a number, got '3'"),
        ({"eta_max": "0.5"}, "eta_max must be a number"),
        ({"architecture": ["mlp"]}, "architecture must be a name"),
    ],
)
def test_values_of_the_wrong_kind_and_options_without_effect_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        compose(**parts)
