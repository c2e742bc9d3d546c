"""The runs that docs/evaluations keeps lead to the verdicts that docs/results.md states."""

import json
import re
from itertools import combinations, product
from statistics import fmean

import pytest

from nested_learning.continual import AUTO
from nested_learning.evals.claims import interval
from nested_learning.evals.kept import TrialCache
from nested_learning.evals.runner import SEEDS
from nested_learning.evals.tasks.longdoc.documents import SHORT
from website import claims
from website.tables import TABLES, Difference


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:  # what was found stays so with other versions
        patch.setattr(TrialCache, "_of_these_versions", lambda self, made_with: True)
        return claims.results()


def test_every_kept_run_has_its_place_in_the_report(results):
    lines = [json.loads(line) for line in claims.KEPT.read_text(encoding="utf-8").splitlines()]
    shown = sum(len(result.outcomes) for result in results)
    assert shown == len(lines) > 0
    assert all(line["made"]["git"] and line["made"]["device_name"] for line in lines)


def test_the_tables_of_the_page_are_those_of_the_runs(results):
    text = claims.RESULTS.read_text(encoding="utf-8")
    blocks = claims.blocks(results)
    for name, block in blocks.items():
        assert claims.parts(text, name)[1] == block, name
    assert blocks["claims"].count("| **") >= len(results)
    assert set(re.findall(r"<!-- (?!end of )(.*?):", text)) == set(blocks)


def test_every_cell_of_a_table_has_a_figure(results):
    rows = {result.task.name: result.rows for result in results}
    for each in TABLES:
        lines = [line.split(" | ") for line in each.text(rows[each.task]).splitlines()[2:]]
        empty = sum(cell.strip("| ") == "" for line in lines for cell in line)
        compared = sum(isinstance(cell, Difference) for cell in each.cells.values())
        assert empty == compared, each.name  # a method is not compared with itself
        dashes = sum(cell.strip("| ") == "–" for line in lines for cell in line)
        assert dashes == (each.name == "clinc150"), each.name  # all at once, joint training forgets nothing


def quoted(rows, figure, *methods):
    """Means with two decimals, as text quotes them."""
    return [f"{rows[method].mean(figure):.2f}".replace("-", "−") for method in methods]


def test_figures_that_other_pages_quote_are_those_of_the_runs(results):
    rows = {result.task.name: result.rows for result in results}
    guide = (claims.ROOT / "docs" / "continual.md").read_text(encoding="utf-8")
    recalled = quoted(
        rows["facts-8k"], "cloze often", "level-rank-8", "one-level", "level-replay", "retrieval-alone"
    )
    section = guide.partition("## Settings that need no tuning")[2].partition("\n## ")[0]
    for text in (AUTO.reason, section):
        assert re.findall(rf"\b(?:{'|'.join(map(re.escape, recalled))})\b", text) == recalled
    told = [
        f"{rows['month'][each].mean('recall'):.3f}"
        for each in ("level-rank-8", "one-level", "level-averaged")
    ]
    for text in (AUTO.reason, section):
        assert "recalls {}, a full level {}, two".format(*told) in " ".join(text.split())
        assert told[2] in text
    again, alone = quoted(rows["facts-32k"], "cloze often", "level-replay", "one-level")
    assert f"a full level with it recalled {again}, one without {alone}, a context none" in " ".join(
        section.split()
    )
    assert rows["facts-32k"]["context-2k"].mean("cloze often") == 0
    looked_up = ("retrieval-slow-level", "retrieval-alone", "retrieval-level")
    slow, alone, full = quoted(rows["facts-32k"], "paraphrased often", *looked_up)
    assert f"({slow}, retrieval alone {alone}), one at the full rate does not ({full})" in " ".join(
        section.split()
    )
    table = guide.partition("## What it learned")[2]
    methods = (
        "one-level",
        "three-levels-averaged",
        "fine-tuning-averaged",
        "two-levels-replay",
        "class-means",
    )
    for begin, figure in (("| CLINC150", "accuracy"), ("| … forgetting", "forgetting")):
        line = next(line for line in table.splitlines() if line.startswith(begin))
        assert re.findall(r"−?0\.\d\d\b(?!\*[^*])", line)[:5] == quoted(rows["clinc150"], figure, *methods)


