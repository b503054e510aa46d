"""The report in a real browser: what it draws, how it follows the scrubber, how it fits a phone and
stands hostile text.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.report.page import CHARTS, render
from launch.runs.run import read_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")


class Browser:
    """Headless Chromium, driven by DevTools messages over a pipe (no port, no package)."""

    def __init__(self, profile: Path):
        # we write to here[1], they write to theirs[1]
        here, theirs = os.pipe(), os.pipe()
        os.set_inheritable(here[0], True)
        os.set_inheritable(theirs[1], True)

        def connect() -> None:  # the browser reads file descriptor 3 and writes 4
            reads, writes = os.dup(here[0]), os.dup(theirs[1])
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        self.process = subprocess.Popen(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-pipe",
                "--no-first-run",
                "--force-color-profile=srgb",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(here[0])
        os.close(theirs[1])
        self.writer, self.reader = here[1], theirs[0]
        self.rest, self.number, self.session = b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        page = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.writer, data) :]
        while True:
            while b"\0" not in self.rest:
                piece = os.read(self.reader, 1 << 20)
                assert piece, f"the browser ended while it was asked for {method}"
                self.rest += piece
            text, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            kind, facts = answer.get("method"), answer.get("params", {})
            if kind == "Runtime.exceptionThrown":
                self.problems.append(
                    facts["exceptionDetails"]["exception"].get("description", "exception")
                )
            elif kind == "Log.entryAdded" and facts["entry"]["level"] == "error":
                self.problems.append(facts["entry"]["text"])
            elif kind == "Network.requestWillBeSent":
                self.requests.append(facts["request"]["url"])

    def run(self, expression: str) -> Any:
        result = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(
        self,
        page: Path,
        fragment: str = "",
        width: int = 1280,
        height: int = 800,
        dark: bool = False,
    ) -> float:
        """Load a page and wait until it has drawn everything; returns the milliseconds that took,
        by its own clock.
        """
        self.problems, self.requests = [], []
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=page.resolve().as_uri() + fragment)
        for _ in range(600):
            if ready := self.run(
                "location.protocol === 'file:' && document.documentElement?.dataset.ready"
            ):
                return float(ready)
            time.sleep(0.05)
        raise AssertionError(f"{page} is not ready after 30 s: {self.problems}")

    def screenshot(self, path: Path, whole: bool = False) -> None:
        path.write_bytes(
            base64.b64decode(
                self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
            )
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.writer)
        os.close(self.reader)


# --- runs and pages -------------------------------------------------------------------------------


def _sibling() -> Any:
    """test_report.py, which writes the runs; tests are no package."""
    spec = importlib.util.spec_from_file_location(
        "report_runs", Path(__file__).with_name("test_report.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _sibling()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """One run with a collapse, and an alarm whose text attacks."""
    run = runs.make_run(tmp_path_factory.mktemp("one") / "run", steps=30, collapse=20)
    runs.write_lines(
        run / "alarms.jsonl",
        [runs.alarm(20, layer=3, expert=5, message=runs.HOSTILE, action="stop")],
    )
    return write_page([run])


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    return write_page(
        [runs.make_run(folder / name, steps=steps) for name, steps in (("short", 8), ("long", 12))]
    )


def write_page(folders: list[Path], refresh_seconds: float | None = None) -> Path:
    output = folders[0] / "index.html"
    output.write_text(render([read_run(str(folder)) for folder in folders], refresh_seconds))
    return output


def routing_line(page: Path, step: int) -> dict[str, Any]:
    return json.loads((page.parent / "routing.jsonl").read_text().splitlines()[step - 1])


BUSIEST = (
    "(e => [+e.dataset.layer, +e.dataset.expert, "
    "+e.dataset.load])(document.querySelector('#busiest li'))"
)
SHARES = "[...document.querySelectorAll('#k-bars rect')].map(r => +r.dataset.share)"
PIXELS = (
    "document.getElementById('heatmap').toDataURL().length + "
    "document.getElementById('heatmap').toDataURL()"
)
SETTLED = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"


def expect_frame(browser: Browser, page: Path, step: int) -> None:
    """What stands beside the heatmap and in the histogram is what the step's line says."""
    line = routing_line(page, step)
    load = np.array(line["counts"]) / np.mean(line["counts"], axis=1, keepdims=True)
    layer, expert, shown = browser.run(BUSIEST)
    row = runs.LAYERS.index(layer)
    assert (
        shown == pytest.approx(load[row, expert], rel=0.03)
        and load[row, expert] >= 0.95 * load.max()
    )
    shares = np.array(line["k_histogram"]).sum(0) / np.sum(line["k_histogram"])
    assert browser.run(SHARES) == pytest.approx(shares[:3].tolist(), abs=1e-4)
    assert browser.run("document.getElementById('frame').dataset.step") == str(step)


# --- tests ----------------------------------------------------------------------------------------


