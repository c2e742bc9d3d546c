"""Writing of a report: report.md, report.html (one page that needs no network), results.json, plots."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nested_learning._files import write_text
from nested_learning.evals.report import build
from nested_learning.evals.runner import TaskResult
from nested_learning.training.run_folder import write_json

MARKDOWN, PAGE, RESULTS, TRIALS = "report.md", "report.html", "results.json", "trials.jsonl"


def write_report(results: Sequence[TaskResult], command: str, folder: Path) -> dict[str, Any]:
    """Write the report of an evaluation into its folder, each file whole or not at all.

    Args:
        results: of the tasks.
        command: that repeats the evaluation.
        folder: made where it is missing.

    Returns:
        What results.json holds.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = build.contents(results, command, folder)
    write_json(folder / RESULTS, found)
    lines = [json.dumps(outcome.line()) for result in results for outcome in result.outcomes]
    write_text(folder / TRIALS, "".join(f"{line}\n" for line in lines))
    write_text(folder / MARKDOWN, render("report.md.jinja", found))
    images = {
        each["figure"]: base64.b64encode((folder / each["figure"]).read_bytes()).decode()
        for each in found["tasks"]
        if each["figure"]
    }
    write_text(folder / PAGE, render("report.html.jinja", {**found, "images": images}))
    return found


def render(template: str, found: dict[str, Any]) -> str:
    """The text of a template with the contents of a report; in HTML every value is escaped."""
    environment = Environment(
        loader=PackageLoader("nested_learning.evals.report", "templates"),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": build.cell,
        "count": build.count,
        "settings": build.settings,
        "origin": build.origin,
        "common": build.common,
        "cells": markdown_cells,
        "line": markdown_line,
    }
    return environment.get_template(template).render(**found)


def markdown_line(value: object) -> str:
    """A text as one line of Markdown that shows as it is: no tag, cell or emphasis begins in it."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def markdown_cells(values: Iterable[object]) -> str:
    """A line of a Markdown table; bars and line breaks in values would end cells and lines, tags be tags.

    A < that begins no tag stays, as tables are read as they are too.
    """
    texts = [" ".join(str(value).split()).replace("|", "\\|") for value in values]
    texts = [re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text) for text in texts]
    return "| " + " | ".join(texts) + " |"
