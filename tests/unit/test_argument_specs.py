"""Every role says what its variables are, and means what it says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from scripts import role_readmes
from tests.unit.conftest import ROOT

ROLES = sorted(path.parent.parent for path in ROOT.glob("roles/*/defaults/main.yml"))


def options(role: Path) -> dict[str, Any]:
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    return {name: option for spec in specs.values() for name, option in spec["options"].items()}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_role_documents_exactly_its_defaults(role: Path) -> None:
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text())
    documented = options(role)
    assert set(defaults) <= set(documented)
    for name, option in documented.items():
        if "default" in option:
            assert option["default"] == defaults[name], name
        else:
            assert name not in defaults or option["type"] == "list", f"{name}: the spec does not tell its default"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_names_have_the_one_prefix_and_a_description(role: Path) -> None:
    for name, option in options(role).items():
        assert name.startswith("llamaherd_")
        assert role.name == "common" or name.startswith(f"llamaherd_{role.name}_"), name
        assert option["description"]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_defaults_pass_the_check_that_users_values_must_pass(role: Path, check_variables: ModuleType) -> None:
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text())
    for name, value in defaults.items():
        if "{{" not in str(value):
            assert list(check_variables.mistakes(name, value, options(role)[name])) == []


@pytest.mark.parametrize("role", role_readmes.roles(), ids=lambda role: role.name)
def test_its_readme_tells_its_variables_as_they_are(role: Path) -> None:
    assert (role / "README.md").read_text() == role_readmes.readme(role), "run: python -m scripts.role_readmes"
