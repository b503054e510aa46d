"""The decision page in a real browser."""

from __future__ import annotations

import pytest

from launch.comparing.page import render
from tests.launch.test_compare import made_up
from tests.launch.test_report_browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")
COLOUR = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "compare.html"
    path.write_text(render(made_up()))
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_draws_every_point(browser, page, width):
    colours = []
    for dark in (False, True):
        browser.open(page, width=width, dark=dark)
        colours.append(browser.run(COLOUR))
        assert browser.problems == []
        assert set(browser.requests) <= {"about:blank", page.resolve().as_uri()}
        # tables scroll by themselves, the page does not
        assert browser.run("document.documentElement.scrollWidth") <= width
        points = "document.querySelectorAll('figure .plot [data-variant]').length"
        assert browser.run(points) == 12
        assert browser.run("document.title").startswith("Comparison")  # no attack has run
        assert browser.run("document.querySelectorAll('img').length") == 0
    assert colours[0] != colours[1]


def test_the_decision_stands_first_and_a_point_says_what_it_is(browser, page):
    browser.open(page)
    assert browser.run("document.querySelector('.verdict').getBoundingClientRect().top") < 260
    browser.run(
        "document.querySelector('figure [data-variant=adaptive]')"
        ".dispatchEvent(new PointerEvent('pointerenter'))"
    )
    assert "adaptive, tiny" in browser.run("document.querySelector('figure .tip').textContent")