def test_it_opens_without_errors_requests_or_attacks(browser, page):
    browser.open(page)
    assert browser.problems == [] and set(browser.requests) <= {
        "about:blank",
        page.resolve().as_uri(),
    }
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "layer 3: expert 5 takes 92% of assignments" in browser.run(
        "document.getElementById('overview').innerText"
    )
    assert browser.run("document.getElementById('overview').getBoundingClientRect().top") < 200


def test_the_scrubber_moves_heatmap_and_histogram(browser, page):
    browser.open(page, "#step=17")
    expect_frame(browser, page, 17)
    before = browser.run(PIXELS)
    browser.run("location.hash = '#step=25'; " + SETTLED)
    expect_frame(browser, page, 25)
    assert browser.run(BUSIEST)[:2] == [3, 5] and browser.run(PIXELS) != before
    browser.run(
        "s = document.getElementById('scrubber'); s.value = 3; s.dispatchEvent(new "
        f"Event('input')); {SETTLED}"
    )
    expect_frame(browser, page, 4)
    assert "step=4" in browser.run("location.hash")
    for key, step in (("ArrowRight", 5), ("ArrowLeft", 4), ("ArrowLeft", 3)):
        browser.ask("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        browser.run(SETTLED)
        expect_frame(browser, page, step)


def test_play_runs_to_the_end(browser, page):
    browser.open(page, "#step=24")
    browser.run("document.getElementById('play').click()")
    for _ in range(100):
        if browser.run("document.getElementById('play').getAttribute('aria-pressed')") == "false":
            break
        time.sleep(0.05)
    expect_frame(browser, page, 30)


@pytest.mark.parametrize("width", (1280, 390, 320))
@pytest.mark.parametrize("dark", (False, True))
def test_nothing_is_too_wide_or_overlaps(browser, two, width, dark):
    browser.open(two, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert (
        browser.run("""(() => {  // texts of one drawing that lie on one another
        const hits = [];
        for (const svg of document.querySelectorAll('figure svg[role=img]')) {
            const boxes = [...svg.querySelectorAll('text')].map(
                t => [t.textContent, t.getBoundingClientRect()]);
            const meet = (p, q) => p.left < q.right && q.left < p.right &&
                p.top + 3 < q.bottom && q.top + 3 < p.bottom;
            boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(
                ([b, q]) => meet(p, q) && hits.push(`${a} on ${b}`)));
        }
        return hits; })()""")
        == []
    )
    contrast = browser.run("""(() => {
        const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
        const light = name => rgb(name).reduce(
            (sum, x, i) => sum + [0.2126, 0.7152, 0.0722][i] * linear(x / 255), 0.05);
        const ground = light('card');
        return ['text', 'muted', 'accent', 'critical', 'warning', 'fine'].map(light).map(
            l => Math.max(l, ground) / Math.min(l, ground)); })()""")
    assert min(contrast) >= 4.5


def test_figures_and_controls_have_names(browser, two):
    browser.open(two)
    assert (
        browser.run("""[...document.querySelectorAll('figure canvas, figure svg[role=img]')]
        .filter(e => e.getClientRects().length && !(e.getAttribute('aria-label') || '').length)
        .length""")
        == 0
    )
    assert (
        browser.run("""[...document.querySelectorAll('button, select, input')]
        .filter(e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim())
        .length""")
        == 0
    )
    assert (
        browser.run("document.getElementById('scrubber').getAttribute('aria-valuetext')")
        == "step 8, 8 of 8"
    )


def test_runs_are_overlaid_and_can_be_chosen(browser, two):
    browser.open(two)
    lines = """[...document.querySelectorAll('[data-chart="Loss by tokens"] path')]
        .map(p => p.dataset.run)"""
    assert browser.run(lines) == ["short", "short", "long", "long"]
    browser.run(
        "s = document.getElementById('run'); s.value = 1; s.dispatchEvent(new Event('change'))"
    )
    browser.run("new Promise(r => setTimeout(r, 100))")
    assert browser.run("document.getElementById('frame').dataset.step") == "12"
    assert browser.run("location.hash") == "" or "run=1" in browser.run("location.hash")


def drawn(browser: Browser, chart: str, of: str) -> list[list[float]]:
    """Heights of a path of a chart, from its top."""
    found = browser.run(
        f"[...document.querySelectorAll('[data-chart=\"{chart}\"] path{of}')]"
        ".map(p => p.getAttribute('d'))"
    )
    return [[float(y) for y in re.findall(r"[ML][\d.]+ ([-\d.]+)", path)] for path in found]


def test_the_loss_can_be_smoothed_and_drawn_by_its_logarithm(browser, page):
    browser.open(page)
    chart, line = "Loss by tokens", '[data-series="train/loss"]'
    (plain,) = drawn(browser, chart, line)
    assert drawn(browser, chart, "[data-raw]") == []

    # the fixture's loss falls by as much each step: its mean over the past lies above it
    browser.run("s = document.getElementById('smooth'); s.value = 0.8; s.oninput()")
    (smooth,), (raw,) = drawn(browser, chart, line), drawn(browser, chart, "[data-raw]")
    assert raw == plain and smooth[0] == raw[0]
    fall = (raw[-1] - raw[0]) / (len(raw) - 1)
    weights = [0.8**i for i in range(len(raw))]
    lag = sum(i * w for i, w in enumerate(weights)) / sum(weights)
    assert raw[-1] - smooth[-1] == pytest.approx(lag * fall, abs=0.2)
    assert "0.80" in browser.run("document.getElementById('smooth-is').textContent")
    assert drawn(browser, "Experts per token", "[data-raw]") == []

    browser.run("s.value = 0; s.oninput(); l = document.getElementById('log'); l.click()")
    (logarithmic,) = drawn(browser, chart, line)
    losses = [6 - 0.1 * step for step in range(1, len(plain) + 1)]
    spans = [(y - logarithmic[0]) / (logarithmic[-1] - logarithmic[0]) for y in logarithmic]
    wanted = [math.log(losses[0] / loss) / math.log(losses[0] / losses[-1]) for loss in losses]
    assert spans == pytest.approx(wanted, abs=0.01)
    ticks = browser.run(
        f"[...document.querySelectorAll('[data-chart=\"{chart}\"] svg text')]"
        ".map(t => t.textContent)"
    )
    assert "4" in ticks and browser.problems == []


def test_the_theme_can_be_chosen(browser, page):
    browser.open(page)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    browser.run("theme = document.getElementById('theme'); theme.click(); theme.click()")
    assert browser.run("theme.textContent") == "Theme: dark" and browser.run(colour) != light
    browser.run("theme.click()")


def test_a_watched_page_reloads_and_keeps_its_place(browser, tmp_path):
    run = runs.make_run(tmp_path / "run", steps=6)
    page = write_page([run], refresh_seconds=0.4)
    browser.open(page, "#step=2")
    browser.run("window.before = 1; scrollTo({top: 700, behavior: 'instant'})")
    for _ in range(100):
        if browser.run("window.before === undefined && !!document.documentElement?.dataset.ready"):
            break
        time.sleep(0.05)
    assert browser.run("document.getElementById('frame').dataset.step") == "2"
    assert browser.run("scrollY") == 700


def test_one_record_and_dense_models_open(browser, tmp_path):
    for number, run in enumerate(
        (
            runs.make_run(tmp_path / "one", steps=1),
            runs.write_config(tmp_path / "dense", "model.num_experts=0", "router.top_k=0"),
        )
    ):
        if number:
            runs.write_lines(run / "metrics.jsonl", [{"step": 1, "tokens": 5, "train/loss": 3.0}])
        browser.open(write_page([run]))
        assert browser.problems == []
    assert "dense model" in browser.run("document.getElementById('frames-missing').innerText")


def test_an_old_browser_is_told_why_the_heatmap_is_missing(browser, page):
    script = browser.ask(
        "Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream"
    )["identifier"]
    browser.open(page)
    browser.ask("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    assert browser.problems == []
    assert "no DecompressionStream" in browser.run(
        "document.getElementById('frames-missing').innerText"
    )


@pytest.mark.slow
def test_a_large_run_is_small_and_opens_fast(browser, tmp_path):
    """48 layers of 256 experts, 2,000 lines of loads that vary by a quarter at random: nothing for
    deflate to find.
    """
    run = runs.write_config(
        tmp_path / "run",
        "model.num_layers=48",
        "model.num_dense_layers=0",
        "model.num_experts=256",
        "model.top_k=8",
    )
    rng = np.random.default_rng(0)
    tables = [
        json.dumps(np.maximum(0, rng.normal(4096, 1024, (48, 256))).astype(int).tolist())
        for _ in range(150)
    ]
    histogram = json.dumps([[0] * 7 + [100, 800, 124]] * 48)
    with (run / "routing.jsonl").open("w") as file:
        for step in range(2000):
            file.write(
                f'{{"step": {step}, "tokens": {step * 131072}, "counts": '
                f"{tables[step * 37 % 150]}, "
                f'"k_histogram": {histogram}}}\n'
            )
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(2000):
            file.write(
                json.dumps(
                    {
                        "step": step,
                        "tokens": step * 131072,
                        **{key: float(rng.random()) for chart in CHARTS for key, _ in chart.series},
                    }
                )
                + "\n"
            )
    started = time.process_time()
    page = write_page([run])
    built = time.process_time() - started
    opened = min(browser.open(page) for _ in range(2))
    print(
        f"built in {built:.1f} s of processor time, {page.stat().st_size / 1e6:.2f} MB, open in "
        f"{opened / 1000:.2f} s"
    )
    assert page.stat().st_size < 15e6 and opened < 3000 and built < 30
    assert browser.run("document.getElementById('scrubber').max") == "487"
    assert "488 of 2,000 lines" in browser.run("document.querySelector('footer').innerText")
