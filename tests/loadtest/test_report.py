"""The report in a real browser: on a phone and on a desk, no script, no network, nothing wider than the screen."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from selenium import webdriver

from llamaherd_loadtest.report.write import write_report
from llamaherd_loadtest.tune.evidence import SLOTS, EngineSample, Load, Measurement
from llamaherd_loadtest.tune.journal import Journal
from llamaherd_loadtest.tune.settings import Settings
from llamaherd_loadtest.tune.verdict import make_verdict

from .simulated import CURRENT, LIMITS, SimulatedServer, search

CHARTS = 7
TOO_WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT_OFF = "const e = document.querySelector('.wide'); return e.scrollWidth - e.clientWidth"
SIZES = """return [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect())
    .map(r => [r.width, r.height])"""
REQUESTS = "return performance.getEntriesByType('resource').length"


class Recording:
    """A simulated server whose windows hold all that a real one leaves: latencies, stalls, slots and KV cache."""

    def __init__(self, server: SimulatedServer) -> None:
        self._server, self._draw = server, random.Random(1)

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        measured = self._server.measure(settings, window_s, seed, load)
        if measured.fault:
            return measured
        slots = int(settings["parallel"])
        ttft, tpot = (
            [measured.observed[f"{name}_p95"] * self._draw.uniform(0.6, 1.02) for _ in range(50)]
            for name in ("ttft", "tpot")
        )
        return replace(
            measured,
            concurrency=load.concurrency or slots,
            ttft_ms=ttft,
            tpot_ms=tpot,
            stalls=[(i * window_s / 50, gap * self._draw.uniform(1, 4)) for i, gap in enumerate(tpot)],
            engine=[EngineSample(float(i), slots, 80 * slots + 9 * i, 2048 * slots) for i in range(20)],
            client_cpu=0.1,
            client_lag_ms=1.5,
        )


def write_folder(folder: Path) -> None:
    """What a tuning job leaves."""
    journal = Journal(folder / "journal.jsonl", "simulated", 3, CURRENT)
    tried = search(SimulatedServer(3), CURRENT, budget_s=900, seed=3, bench=Recording(SimulatedServer(3)))
    tried.on_step = journal.record
    choice = tried.run()
    capacity = tried.capacity(choice.record.settings, 600)
    verdict = make_verdict(tried, choice, [])
    verdict.capacity = str(capacity)
    verdict.limits = {limit.name: limit.ms for limit in LIMITS}
    verdict.workload = {"name": "chat", "description": "simulated"}
    model = {"name": "simulated", "size_bytes": 1}
    verdict.provenance = {"model": model, "build": "SIMD = 1 | " * 30, "command": "python -m x", "seed": 3}
    (folder / "verdict.json").write_bytes(msgspec.json.encode(verdict))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    write_folder(folder)
    write_report(folder, folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "light"), (390, "dark")])
def test_the_report_is_legible_in_a_browser(browser: webdriver.Chrome, page: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    assert browser.execute_script(TOO_WIDE) == 0
    assert browser.execute_script(REQUESTS) == 0
    sizes = browser.execute_script(SIZES)
    assert len(sizes) == CHARTS
    assert all(w > 300 and h > 100 for w, h in sizes)
    assert not browser.get_log("browser")  # type: ignore[no-untyped-call]
    verdict = browser.find_element("tag name", "h1").text
    assert verdict.startswith("Change ") and "within all limits" in verdict
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")


def test_the_report_is_whole_in_print(browser: webdriver.Chrome, page: Path) -> None:
    a4 = {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # within a browser's own margins
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", a4)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    browser.get(page.as_uri())
    assert browser.execute_script(CUT_OFF) == 0
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_report_of_a_folder_without_a_verdict_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no readable verdict"):
        write_report(tmp_path, tmp_path / "report.html")
