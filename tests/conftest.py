"""What all tests share: two halves that can run side by side, and a real browser for the pages that we make."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from selenium import webdriver


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lab hosts have names and addresses of their own: their tests stay in one process, all others in a second."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("lab" if item.nodeid.startswith("tests/lab/") else "here"))


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
        subprocess.run([*install, "chromium", "chromium-driver"], check=True, timeout=900)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()