GUIDE = {  # beginnings of the lines of "What to take for what": whose figures they quote, in their order
    "a long text": ("longdoc", ("bits per byte",), (
        "levels-average-reading", "window-1k", "window-8k", "levels-average-reading-8k")),
    "facts, and": ("facts-32k", ("cloze often", "paraphrased often"), (
        "retrieval-slow-level", "retrieval-alone")),
    "facts, answered": ("facts-32k", ("cloze often",), ("level-replay", "one-level", "fine-tuning")),
    "what is corrected": ("month", ("correction",), (
        "in-context", "retrieval-in-order", "level-averaged", "one-level", "level-replay")),
    "labels": ("clinc150", ("accuracy",), ("class-means", "two-levels-replay")),
}  # fmt: skip


def test_the_guide_quotes_the_runs(results):
    rows = {result.task.name: result.rows for result in results}
    guide = (claims.ROOT / "docs" / "continual.md").read_text(encoding="utf-8")
    table = guide.partition("## What to take for what")[2].partition("\n## ")[0]
    for begin, (task, figures, methods) in GUIDE.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {begin}"))
        means = []
        for method, figure in product(methods, figures):
            values = rows[task][method].values(figure)
            kept = [v for seed, v in values.items() if task != "longdoc" or seed < SHORT]
            means.append(f"{fmean(kept):.3f}")
        assert re.findall(r"\b0\.\d+", line) == means, begin


def test_the_guide_says_by_how_much_a_rule_was_ahead(results):
    rows = next(result.rows for result in results if result.task.name == "longdoc")
    adam, rms = (
        rows[name].values("bits per byte") for name in ("one-level-reading", "dynamic-evaluation-rms")
    )
    apart = [adam[seed] - rms[seed] for seed in rms]
    low, high = interval(apart)
    guide = (claims.ROOT / "docs" / "continual.md").read_text(encoding="utf-8")
    (line,) = (line for line in guide.splitlines() if line.startswith("| `rule` |"))
    assert 'over long documents "rms" at `clip=None` was' in line
    assert f"was {fmean(apart):.3f} [{low:.3f}, {high:.3f}] bits per byte ahead" in line


def test_on_every_long_document_levels_are_ahead_of_the_whole_context(results):
    rows = next(result.rows for result in results if result.task.name == "longdoc")
    levels, window = rows["levels-average-reading"], rows["window-8k"]
    ours, theirs = levels.values("long"), window.values("long")
    wide = rows["levels-average-reading-8k"].values("long")
    assert ours.keys() == theirs.keys() == wide.keys()
    assert all(wide[seed] < ours[seed] < theirs[seed] for seed in ours)
    means = [
        f"{row.mean(figure):.3f}" for figure in ("long", "long, last quarter") for row in (levels, window)
    ]
    each = ", ".join(f"{ours[seed]:.3f} and {theirs[seed]:.3f}" for seed in sorted(ours))
    text = " ".join(claims.RESULTS.read_text(encoding="utf-8").split())
    assert f"({means[0]} and {means[1]} in the mean; {each})" in text
    each = ", ".join(f"{wide[seed]:.3f} and {theirs[seed]:.3f}" for seed in sorted(wide))
    assert f"on each long one ({each})" in text
    assert f"(last quarter {means[2]} and {means[3]})" in text


