"""The page of a server in a real browser: it talks, stops, and stands hostile text."""

from __future__ import annotations

import time

import pytest

from tests.launch.test_report_browser import CHROMIUM, Browser
from tests.launch.test_serving import TOKEN, alone, make_engine, serving, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed"),
]
HOSTILE = "<b>x</b><img/src=x/onerror=document.title='hit'>"


class Page:
    """The page of a server, opened."""

    def __init__(self, browser: Browser, port: int):
        self.browser = browser
        browser.problems, browser.requests = [], []
        browser.ask("Page.navigate", url=f"http://127.0.0.1:{port}/")
        # A page that is still read has half of its elements, and the one before has them all.
        self.wait(f"location.port === '{port}' && document.readyState === 'complete'")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + 30
        while not self.browser.run(condition):
            assert time.monotonic() < deadline, (condition, self.browser.problems)
            time.sleep(0.05)

    def set(self, name: str, value: str) -> None:
        self.browser.run(
            f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('change')) }})"
            f"(document.getElementById({name!r}))"
        )

    def send(self, text: str) -> None:
        self.wait("!document.getElementById('input').disabled")
        self.set("input", text)
        self.browser.run("document.getElementById('go').click()")

    def turns(self, kind: str) -> list[str]:
        found = f"[...document.querySelectorAll('.turn.{kind}')].map(e => e.textContent)"
        return self.browser.run(found)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.kill()
    browser.process.wait()


def test_the_page_talks_and_stops(browser):
    engine = make_engine(max_slots=2)
    with serving(engine) as served:
        page = Page(browser, served.port)
        page.send(HOSTILE)
        page.wait("document.querySelectorAll('.facts').length == 1")
        ids = served.tokenizer.encode(f"<user>{HOSTILE}<|end|><assistant>").ids
        text, _ = alone(served, ids)
        assert page.turns("user") == [HOSTILE] and page.turns("assistant") == [text]
        assert browser.run("document.title") == "tiny"

        # The next message comes with what was said before, and its own budget.
        page.set("budget", "1")
        page.send("b")
        page.wait("document.querySelectorAll('.facts').length == 2")
        assert len(page.turns("assistant")) == 2

        # A long answer is stopped, and its pages are free.
        page.set("mode", "text")
        page.set("tokens", "200")
        page.send("cc")
        until(lambda: engine.running)
        browser.run("document.getElementById('go').click()")
        until(lambda: engine.pool.available == engine.pool.num_pages - 1)
        page.wait("document.querySelector('.facts')?.textContent.startsWith('stopped')")

        for width in (1280, 390):
            browser.ask(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=800,
                deviceScaleFactor=1,
                mobile=width < 500,
            )
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.problems == []
        assert all(r.startswith(f"http://127.0.0.1:{served.port}/") for r in browser.requests)


def test_the_page_asks_for_a_token(browser):
    with serving(make_engine(), token=TOKEN) as served:
        page = Page(browser, served.port)
        page.wait("document.getElementById('more').open")
        assert "asks for a token" in browser.run("document.body.innerText")
        page.set("token", TOKEN)
        page.send("a")
        page.wait("document.querySelectorAll('.facts').length == 1")
        assert page.turns("error") == []
