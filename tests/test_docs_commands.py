"""Every command line that the documentation prints is one that the programs take; none is run."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jsonargparse
import pytest

from nested_learning.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("nested-learning ", "python -m benchmarks")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")  # such as PART, in running text


class Parsed(BaseException):
    """A command line has been parsed; not an Exception, so that no command takes it for an error."""


def block_lines(text: str) -> list[str]:
    """Lines of fenced and indented code, those that end with a backslash joined with the next."""
    found, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(line.strip())
    return found


def commands(text: str) -> list[str]:
    """Command lines of a page: those in blocks, and those in running text that have arguments."""
    blocks = [line for line in block_lines(text) if line.startswith(PROGRAMS)]
    fenced = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fenced)]
    return blocks + [span for span in spans if span.startswith(PROGRAMS) and not PLACEHOLDER.search(span)]


CASES = [
    pytest.param(command, id=f"{page.name}: {command}")
    for page in PAGES
    for command in dict.fromkeys(commands(page.read_text(encoding="utf-8")))
]


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Parsers parse, and then raise Parsed."""
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def parse_and_stop(self, *arguments, _parse=parser.parse_args, **options):
            _parse(self, *arguments, **options)
            raise Parsed

        monkeypatch.setattr(parser, "parse_args", parse_and_stop)


def check(command: str) -> None:
    """Parse a command line by the program's own parser.

    Raises:
        Parsed: it fits.
        SystemExit: the parser refuses it.
    """
    words = shlex.split(command, comments=True)
    # The folder that `git worktree add ../before COMMIT` makes is to be there: any checkout will do.
    words = [str(ROOT) if word == "../before" else word for word in words]
    if words[0] == "nested-learning":
        assert words[1] in COMMANDS, f"no command {words[1]!r}"
        raise SystemExit(main(words[1:]))
    module = words[2]
    spec = find_spec(module)
    assert spec is not None, f"no module {module}"
    package = spec.submodule_search_locations is not None
    if package and not words[3:]:
        raise Parsed  # the name of a benchmark that has parts
    import_module(f"{module}.__main__" if package else module).main(words[3:])


def test_pages_have_commands():
    assert len(CASES) > 30
    assert {page.name for page in PAGES if commands(page.read_text(encoding="utf-8"))} >= {
        "README.md",
        "continual.md",
        "log.md",
        "results.md",
    }


@pytest.mark.parametrize("command", CASES)
def test_a_command_is_one_that_its_program_takes(command, stop_after_parsing):
    assert "…" not in command
    with pytest.raises(Parsed):
        check(command)


def evaluations() -> list[str]:
    """Command lines of evaluations, each once, without the files that they read and write."""
    found = []
    for case in CASES:
        words = shlex.split(str(case.values[0]), comments=True)
        if words[:2] == ["nested-learning", "eval"] and words[2:] and "TASK" not in words:
            found.append(re.sub(r" --(output|finished)( [^-\s]\S*)+", "", shlex.join(words[2:])))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", evaluations())
def test_an_evaluation_has_such_tasks_methods_and_options(command, tmp_path):
    """As the command does, without runs."""
    words = shlex.split(command)
    for flag in {"--only_report", "--quiet"} - set(words):
        words.append(flag)
    assert main(["eval", *words, "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.png"))  # of guesses alone there is no plot


@pytest.mark.parametrize(
    "command",
    [
        "python -m benchmarks.layers --fast",
        "python -m benchmarks.layers precision",
        "python -m benchmarks.pretrained_speed everything",
        "nested-learning train --presets hope-tiny",
        "nested-learning info --tokens many",
    ],
)
def test_other_commands_are_refused(command, stop_after_parsing):
    with pytest.raises(SystemExit) as refused:
        check(command)
    assert refused.value.code == 2
