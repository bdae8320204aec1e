"""The report in a real browser: on a phone and on a desk, no script, no network, nothing wider than the screen."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from selenium import webdriver

from llamaherd_loadtest.health import Health
from llamaherd_loadtest.limits import parse_limit
from llamaherd_loadtest.report.charts import draw
from llamaherd_loadtest.report.write import write_report
from llamaherd_loadtest.samples import Sample, write_samples
from llamaherd_loadtest.summary import summarise
from llamaherd_loadtest.tune.evidence import SLOTS, EngineSample, Load, Measurement
from llamaherd_loadtest.tune.journal import Journal, read_steps
from llamaherd_loadtest.tune.settings import Settings
from llamaherd_loadtest.tune.verdict import make_verdict, read_verdict

from .simulated import CURRENT, LIMITS, SimulatedServer, search

CHARTS = 7
TOO_WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT_OFF = "const e = document.querySelector('.wide'); return e.scrollWidth - e.clientWidth"
SIZES = """return [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect())
    .map(r => [r.width, r.height])"""
REQUESTS = "return performance.getEntriesByType('resource').length"


class Recording:
    """A simulated server whose windows hold all that a real one leaves: latencies, stalls, slots and KV cache."""

    def __init__(self, server: SimulatedServer, requests: int = 50) -> None:
        self._server, self._draw, self._requests = server, random.Random(1), requests

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        measured = self._server.measure(settings, window_s, seed, load)
        if measured.fault:
            return measured
        slots = int(settings["parallel"])
        ttft, tpot = (
            [measured.observed[f"{name}_p95"] * self._draw.uniform(0.6, 1.02) for _ in range(self._requests)]
            for name in ("ttft", "tpot")
        )
        return replace(
            measured,
            requests=self._requests,
            concurrency=load.concurrency or slots,
            ttft_ms=ttft,
            tpot_ms=tpot,
            stalls=[(i * window_s / self._requests, gap * self._draw.uniform(1, 4)) for i, gap in enumerate(tpot)],
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
    about = "Intel Xeon, 8 cores, 64 GiB; llama.cpp 1"
    verdict.provenance = {
        "model": model,
        "about": about,
        "build": "SIMD = 1 | " * 30,
        "command": "python -m x",
        "seed": 3,
    }
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


def test_what_a_change_does_to_each_stream_and_how_sure_it_is_stands_in_the_headline(page: Path) -> None:
    verdict = read_verdict(page.parent / "verdict.json")
    before, after = (
        next(row for row in verdict.table if row.settings == settings) for settings in (verdict.current, verdict.chosen)
    )
    assert before.stream_tokens_per_s is not None and after.stream_tokens_per_s is not None
    assert before.stream_tokens_per_s > after.stream_tokens_per_s, "more streams, each slower"
    speeds = f", each stream {before.stream_tokens_per_s:.3g} → {after.stream_tokens_per_s:.3g} tokens/s, "
    assert speeds + "within all limits; " in verdict.sentence
    tried = search(SimulatedServer(3), CURRENT, budget_s=900, seed=3, bench=Recording(SimulatedServer(3), requests=7))
    choice = tried.run()
    doubtful = make_verdict(tried, choice, [])
    requests = next(row.requests for row in doubtful.table if row.settings == doubtful.chosen)
    assert f", within all limits as far as {requests} requests show; " in doubtful.sentence


def test_points_are_named_and_settings_that_differ_have_lines_of_their_own(page: Path) -> None:
    verdict, steps = read_verdict(page.parent / "verdict.json"), read_steps(page.parent / "journal.jsonl")
    charts = dict(draw(verdict, [step for step in steps if step.phase != "load"]))
    numbers = [f">{n}</text>" for n in range(1, 1 + len([row for row in verdict.table if row.ttft_p95_ms]))]
    assert all(number in charts["Throughput against time to first token"] for number in numbers)
    lines = {
        f"batch {s['batch']}, ubatch {s['ubatch']}, kv_unified {'on' if s['kv_unified'] else 'off'}"
        for s in (verdict.current, verdict.chosen)
    }
    assert len(lines) == 2 and all(line in charts["Latency by load"] for line in lines)
    html = page.read_text()
    assert "1. parallel" in html and "On Intel Xeon, 8 cores, 64 GiB; llama.cpp 1." in html


def test_a_load_test_has_a_report_of_its_own(browser: webdriver.Chrome, tmp_path: Path) -> None:
    samples = [
        Sample(
            index=i, scheduled=i / 4, sent=i / 4, first=i / 4 + 0.3, last=i / 4 + 1.3, end=i / 4 + 1.3, gaps=[0.1] * 10
        )
        for i in range(80)
    ]
    samples.append(Sample(index=80, scheduled=19.0, sent=19.0, end=21.5, outcome="cut_off"))
    limits = [parse_limit("ttft_p95=2s"), parse_limit("tpot_p95=120ms"), parse_limit("e2e_p99=2s")]
    summary = summarise(samples, 0.0, 21.5, Health(cpu=0.1, lag_p95_s=0.001), limits)
    write_samples(tmp_path / "samples.jsonl", samples)
    (tmp_path / "summary.json").write_bytes(msgspec.json.encode(summary))
    page = tmp_path / "report.html"
    write_report(tmp_path, page, {"host": "herd1", "hardware": "Intel Xeon, 8 cores, 64 GiB", "build": "1-cpu"})
    browser.get(page.as_uri())
    heading = browser.find_element("tag name", "h1").text
    assert heading.startswith("40.9 output tokens/s, each stream 10; TTFT p95 300 ms (300 to 300); TPOT p95 100 ms (")
    assert heading.endswith("limit ttft_p95, e2e_p99 unresolved.")
    text = browser.find_element("tag name", "body").text
    assert "On Intel Xeon, 8 cores, 64 GiB." in text and "1-cpu" in text
    assert "ttft_p95 ≤ 2000 ms 1 of 81 unresolved" in text
    assert len(browser.execute_script(SIZES)) == 2 and browser.execute_script(TOO_WIDE) == 0
    (tmp_path / "summary.json").write_bytes(msgspec.json.encode(replace(summary, fault="the client was late")))
    write_report(tmp_path, page)
    assert "<h1>This run is invalid: the client was late.</h1>" in page.read_text()
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match="does not hold a load test"):
        write_report(tmp_path, page)


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
    with pytest.raises(ValueError, match="is not a readable verdict"):
        write_report(tmp_path, tmp_path / "report.html")
