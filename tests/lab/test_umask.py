"""Hosts whose root and ssh user have umask 077 or 027, deployed from a controller that has 077 too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.conftest import Herd

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3000)]

UMASKS = {"t1": "077", "t2": "027"}
STRICT = """
sed -i 's/^UMASK.*/UMASK {umask}/' /etc/login.defs
echo umask {umask} >/etc/profile.d/umask.sh
for service in sshd common-session; do echo 'session optional pam_umask.so umask=0{umask}' >>/etc/pam.d/$service; done
"""


@pytest.fixture(scope="module")
def controller() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def strict(controller: None, pair: Herd) -> Herd:
    for host, umask in UMASKS.items():
        pair.sh(host, STRICT.format(umask=umask))
        assert pair.sh(host, "umask").strip() == f"0{umask}"
    return pair


def unchanged(strict: Herd) -> bool:
    changed = strict.succeed("deploy.yml").changed
    return [changed[host] for host in UMASKS] == [0, 0]


def test_they_are_deployed_serve_and_verify(strict: Herd) -> None:
    strict.succeed("deploy.yml")
    strict.succeed("verify.yml")
    assert unchanged(strict)


def test_what_an_earlier_run_left_unreadable_is_put_right(strict: Herd) -> None:
    for host in UMASKS:
        strict.sh(host, "chmod -R go= /opt/llamaherd /var/lib/llamaherd; systemctl restart llamaherd-server || true")
        assert strict.sh(host, "systemctl is-active llamaherd-server || true").strip() != "active"
    strict.succeed("deploy.yml")
    strict.succeed("verify.yml")
    assert unchanged(strict)
