"""The status page, as a browser without scripts shows it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By

from tests.server.conftest import paced, running

from .conftest import Serve
from .double import Double


async def test_it_tells_how_the_server_does(serve: Serve, browser: webdriver.Chrome) -> None:
    async with serve(Double(tokens=4)) as served:
        await served.chat()
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        await asyncio.to_thread(browser.get, str(served.http.base_url))  # this very event loop serves it
        assert browser.title == "llamaherd: ready"
        row = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "tbody td")]
        slots = served.state.engine.status().settings.parallel
        assert row[:5] == ["double", "embedded", "ready", f"0 of {slots}", "0"]
        # nothing that its own policy refuses
        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_it_tells_of_slots_queue_and_tokens_under_load(tmp_path: Path, browser: webdriver.Chrome) -> None:
    """Two slots, five requests; the page reads itself again, nobody tells it to."""
    cells, head = list[str](), ""
    with ThreadPoolExecutor() as pool, running(tmp_path, paced()) as server:
        for _ in range(5):
            body = {"prompt": "One, two,", "max_tokens": 400}
            pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        browser.get(server.url)
        while cells[3:5] != ["2 of 2", "3"] or head.endswith(" 0 tokens/s"):
            with suppress(WebDriverException):  # it was just read again
                cells = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "tbody td")]
                head = browser.find_element(By.TAG_NAME, "h1").text
        server.process.kill()
    assert cells[:3] == ["smollm2", "embedded", "ready"]


async def test_it_needs_a_key_from_elsewhere(serve: Serve) -> None:
    key = f'[[keys]]\nname = "someone"\nsha256 = "{"0" * 64}"\n'
    async with serve(Double(), keys=key) as served:
        assert (await served.http.get("/")).status_code == 200
        elsewhere = await served.http.get("/", headers={"X-Forwarded-For": "203.0.113.7"})
        assert elsewhere.status_code == 401


async def test_a_name_is_text(serve: Serve) -> None:
    async with serve(Double()) as served:
        object.__setattr__(served.state.settings.model, "name", "<script>x</script>")
        served.state.models["<script>x</script>"] = served.state
        page = (await served.http.get("/")).text
    assert "<script" not in page
    assert "&lt;script&gt;x" in page
