"""The page: whole, escaped, small, and alive in a real browser where there is one."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import nested_learning.lens
from nested_learning.continual import Level, stack_levels
from nested_learning.lens import LearnedTrace, lens, page, record
from nested_learning.training.data import byte_tokenizer
from tests.continual.tiny_models import random_ids, tiny_model

SCRIPT = Path(nested_learning.lens.__file__).parent / "templates" / "lens.js"
NASTY = "</script><script>document.title = 'broken'</script>\n<b>&amp; \"'\u2028 ${x} {{ x }} <!-- </i>"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
VOID = {"meta", "img", "br", "link", "input"}


class NastyTokenizer:
    """A token is a whole text, the nasty one for id 0."""

    def decode(self, ids, **_):
        return "".join(NASTY if index == 0 else f"w{index} " for index in ids)


class Reader(HTMLParser):
    """Tags that are open, the words of the text, the JSON, the words of tables, and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.json, self.cells, self.addresses, self.scripts = [], [], "", "", [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))
        if tag == "i":
            self.words.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "i" in tags:
            self.words[-1] += data
        elif ("script", "data") in self.open:
            self.json += data
        elif "td" in tags:
            self.cells += data


@pytest.fixture(scope="module")
def learner_recording():
    learner = stack_levels(tiny_model(), NastyTokenizer(), levels=[Level(4, 0.3), Level(8, 0.1)])
    ids = random_ids(20)
    ids[::5] = 0
    return lens(learner, ids)


