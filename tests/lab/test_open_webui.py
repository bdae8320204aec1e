"""Open WebUI behind nginx: a person signs in and chats, in a real browser, with the real model."""

from __future__ import annotations

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions as wait_for
from selenium.webdriver.support.wait import WebDriverWait

from tests.lab.conftest import Herd

pytestmark = [
    pytest.mark.lab,
    pytest.mark.fleet,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("herd", ["bookworm"], indirect=True),
]
KEY_USED = 'journalctl -u llamaherd-server -o cat | grep -c \'"key": *"open-webui"\''


def test_a_person_signs_in_and_chats(herd: Herd, browser: webdriver.Chrome) -> None:
    hosts = herd.inventory / "hosts.yml"
    hosts.write_text(hosts.read_text() + "    chat:\n      hosts:\n        t1:\n")
    herd.succeed("deploy.yml")
    herd.succeed("open_webui.yml")
    browser.execute_cdp_cmd("Security.setIgnoreCertificateErrors", {"ignore": True})
    password = (herd.inventory / ".secrets/open_webui/admin_password").read_text().strip()
    chat(browser, f"https://{herd.address('t1')}:8444", password)
    assert int(herd.sh("t1", KEY_USED)) >= 1
    herd.succeed("verify.yml")
    assert herd.succeed("open_webui.yml").changed["t1"] == 0


def chat(browser: webdriver.Chrome, url: str, password: str) -> None:
    """Sign in, ask, and read the answer on the page; again after a reload, so that it was kept."""
    wait = WebDriverWait(browser, 180)
    browser.get(f"{url}/auth")
    wait.until(wait_for.element_to_be_clickable((By.ID, "email"))).send_keys("admin@localhost")
    browser.find_element(By.ID, "password").send_keys(password, Keys.ENTER)
    # What is new in this version, as everybody sees it once.
    wait.until(wait_for.element_to_be_clickable((By.XPATH, "//*[@role='dialog']//button[last()]"))).click()
    box = wait.until(wait_for.element_to_be_clickable((By.ID, "chat-input")))
    box.send_keys("Count from one to five.", Keys.ENTER)
    answered = (By.CSS_SELECTOR, ".chat-assistant p")
    assert wait.until(lambda page: page.find_element(*answered).text.strip())
    wait.until(wait_for.url_contains("/c/"))
    browser.refresh()
    assert wait.until(lambda page: page.find_element(*answered).text.strip())


def test_nothing_is_left_of_it(herd: Herd) -> None:
    herd.succeed("reset.yml", "-e", "skip_confirmation=true")
    assert (
        herd.sh("t1", "ls -d /var/lib/llamaherd-open-webui /var/lib/private/llamaherd* /opt/llamaherd 2>&- || true")
        == ""
    )
