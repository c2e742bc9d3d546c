"""Settings at random: refused with a sentence and nothing written, or they work and round-trip."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nested_learning import HopeConfig
from nested_learning.cli.main import COMMANDS, DEBUG, main
from nested_learning.training.config import TrainConfig
from nested_learning.training.config_file import dotted_names, dump_config, load_config

SMALL = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}
SCALARS = [
    None, True, False, 0, 1, 2, 3, -1, 7, 0.5, -2.0, 2**31, 2**53, 2**63, 10**20, 1e300, float("inf"),
    float("nan"), "", "x", "1", "attention", "float32", "bfloat16", "auto", "null", "~nobody-here/x", "a\0b",
    "\ud800", "9" * 5000, "[" * 500 + "]" * 500,
]  # fmt: skip
KEYS = ["chunk_size", "lr", "expansion", "activation", "attention", "self_modifying_titans", "0", "x"]
JUNK = st.recursive(
    st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.integers(-1, 3), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = sorted({field.name for field in dataclasses.fields(HopeConfig)} | {"num_labels", "torch_dtype"})
FAST = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SLOW = settings(FAST, max_examples=6000, derandomize=False)
NAMES = [*dotted_names(TrainConfig), *(f"model.{name}" for name in FIELDS)]


# HopeConfig ------------------------------------------------------------------------------------------


def refused_with_a_sentence(error):
    assert len(str(error).split()) > 1


def refused_or_round_trips(fields):
    try:
        config = HopeConfig(**{**SMALL, **fields})
    except ValueError as error:
        refused_with_a_sentence(error)
        return
    again = HopeConfig.from_dict(config.to_dict())
    assert repr(again.to_dict()) == repr(config.to_dict())
    assert again.fingerprint() == config.fingerprint()


@FAST
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=3))
def test_a_configuration_is_refused_or_round_trips(fields):
    refused_or_round_trips(fields)


@pytest.mark.slow
@SLOW
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=4))
def test_many_configurations_are_refused_or_round_trip(fields):
    refused_or_round_trips(fields)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_is_no_value(name):
    for value in [*SCALARS, [], ["x"], [1, None], {}, {"x": 1}, {1: "x"}]:
        refused_or_round_trips({name: value})


# YAML ------------------------------------------------------------------------------------------------


def nested(flat):
    """Dotted keys as nested mappings; a value on the way to a deeper key gives way."""
    tree = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    return tree


def file_is_refused_or_round_trips(path: Path, text: str):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path)
    except ValueError as error:
        refused_with_a_sentence(error)
        return
    written = dump_config(config)
    path.write_text(written, encoding="utf-8")
    assert dump_config(load_config(path)) == written


YAMLS = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=3).map(lambda flat: yaml.dump(nested(flat))),
    st.text(alphabet="ab1:-[]{},&*!|>#%@'\"?\n\t .~<0é\0", max_size=60),
    st.sampled_from(["model: ", "optim: ", "data: ", "steps: ", "model: {mixer_options: "]).flatmap(
        lambda key: st.sampled_from(["[" * n + "]" * n for n in (1, 30, 60, 500)]).map(key.__add__)
    ),
)


@FAST
@given(YAMLS)
def test_a_yaml_file_is_refused_or_round_trips(tmp_path, text):
    file_is_refused_or_round_trips(tmp_path / "run.yaml", text)


@pytest.mark.slow
@SLOW
@given(YAMLS)
def test_many_yaml_files_are_refused_or_round_trip(tmp_path, text):
    file_is_refused_or_round_trips(tmp_path / "run.yaml", text)


@pytest.mark.parametrize(
    "text",
    [
        "model: null", "model: {1: 2}", "model: 3", "optim: 3", "optim: null", "data: null", "data: [1]",
        "3: 3", "[1, 2]: 3", "steps: 2020-99-99", "steps: 99999999999999999999",
        "model: &a {mixer_options: *a}",
        "model: {mixer_options: " + "[" * 500 + "]" * 500 + "}", 'output: "a\\0b"',
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "\n".join(
            f"{x}: &{x} [{', '.join(8 * ['*' + y])}]" for y, x in zip("abcdefg", "bcdefgh", strict=True)
        ),
    ],
)  # fmt: skip
def test_yaml_that_holds_no_configuration(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"\w+ "):
        load_config(path)


# Command lines -----------------------------------------------------------------------------------------


def is_refused(folder: Path, argv: list[str]):
    """Exit code 2, one sentence that was meant for it, and nothing written."""
    os.chdir(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    assert (code, out.getvalue()) == (2, "")
    assert err.getvalue().startswith("error: ")
    assert DEBUG not in err.getvalue(), err.getvalue()  # no error that nobody had thought of
    assert list(folder.iterdir()) == []


TEXTS = JUNK.map(str) | st.sampled_from([str(value) for value in SCALARS])
OTHER = [
    "seed",
    "top_p",
    "temperature",
    "max_new_tokens",
    "chunk_sizes",
    "level_lr",
    "layers",
    "rule",
    "rank",
]
OTHER += ["load_state", "save_state", "lrs", "lr", "seeds", "steps", "batch_size", "validation_batches"]
# What makes sure that none of the lines starts to train: a text and a model that are not there.
LAST = {
    "train": ["--data", "/no/such/text"],
    "compare": ["hope-tiny", "transformer-tiny", "--data", "/no/such/text"],
    "generate": ["/no/such/model"],
    "score": ["/no/such/model"],
    "info": ["/no/such/model"],
    "levels": ["/no/such/model"],
    "chat": ["--model", "/no/such/model"],
    "serve": ["--model", "/no/such/model"],
    "export": ["--model", "/no/such/model"],
    "adapt": ["--model", "/no/such/model"],
    "lens": ["/no/such/model", "--text", "/no/such/text"],
    "eval": ["no-such-task"],
}


@st.composite
def lines(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    known = NAMES if command == "train" else OTHER
    flags = draw(st.lists(st.tuples(st.sampled_from(known), TEXTS), max_size=3))
    return [command, *(f"--{name}={value}" for name, value in flags), *LAST[command]]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_each_last_part_is_refused_alone(empty):
    assert LAST.keys() == COMMANDS.keys()
    for command, last in LAST.items():
        is_refused(empty, [command, *last])


@FAST
@given(lines())
def test_a_command_line_is_refused(empty, argv):
    is_refused(empty, argv)


@pytest.mark.slow
@SLOW
@given(lines())
def test_many_command_lines_are_refused(empty, argv):
    is_refused(empty, argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data", "~no-such-user/x"],
        ["train", "--steps", "99999999999999999999"],
        ["train", "--steps", "9" * 5000],
        ["train", "--model", "null"],
        ["train", "--model", "{1: 2}"],
        ["train", "--optim", "3"],
        ["train", "--model.mixer_options", "[" * 500 + "]" * 500],
        ["train", "--config", "/"],
        ["info", "hope-tiny", "--batch", "9" * 4000],
        ["info", "hope-tiny", "--tokens", "99999999999999999999"],
        ["levels", "a\0b"],
    ],
)
def test_command_lines_that_mean_nothing(empty, argv):
    is_refused(empty, argv)