def check_whole(text, words):
    """Well formed, self-contained, with these words."""
    found = Reader(text)
    assert not found.open
    assert found.scripts == 2
    assert found.words == [word.replace("\n", "⏎\n") for word in words]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in found.addresses)
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|import\(", text)
    return json.loads(found.json)


def test_a_page_of_a_model_is_whole(hope, ids):
    ids[3] = 0
    model = hope(
        mixer_options={"self_modifying_titans": {"chunk_size": 4, "momentum": True}}, cms_update="regression"
    )
    recording = record(model, ids, NastyTokenizer())
    data = check_whole(page(recording), recording.tokens)
    assert NASTY in recording.tokens
    (memory,) = data["memories"]
    (trace,) = recording.memories
    assert [each["label"] for each in data["measures"]] == ["loss", "surprise, layers.0.mixer"]
    assert data["measures"][0]["values"][0] is None
    np.testing.assert_allclose(data["measures"][0]["values"][1:], recording.loss[1:], rtol=5e-3)
    np.testing.assert_allclose(memory["rates"]["η"]["mean"], trace.eta.mean(1), rtol=5e-3)
    np.testing.assert_allclose(memory["rates"]["μ"]["low"], trace.mu.min(1), rtol=5e-3)
    np.testing.assert_allclose(memory["rates"]["α"]["heads"], trace.alpha.T, rtol=5e-3)
    np.testing.assert_allclose(memory["recall"][-1], trace.recall[-1], rtol=5e-3)
    assert memory["singular"]["W1"][1][0] == pytest.approx(trace.singular_values["W1"][:, 0, 0], rel=5e-3)
    assert memory["distance"][2][-1] == pytest.approx(trace.distance[:, -1, 1], rel=5e-3)
    assert [mark[0] for mark in data["timeline"][0]["marks"]] == [8, 16, 24]


def test_a_page_of_a_learner_is_whole(learner_recording):
    text = page(learner_recording)
    data = check_whole(text, learner_recording.tokens)
    cells = Reader(text).cells
    assert NASTY.partition("\n")[0] in cells
    assert {write.level for write in learner_recording.learned.writes} == {0, 1}
    assert [mark[0] for mark in data["timeline"][1]["marks"]] == [8, 16]
    units = learner_recording.learned.units
    both = np.hypot.reduce([norms for name, norms in units.items() if ".0." in name])
    assert data["units"][0]["units"][0] == int(np.argmax(both))
    assert data["units"][0]["norms"][0] == pytest.approx(both.max(), rel=5e-3)


def test_a_notebook_has_the_page_in_a_frame(learner_recording):
    frame = learner_recording._repr_html_()
    (inner,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inner) == page(learner_recording)


def test_saving_writes_page_and_pictures(hope, ids, tmp_path, learner_recording, drawn):
    model = hope(["titans", "attention"], num_hidden_layers=2, cms_update="regression")
    written = record(model, ids).save(tmp_path / "new" / "folder")
    names = ["lens.html", "levels.png", "text.png", "tokens.png", "layers.0.mixer.png", "writes.png"]
    assert [path.name for path in written] == names
    written += [path for path in learner_recording.save(tmp_path) if path.name == "learned.png"]
    assert written[-1].name == "learned.png"
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def longer(recording, count):
    """A recording whose text is repeated until it has `count` tokens."""

    def repeated(values):
        return None if values is None else np.resize(values, (count, *values.shape[1:]))

    memories = [
        dataclasses.replace(
            trace, **{n: repeated(getattr(trace, n)) for n in ("surprise", "eta", "alpha", "mu")}
        )
        for trace in recording.memories
    ]
    tokens = (recording.tokens * count)[:count]
    found = dataclasses.replace(
        recording, tokens=tokens, ids=repeated(recording.ids), loss=repeated(recording.loss)
    )
    return dataclasses.replace(found, memories=tuple(memories) * 4)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_script_is_valid():
    subprocess.run(["node", "--check", str(SCRIPT)], check=True, timeout=60)


WATCH = "<script>window.problems = []; onerror = (m) => { problems.push(String(m)); };" + "".join(
    f"console.{name} = (...m) => {{ problems.push(m.join(' ')); }};" for name in ("error", "warn")
)
POINT = """<script>
const point = (element, x, y) => {
  const box = element.getBoundingClientRect();
  const at = { bubbles: true, clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  element.dispatchEvent(new MouseEvent("mousemove", at));
  const tip = document.getElementById("tip");
  return tip.hidden ? null : tip.textContent;
};
const words = Array.from(document.querySelectorAll("#text i"));
const found = { told: [], plots: {}, chosen: [], title: document.title };
const start = performance.now();
for (let i = 0; i < 200; i++) found.told.push(point(words[Math.floor(i * words.length / 200)], 0.5, 0.5));
found.hovering = performance.now() - start;
const select = document.getElementById("measure");
for (let i = 0; i < select.options.length; i++) {
  select.selectedIndex = i;
  select.dispatchEvent(new Event("change"));
  found.chosen.push(words.filter((word) => word.style.backgroundColor !== "transparent").length);
}
found.choosing = (performance.now() - start - found.hovering) / select.options.length;
for (const other of document.querySelectorAll("select")) {
  for (let i = other.options.length - 1; i >= 0; i--) {
    other.selectedIndex = i;
    other.dispatchEvent(new Event("change"));
  }
}
document.querySelectorAll("canvas").forEach((canvas, n) => {
  const ink = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((v) => v > 0);
  found.plots[canvas.id || "plot " + n] = [ink, point(canvas, 0.9, canvas.id === "units" ? 0.2 : 0.5)];
});
document.getElementById("ribbon").dispatchEvent(new MouseEvent("click", { clientX: 600 }));
found.here = words.findIndex((word) => word.classList.contains("here"));
found.scrolled = document.getElementById("text").scrollTop;
found.problems = problems;
const result = Object.assign(document.createElement("pre"), { id: "found" });
result.textContent = JSON.stringify(found);
document.body.append(result);
</script>"""


def in_a_browser(text, tmp_path):
    """What a headless browser finds on the page when someone points at everything."""
    path = tmp_path / "page.html"
    text = text.replace("<style>", f"{WATCH}</script><style>", 1).replace("</body>", f"{POINT}</body>")
    path.write_text(text, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, encoding="utf-8")
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL) or [done.stderr]
    return json.loads(html.unescape(found))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_ten_thousand_tokens_stay_fluent(hope, ids, tmp_path):
    ids[3] = 0
    model = hope(["self_modifying_titans"], mixer_options={"self_modifying_titans": {"chunk_size": 4}},
                 cms_update="regression")  # fmt: skip
    recording = longer(record(model, ids, NastyTokenizer()), 10_000)
    text = page(recording)
    assert len(text) < 4_000_000
    found = in_a_browser(text, tmp_path)
    assert not found["problems"]
    assert found["title"].startswith("Lens: HopeForCausalLM")
    assert found["told"][0].startswith("token 0 ")
    assert "surprise, layers.0.mixer  " in found["told"][100]
    assert re.search(r"layers\.0\.mixer  η 0\.\d+  α 0\.\d+", found["told"][199])
    assert found["hovering"] < 5_000  # milliseconds, 200 tokens; 40 on a machine at rest
    assert found["choosing"] < 3_000
    assert all(count > 5_000 for count in found["chosen"])
    assert found["plots"].keys() >= {"ribbon", "recall", "singular", "distance", "timeline"}
    for ink, told in found["plots"].values():
        assert ink
        assert told
    assert "η" not in found["plots"]["recall"][1]
    assert "key of token" in found["plots"]["recall"][1] or "memory after" in found["plots"]["recall"][1]
    assert 4_000 < found["here"] < 6_000
    assert found["scrolled"] > 100


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_a_learner_shows_its_units_and_writes(tmp_path, learner_recording):
    found = in_a_browser(page(learner_recording), tmp_path)
    assert not found["problems"]
    assert "loss with what was learned" in found["told"][100]
    assert re.search(r"unit \d+  ‖Δ‖ [\d.]+", found["plots"]["units"][1])
    assert re.search(r"after token \d+\nwritten, mean loss [\d.]+", found["plots"]["timeline"][1])


def test_a_learner_that_learned_nothing_says_so():
    learner = stack_levels(tiny_model(), levels=[Level(64, 0.3)])
    recording = lens(learner, random_ids(10))
    assert isinstance(recording.learned, LearnedTrace)
    assert "Nothing was learned: no weight has changed." in page(recording)


def test_a_text_is_read_by_its_tokenizer(hope):
    model = hope("titans", vocab_size=258)
    recording = lens(model, "a text", byte_tokenizer(), max_tokens=4)
    assert "".join(recording.tokens) == "a te"
    assert torch.equal(torch.from_numpy(recording.ids), torch.tensor(list(b"a te")))
