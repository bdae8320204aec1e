"""What all tests share: two halves that can run side by side, and a real browser for the pages that we make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium import webdriver
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.debian import need


class Halves(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist is untyped
    """Lab hosts have names and addresses of their own: their tests stay in one process, all others in a second."""

    def _split_scope(self, nodeid: str) -> str:
        return "lab" if nodeid.startswith("tests/lab/") else "here"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Halves:
    return Halves(config, log)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    browser, driven = (need(program, "chromium", "chromium-driver") for program in ("chromium", "chromedriver"))
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driven))
    yield driver
    driver.quit()
