"""The page at `/` in a real browser; skipped where there is none."""

from __future__ import annotations

import shutil

import pytest

from tests.server.serving import MINDS, client_of, memory_of, served

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TOLD = "my lighthouse is called Varnholm <b>bold</b>"


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(tmp_path):
    with served(tmp_path) as (address, _), client_of(address) as client:
        page = client.get("/").raise_for_status()
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.text.rstrip().endswith("</html>")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "innerHTML" not in page.text  # what users and models write is text


@pytest.mark.slow
@pytest.mark.parametrize("kind", MINDS)
def test_talk_see_undo_and_forget(tmp_path, kind):
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser_path is None:
        pytest.skip("there is no browser")
    with (
        served(tmp_path, MINDS[kind]()) as (address, _),
        client_of(address) as client,
        playwright.sync_playwright() as run,
    ):
        browser = run.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(address)
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        page.fill("#user", "anna")
        page.keyboard.press("Tab")
        page.fill("#text", TOLD)
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#lesson")).to_contain_text("tokens, mean surprise", timeout=20_000)
        assert page.locator(".turn.user").inner_text() == TOLD
        assert len(page.locator(".turn.assistant").inner_text()) == 12
        assert page.locator("#tokens span").count() == len(TOLD) + 1
        assert "nats" in page.locator("#tokens span").nth(3).get_attribute("title")
        assert memory_of(client)["tokens"] == len(TOLD) + 1
        page.fill("#text", "and more")
        page.click("#send")
        playwright.expect(page.locator("#lesson")).to_contain_text("9 tokens", timeout=20_000)
        assert memory_of(client)["conversations_to_undo"] == 1
        page.click("#undo")
        playwright.expect(page.locator("#note")).to_contain_text("taken back", timeout=20_000)
        assert memory_of(client)["tokens"] == 0
        assert page.locator(".turn").count() == 0
        page.fill("#text", "something else to learn")  # what was taken back stays so
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#lesson")).to_contain_text("tokens, mean", timeout=20_000)
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#forget")
        playwright.expect(page.locator("#note")).to_contain_text("forgotten", timeout=20_000)
        assert memory_of(client)["tokens"] == 0
        assert errors == []
        client.post("/v1/memories/learn", json={"text": "x", "user": "ben"})
        page.click("#undo")
        playwright.expect(page.locator("#note")).to_contain_text("0 conversations can be taken back")
        browser.close()
