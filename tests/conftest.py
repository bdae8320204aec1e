"""What all tests share: two halves that can run side by side, and a real browser for the pages that we make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.debian import need


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lab hosts have names and addresses of their own: their tests stay in one process, all others in a second."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("lab" if item.nodeid.startswith("tests/lab/") else "here"))


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
