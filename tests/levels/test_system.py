"""The order of Definition 2, descriptions by users, and the ways out: text, JSON, Mermaid, PNG."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import nested_learning
from nested_learning import HopeForCausalLM, preset
from nested_learning.levels import (
    INFINITE,
    NEVER,
    Component,
    DescribedGradientMemory,
    DescribedMemory,
    DescribedWeights,
    Frequency,
    OptimizerRule,
    Transfer,
    describes,
    describes_optimizer,
    every_steps,
    every_tokens,
    levels,
)
from nested_learning.levels.order import in_levels


def component(name, frequency, needs=()):
    return Component(name=name, kind="memory", frequency=frequency, needs=needs)


def test_definition_2_by_frequency_then_by_who_needs_whom():
    given = [
        component("frozen", NEVER),
        component("weights", every_steps(), needs=("momentum", "other")),
        component("slow", every_steps(10)),
        component("preconditioner", every_steps()),
        component("chunk", every_tokens(64)),
        component("momentum", every_steps(), needs=("preconditioner",)),
        component("token", every_tokens()),
        component("other", every_steps(), needs=("token",)),  # another frequency: no matter
        component("attention", INFINITE),
        component("alone", every_steps()),
    ]
    assert [[c.name for c in level.components] for level in in_levels(given)] == [
        ["attention"],
        ["token"],
        ["chunk"],
        ["preconditioner"],
        ["momentum", "other"],
        ["weights", "alone"],
        ["slow"],
        ["frozen"],
    ]
    assert [level.number for level in in_levels(given)] == list(range(1, 9))


def test_a_circle_of_needs_is_refused():
    circle = [component("a", NEVER, ("b",)), component("b", NEVER, ("a",))]
    with pytest.raises(ValueError, match="in a circle"):
        in_levels(circle)


@pytest.mark.parametrize(
    ("unit", "every", "message"),
    [
        ("hour", 1, "one of infinite, token, step, never; got 'hour'"),
        ("token", 0, "every 1, 2, … tokens; got 0"),
        ("token", 1.5, "got 1.5"),
        ("step", True, "got True"),
        ("never", 2, "'never' takes no interval, got every=2"),
    ],
)
def test_frequencies_that_make_no_sense(unit, every, message):
    with pytest.raises(ValueError, match=message):
        Frequency(unit, every)


# Descriptions by users ----------------------------------------------------------------------------------


class Hebbian(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys, self.start = nn.Linear(4, 4), nn.Parameter(torch.zeros(4, 4))
        self.out = nn.Linear(4, 2)


@describes(Hebbian)
def _hebbian(layer):
    yield DescribedMemory(
        name="outer products",
        frequency=every_tokens(8),
        state_bytes=64,
        context="tokens",
        objective="−⟨Mk, v⟩",
        rule="M ← M + v kᵀ",
    )
    yield DescribedWeights("keys", layer.keys.parameters(), generates=("outer products",))
    yield DescribedWeights("start", [layer.start], initial_of=("outer products",))
    yield Transfer(
        sources=("outer products",), targets=("keys",), kind="generation of weights", what="next keys"
    )


class Sub(Hebbian):
    """Described as its base class."""


class Slow(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


@describes_optimizer(Slow)
def _slow(optimizer, group):
    memory = DescribedGradientMemory(name="m", keys=("m",), state_bytes=7, objective="", rule="", every=2)
    yield OptimizerRule(params=group["params"], step="W ← W", memories=(memory,), period=2)


def test_a_users_module_and_optimizer_describe_themselves():
    model = nn.Sequential(Sub(), Sub(), nn.Linear(2, 2))
    system = levels(model, Slow(model.parameters()))
    assert [[(c.name, c.parameters) for c in level.components] for level in system.levels] == [
        [("outer products", 0)],
        [("Slow: m", 0)],
        [("keys", 40), ("start", 32), ("linear layers", 2 * 10 + 6)],
    ]
    assert system["outer products"].state_bytes == 2 * 64
    assert str(system["keys"].frequency) == "every 2 optimizer steps"
    assert system["Slow: m"].state_bytes == 7
    kinds = {(t.kind, t.sources, t.targets) for t in system.transfers}
    assert ("generation of weights", ("outer products",), ("keys",)) in kinds
    assert ("initial state", ("start",), ("outer products",)) in kinds
    assert ("backpropagation", ("outer products",), ("keys", "start")) in kinds


def test_one_name_for_two_things_becomes_two_names():
    class Fast(Hebbian):
        pass

    @describes(Fast)
    def _(layer):
        yield DescribedMemory(
            name="outer products",
            frequency=every_tokens(),
            state_bytes=None,
            context="",
            objective="",
            rule="",
        )

    system = levels(nn.Sequential(Hebbian(), Fast()))
    assert [c.name for level in system.levels[:2] for c in level.components] == [
        "outer products, every token",
        "outer products, every 8 tokens",
    ]


def test_a_description_that_names_what_is_not_there():
    class Wrong(nn.Linear):
        pass

    @describes(Wrong)
    def _(layer):
        yield DescribedWeights("map", layer.parameters(), generates=("memry",))

    with pytest.raises(ValueError, match="description of module 'a': 'memry'"):
        levels(nn.ModuleDict({"a": Wrong(2, 2)}))


def test_descriptions_are_of_modules_and_optimizers():
    with pytest.raises(ValueError, match="subclasses of Module"):
        describes(torch.optim.SGD)
    with pytest.raises(ValueError, match="subclasses of Optimizer"):
        describes_optimizer()


@pytest.mark.parametrize("old", ["GradientMemory", "Level", "Memory", "Weights"])
def test_old_names_of_describing_classes_warn_and_work(old):
    new = f"Described{old}"
    with pytest.warns(DeprecationWarning, match=rf"levels\.{old} is deprecated, use {new}$") as caught:
        assert getattr(nested_learning.levels, old) is getattr(nested_learning.levels, new)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=new):
        exec(f"from nested_learning.levels import {old}", {})
    assert old not in nested_learning.levels.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Memories'"):
        _ = nested_learning.levels.Memories


# Ways out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system():
    with torch.device("meta"):
        model = HopeForCausalLM(preset("hope-tiny"))
    return levels(model, torch.optim.AdamW(model.parameters()))


def test_json_round_trip(system):
    value = system.to_dict()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["optimizer"] == "AdamW"
    assert [level["frequency"] for level in value["levels"]] == [
        "every token",
        "every 32 tokens",
        "every optimizer step",
        "every optimizer step",
    ]
    generating = value["levels"][1]["components"][0]
    assert generating["frequency"] == {"unit": "token", "every": 32, "text": "every 32 tokens"}
    names = {c["name"] for level in value["levels"] for c in level["components"]}
    ends = {end for t in value["transfers"] for end in t["sources"] + t["targets"]}
    assert ends <= names
    assert value["parameters"] == sum(level["parameters"] for level in value["levels"]) == 1_057_824


def test_text_shows_every_component(system):
    text = str(system)
    assert all(" ".join(c.name.split()[-2:]) in re.sub(r"[│\s]+", " ", text) for c in system.components)
    assert "backpropagation" in text
    assert max(map(len, text.splitlines())) <= 126
    console = Console(width=160, file=io.StringIO())
    console.print(system)
    assert "CMS level 2 (chunk 2048)" in console.file.getvalue()


NODE = re.compile(r'    (c\d+)\["([^"<>]|<br/>)*"\]')
BOX = re.compile(r'  subgraph (L\d+)\["[^"<>]*"\]')
ARROW = re.compile(r'  ([cL]\d+(?: & [cL]\d+)*) -->\|"[^"<>|]*"\| ([cL]\d+(?: & [cL]\d+)*)')


def test_mermaid_is_well_formed(system):
    first, *lines = system.to_mermaid().splitlines()
    assert first == "flowchart TB"
    known, depth = set(), 0
    for line in lines:
        if match := BOX.fullmatch(line):
            assert depth == 0
            depth = 1
            known.add(match[1])
        elif line == "  end":
            assert depth == 1
            depth = 0
        elif match := NODE.fullmatch(line):
            assert depth == 1
            known.add(match[1])
        else:
            match = ARROW.fullmatch(line)
            assert match, line
            assert set(re.split(" & ", match[1]) + re.split(" & ", match[2])) <= known
    assert depth == 0
    assert len(known) == len(system.levels) + len(system.components)


def test_mermaid_escapes_what_is_markup():
    model = nn.Sequential(nn.Linear(2, 2))

    class Odd(torch.optim.SGD):
        pass

    Odd.__name__ = 'A"<b>&`|'
    shown = levels(model, Odd(model.parameters(), lr=0.1, momentum=0.9)).to_mermaid()
    assert 'c0["A#quot;#lt;b#gt;#amp;#96;' in shown


def test_png_is_written_whole_or_not_at_all(system, tmp_path):
    path = tmp_path / "levels.png"
    system.to_png(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OSError, match="missing"):
        system.to_png(tmp_path / "missing" / "levels.png")
    assert list(tmp_path.iterdir()) == [path]
    levels(nn.Identity()).to_png(path)
