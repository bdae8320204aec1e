"""What playbooks/verify.yml promises of one host, and its journal when a test fails.

These tests need a host: playbooks/verify.yml runs them (tests/lab runs that), a plain `pytest` does not collect them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host

from tests.verify.client import Client
from tests.verify.sudo import give_password

PROMISED = os.environ.get("LLAMAHERD_VERIFY")
collect_ignore_glob = [] if PROMISED else ["test_*.py"]


@pytest.fixture(scope="session")
def promised() -> dict[str, Any]:
    """What the inventory says of this host; roles/verify/vars/main.yml makes it."""
    assert PROMISED is not None
    promised: dict[str, Any] = json.loads(Path(PROMISED).read_text())
    return promised


@pytest.fixture(scope="session")
def host(promised: dict[str, Any]) -> Iterator[Host]:
    """testinfra's host, reached as Ansible reaches it."""
    host = testinfra.get_host(**promised["connection"])
    with pytest.MonkeyPatch.context() as patch:
        if promised["connection"]["sudo"] and (password := os.environ.get("LLAMAHERD_SUDO_PASSWORD")):
            give_password(host.backend, password, patch)
        yield host


@pytest.fixture(scope="session")
def client(promised: dict[str, Any]) -> Client:
    """A client as a user has one: the public address, the CA's certificate, a plain key."""
    key = Path(promised["keys_dir"], promised["key"]).read_text().strip()
    client = Client(promised["url"], promised["ca"] if promised["url"].startswith("https:") else None, key)
    if refusal := client.refusal():
        pytest.fail(
            f"clients refuse the certificate of {promised['url']}: {refusal}; "
            "renew or correct it, then run playbooks/deploy.yml --tags nginx",
            pytrace=False,
        )
    return client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    used = getattr(item, "funcargs", {})
    host = used.get("host")
    if report.when == "call" and report.failed and isinstance(host, Host):
        for unit in (*used["promised"]["units"], "nginx"):
            report.sections.append((f"journal of {unit}", journal(host, unit)))
    return report


def journal(host: Host, unit: str) -> str:
    """The unit's last words; a host that is out of reach has none, and that is no second failure."""
    try:
        lines: str = host.run("journalctl --unit=%s --lines=15 --no-pager --output=short-iso", unit).stdout
    except RuntimeError as error:
        return str(error)
    return lines
