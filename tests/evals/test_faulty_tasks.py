"""Tasks whose own code is at fault: what was found stands in the report all the same."""

import json

import pytest

from nested_learning.cli.main import main
from nested_learning.evals import known_tasks, register_task, registry
from nested_learning.evals.rows import checked_figures
from nested_learning.evals.runner import EvalConfig, evaluate
from nested_learning.evals.trial import error_text
from tests.evals.guessing import GOOD, Coin


class UnreadableError(Exception):
    def __str__(self):
        raise KeyError("no message")


class OddClaim:
    text, source = "odd", "none"

    def judge(self, rows):
        raise ZeroDivisionError("judge")


class OddCoin(Coin):
    """The coin with one part at fault, which a test names."""

    part = ""

    def run(self, method, seed):
        if self.part == "message" and method.name == "bad":
            raise ValueError("half of \ud83d")
        if self.part == "unreadable" and method.name == "bad":
            raise UnreadableError
        return super().run(method, seed)

    def claims(self):
        if self.part == "claims":
            raise KeyError("claims")
        return [*super().claims(), *([OddClaim()] if self.part == "judge" else [])]

    def plot(self, rows, path):
        if self.part == "plot":
            raise RuntimeError("no plot")
        path.write_bytes(b"a picture")

    def note(self):
        return 1 / 0 if self.part == "note" else "a note"

    def constants(self):
        if self.part == "names":
            return {"good": {"heads": 1.0}}
        return {"always": {"heads": float("nan") if self.part == "constants" else 1.0}}


@pytest.fixture(autouse=True)
def _coin(monkeypatch):
    known_tasks()
    monkeypatch.setattr(registry, "_TASKS", {"coin": OddCoin})
    monkeypatch.setattr(registry, "_METHODS", {})


@pytest.mark.parametrize(
    ("part", "what", "error"),
    [
        ("claims", "coin, claims", "KeyError: 'claims'"),
        ("judge", "coin, claim odd", "ZeroDivisionError: judge"),
        ("plot", "coin, plot", "RuntimeError: no plot"),
        ("note", "coin, note", "ZeroDivisionError: division by zero"),
        ("constants", "coin, constants", "heads is nan"),
        ("names", "coin, constants", "'good' is the name of a method too"),
        ("message", "coin bad seed 0", "ValueError: half of ?"),
        ("unreadable", "coin bad seed 0", "UnreadableError: its message cannot be read (KeyError)"),
    ],
)
def test_a_part_at_fault_is_told_and_the_rest_is_reported(part, what, error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(OddCoin, "part", part)
    (tmp_path / "coin.png").write_bytes(b"of an earlier run")
    assert main(["eval", "coin", "--seeds", "0", "--quiet", "--output", str(tmp_path)]) == 1
    (section,) = json.loads((tmp_path / "results.json").read_text())["tasks"]
    ((trial, said),) = [each.values() for each in section["failed"]]
    assert (trial, error in said) == (what, True)
    figures = {row["method"]: row["figures"]["heads"]["mean"] for row in section["rows"]}
    assert figures["good"] == OddCoin.at("small").run(GOOD, 0)["heads"]
    assert section["figure"] == (None if part == "plot" else "coin.png")
    for name in ("report.md", "report.html"):
        assert f"failed: {what}" in (tmp_path / name).read_text()
    verdicts = {each["claim"]: each["verdict"] for each in section["claims"]}
    assert len(verdicts) == {"claims": 0, "judge": 4}.get(part, 3)
    assert verdicts.get("odd", "cannot be told here") == "cannot be told here"


@pytest.mark.parametrize("value", [10**400, [1.0, -(10**400)], {"a": [10**400]}])
def test_numbers_beyond_floats_are_no_figures(value):
    with pytest.raises(ValueError, match=r"its figure more is .*, too large for tables and claims"):
        checked_figures({"heads": 1.0, "more": value}, ["heads"])
    assert checked_figures({"more": 10**300}, ["more"]) == {"more": 10**300}


def test_an_error_without_a_message_is_its_kind():
    assert error_text(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("methods", lambda self: [GOOD, GOOD], "coin has several methods named good"),
        ("grid", lambda self, method: [], "grid of coin has no setting for good"),
    ],
)
def test_rows_that_would_be_lost_are_refused(name, value, message, monkeypatch):
    monkeypatch.setattr(OddCoin, name, value)
    with pytest.raises(ValueError, match=message):
        evaluate(EvalConfig(tasks=["coin"], seeds=[0]))


def test_a_task_without_methods_says_so(monkeypatch):
    monkeypatch.setattr(OddCoin, "methods", lambda self: [])
    (result,) = evaluate(EvalConfig(tasks=["coin"], seeds=[0]))
    assert result.skipped == "it has no methods"


@pytest.mark.parametrize("seeds", [[-1], [0, 2**32]])
def test_seeds_that_generators_do_not_take(seeds):
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 2\*\*32 - 1. Set --seeds"):
        EvalConfig(tasks=["coin"], seeds=seeds)


@pytest.mark.parametrize("name", ["", "../coin", "coin.one", "Coin", "a coin"])
def test_names_that_no_command_or_file_takes(name):
    task = type("Named", (Coin,), {"name": name})
    with pytest.raises(ValueError, match=r"the task Named is named .*expected letters"):
        register_task(task)


def test_tags_of_names_and_titles_are_text_in_the_report(monkeypatch, tmp_path):
    hostile = type(GOOD)("<img src=x onerror=alert(1)>|\nrow")
    monkeypatch.setattr(OddCoin, "methods", lambda self: [hostile])
    monkeypatch.setattr(OddCoin, "title", "<script>alert(1)</script>")
    monkeypatch.setattr(OddCoin, "columns", {"heads": "<b>heads</b>"})
    assert main(["eval", "coin", "--seeds", "0", "--quiet", "--output", str(tmp_path)]) == 0
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert not any(tag in text for tag in ("<img src=x", "<script>", "<b>"))