def test_losses_of_tuning_that_the_pages_quote_are_those_of_the_runs(results):
    needle = next(result for result in results if result.task.name == "needle")
    tried = [o for o in needle.outcomes if o.trial.tuning and o.trial.method.name == "titans"]
    losses = {
        "mixer.eta_max" in o.trial.method.settings: o.figures["loss"]
        for o in tried
        if o.trial.method.settings["lr"] == 5e-3
    }
    default, wide = (f"{losses[bounded]:.2f}" for bounded in (False, True))
    for page, text in (
        ("results", f"at a loss of {default} there, at four times that inner rate at {wide}"),
        ("models", f"to a loss of {wide} and 0.41 nats in place of {default}"),
    ):
        found = (claims.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert text in " ".join(found.split())


SECTIONS = ("The paper's claims", "Pretrained models that learn")  # others have runs that are not kept
NUMBER = r"[+−]?\d+\.\d+"
INTERVAL = re.compile(rf"(?:({NUMBER})\s+)?\[({NUMBER}),\s+({NUMBER})\]")


def pairs(one, other, tables):
    """Compared values of two methods: by seed, over all or those of a table, and by what is asked."""
    ours, theirs = one.figures, other.figures
    common = frozenset(ours.keys() & theirs.keys())
    for name in {name for seed in common for name in ours[seed].keys() & theirs[seed].keys()}:
        for seeds in {common, *(common & table for table in tables)}:
            found = [(ours[s].get(name), theirs[s].get(name)) for s in sorted(seeds)]
            if all(isinstance(value, (int, float)) for both in found for value in both):
                yield found
            elif "of each" in name:
                yield [both for a, b in found for both in zip(a, b, strict=True)]


def differences(results):
    """Mean and 95 % interval of the paired differences between any two methods of a task."""
    for result in results:
        tables = {frozenset(each.seeds) for each in TABLES if each.task == result.task.name and each.seeds}
        for one, other in combinations(result.rows.values(), 2):
            for values in pairs(one, other, tables):
                found = [a - b for a, b in values]
                if bounds := interval(found):
                    yield fmean(found), *bounds
                    yield -fmean(found), -bounds[1], -bounds[0]


def topics(text):
    """Paragraphs under a heading in bold, without its tables, and the tasks whose commands they name."""
    for section in SECTIONS:
        prose = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
        for topic in re.split(r"\n(?=\*\*[A-Z])", prose):
            commands = re.findall(r"nested-learning eval ([\w -]+)", topic)
            yield topic, {word for command in commands for word in command.split()}


def test_intervals_of_the_page_are_those_of_the_runs(results):
    text = claims.RESULTS.read_text(encoding="utf-8")
    for name in claims.blocks(results):
        before, _, after = claims.parts(text, name)
        text = before + after
    checked = 0
    for topic, tasks in topics(text):
        stated = [tuple(number.lstrip("+") for number in found) for found in INTERVAL.findall(topic)]
        if not stated:
            continue
        known = {
            tuple(f"{value:.{decimals}f}".replace("-", "−") for value in each)
            for each in differences(result for result in results if result.task.name in tasks)
            for decimals in (2, 3)
        }
        known |= {("", *bounds) for _, *bounds in known}
        assert [each for each in stated if each not in known] == [], topic.splitlines()[0]
        checked += len(stated)
    assert checked > 40


def test_rows_have_three_seeds_or_say_so(results):
    for result in results:
        for row in result.rows.values():
            assert len(row.figures) >= min(SEEDS, getattr(result.task.options, "seeds", SEEDS)), row.method


def test_runs_are_taken_over_once(tmp_path, monkeypatch):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    line = {"what": "trial", "task": "recall", "version": 1, "options": {}, "method": {"name": "hope"}}
    line |= {"seed": 0, "tuning": False, "device": "cpu", "figures": {"x": 1.0}, "seconds": 1.0, "made": {}}
    runs = [
        {**line, "error": None},
        {**line, "seed": 1, "error": "it failed"},
        {**line, "seed": 2, "error": None},
    ]
    first.write_text("".join(json.dumps(each) + "\n" for each in runs[:2]))
    second.write_text("".join(json.dumps({**each, "seconds": 2.0}) + "\n" for each in runs))
    monkeypatch.setattr(claims, "KEPT", tmp_path / "kept" / "trials.jsonl")
    assert claims.take_over([first]) == 1
    assert claims.take_over([first, second]) == 1
    kept = [json.loads(each) for each in claims.KEPT.read_text().splitlines()]
    assert [(each["seed"], each["seconds"]) for each in kept] == [(0, 1.0), (2, 2.0)]
