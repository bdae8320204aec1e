"""One line for what apt and dnf say in pages."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

COMMAND = "'/usr/bin/apt-get -y -o \"Dpkg::Options::=--force-confdef\" install 'cmake=3'' failed: "
LOCKED = f"{COMMAND}E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 812 (unattended-upgr)\n"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"changed": True}, ""),
        ({"msg": "Nothing to do"}, ""),
        ({"msg": LOCKED}, "locked by process 812 (unattended-upgr) for longer than llamaherd_packages_wait_s"),
        ({"msg": "Failed to lock apt for exclusive operation: x"}, "locked by another program"),
        ({"msg": "No package matching 'cmake' is available"}, "have no cmake; run `apt update` ("),
        ({"msg": f"{COMMAND}E: Package 'ccache' has no installation candidate\n"}, "have no ccache; run"),
        ({"msg": "Failed to install some", "failures": ["No package ninja-build available."]}, "have no ninja-build;"),
        ({"msg": f"{COMMAND}E: You don't have enough free space in /var/cache/apt/archives/."}, "make room in /var"),
        ({"msg": f"{COMMAND}E: Unable to fetch some archives", "stderr": ""}, "cannot install cmake, ccache:"),
    ],
)
def test_one_line_with_the_remedy(packages: ModuleType, result: dict[str, Any], expected: str) -> None:
    found = packages.package_mistake(result, ["cmake", "ccache"])
    assert expected in found
    assert bool(expected) == bool(found)
    assert "\n" not in found
    assert "force-confdef" not in found
