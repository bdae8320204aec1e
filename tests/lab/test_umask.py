"""A host whose root and ssh user have umask 077, deployed from a controller that has it too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.conftest import Herd, booted

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3000)]

STRICT = """
sed -i 's/^UMASK.*/UMASK 077/' /etc/login.defs
echo umask 077 >/etc/profile.d/umask.sh
for service in sshd common-session; do echo 'session optional pam_umask.so umask=0077' >>/etc/pam.d/$service; done
"""


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    before = os.umask(0o077)
    try:
        with booted(tmp_path_factory.mktemp("inventory"), of="inventory") as herd:
            herd.sh("t1", STRICT)
            assert herd.sh("t1", "umask").strip() == "0077"
            yield herd
    finally:
        os.umask(before)


def test_it_is_deployed_serves_and_verifies(strict: Herd) -> None:
    strict.succeed("deploy.yml")
    strict.succeed("verify.yml")
    assert strict.succeed("deploy.yml").changed["t1"] == 0


def test_what_an_earlier_run_left_unreadable_is_put_right(strict: Herd) -> None:
    strict.sh("t1", "chmod -R go= /opt/llamaherd /var/lib/llamaherd; systemctl restart llamaherd-server || true")
    assert strict.sh("t1", "systemctl is-active llamaherd-server || true").strip() != "active"
    strict.succeed("deploy.yml")
    strict.succeed("verify.yml")
    assert strict.succeed("deploy.yml").changed["t1"] == 0
