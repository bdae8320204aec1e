"""Generates files for the playbooks from the engine settings and placement in llamaherd_server.wire.engine_settings.

`python -m scripts.engine_settings` writes the schemas that filters read, and the roles' argument_specs and defaults.
With `--check` it prints which of them are stale, and fails.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llamaherd_server.config.engine_settings import schema
from llamaherd_server.wire.engine_settings import EngineSettings, Placement

ROOT = Path(__file__).resolve().parents[1]
_TYPES = {"integer": "int", "boolean": "bool", "string": "str", "array": "list", "number": "float"}


def files() -> Iterator[tuple[Path, str]]:
    """Yield each generated file and its content."""
    settings, placement = schema(EngineSettings), schema(Placement)
    yield ROOT / "meta/engine_settings.json", json.dumps(settings, indent=1) + "\n"
    yield ROOT / "meta/placement.json", json.dumps(placement, indent=1) + "\n"
    specs = ROOT / "roles/common/meta/argument_specs.yml"
    text = specs.read_text()
    text = _between(text, "            options: &settings\n", "          aliases:\n", _options(settings))
    yield specs, _between(text, "            options: &placement\n", "          memory_share:\n", _options(placement))
    defaults = ROOT / "roles/common/vars/main.yml"
    text = _between(
        defaults.read_text(), "_common_settings_defaults:\n", "_common_placement_defaults:\n", _defaults(settings)
    )
    yield defaults, _between(text, "_common_placement_defaults:\n", "# llamaherd_model is first", _defaults(placement))


def _options(settings: dict[str, Any]) -> str:
    return _yaml({name: _option(one) for name, one in settings.items()}, 14)


def _defaults(settings: dict[str, Any]) -> str:
    return _yaml({name: one["default"] for name, one in settings.items()}, 2)


def _option(one: dict[str, Any]) -> dict[str, Any]:
    choices = {"choices": one["enum"]} if "enum" in one else {}
    elements = {"elements": _TYPES[one["items"]["type"]]} if "items" in one else {}
    kind = "raw" if "anyOf" in one else _TYPES[one.get("type", "string")]
    return {"type": kind, **elements, **choices, "description": one["description"]}


def _yaml(values: dict[str, Any], indent: int) -> str:
    """Return one line of YAML for each entry."""
    entries = (yaml.safe_dump({name: one}, default_flow_style=True, width=10_000) for name, one in values.items())
    return "".join(f"{' ' * indent}{entry.strip()[1:-1]}\n" for entry in entries)


def _between(whole: str, start: str, end: str, text: str) -> str:
    return re.sub(f"({re.escape(start)}).*?({re.escape(end)})", lambda m: m[1] + text + m[2], whole, flags=re.S)


def main() -> None:
    stale = [(path, text) for path, text in files() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        names = ", ".join(str(path.relative_to(ROOT)) for path, _ in stale)
        sys.exit(f"stale: {names}; run python -m scripts.engine_settings" if stale else 0)
    for path, text in stale:
        path.write_text(text)


if __name__ == "__main__":
    main()
