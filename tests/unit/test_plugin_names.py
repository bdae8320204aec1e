"""Roles name our plugins as llamaherd.llamaherd.<name>: a collection does not find a filter by its short name."""

from __future__ import annotations

import re
from types import ModuleType

from tests.unit.conftest import ROOT


def test_roles_name_our_plugins_in_full(
    filters: ModuleType, llama_server_filters: ModuleType, certificate_filters: ModuleType
) -> None:
    modules = {path.stem for kind in ("action", "modules") for path in ROOT.glob(f"plugins/{kind}/*.py")}
    ours = (filters, llama_server_filters, certificate_filters)
    names = "|".join(name for module in ours for name in module.FilterModule().filters())
    short = re.compile(rf"^\s+(?:{'|'.join(modules)}):|\|\s*(?:{names})\b|map\('(?:{names})'", re.MULTILINE)
    files = [path for folder in ("roles", "playbooks", "templates") for path in ROOT.glob(f"{folder}/**/*.[yj]*")]
    assert len(files) > 50
    assert {str(path): found for path in files if (found := short.findall(path.read_text()))} == {}
