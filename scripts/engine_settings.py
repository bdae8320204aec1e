"""Hands the engine's settings on to the playbooks, from llamaherd_server.wire.protocol.EngineSettings.

`python -m scripts.engine_settings` writes the schema that filters read, the roles' argument_specs and their defaults;
with `--check` it says which of them are stale, and fails.
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

ROOT = Path(__file__).resolve().parents[1]
_TYPES = {"integer": "int", "boolean": "bool", "string": "str"}


def files() -> Iterator[tuple[Path, str]]:
    """Each file that settings are written into, and what it should hold."""
    yield ROOT / "meta/engine_settings.json", json.dumps(schema(), indent=1) + "\n"
    options = {name: _option(one) for name, one in schema().items()}
    specs = ROOT / "roles/common/meta/argument_specs.yml"
    yield specs, _between(specs, "            options: &settings\n", "          aliases:\n", _yaml(options, 14))
    defaults = ROOT / "roles/common/vars/main.yml"
    values = {name: one["default"] for name, one in schema().items()}
    yield defaults, _between(defaults, "_common_settings_defaults:\n", "# Of llamaherd_model first", _yaml(values, 2))


def _option(one: dict[str, Any]) -> dict[str, Any]:
    choices = {"choices": one["enum"]} if "enum" in one else {}
    return {"type": _TYPES[one.get("type", "string")], **choices, "description": one["description"]}


def _yaml(values: dict[str, Any], indent: int) -> str:
    """One line an entry."""
    entries = (yaml.safe_dump({name: one}, default_flow_style=True, width=10_000) for name, one in values.items())
    return "".join(f"{' ' * indent}{entry.strip()[1:-1]}\n" for entry in entries)


def _between(path: Path, start: str, end: str, text: str) -> str:
    return re.sub(
        f"({re.escape(start)}).*?({re.escape(end)})", lambda m: m[1] + text + m[2], path.read_text(), flags=re.S
    )


def main() -> None:
    stale = [(path, text) for path, text in files() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        names = ", ".join(str(path.relative_to(ROOT)) for path, _ in stale)
        sys.exit(f"stale: {names}; run python -m scripts.engine_settings" if stale else 0)
    for path, text in stale:
        path.write_text(text)


if __name__ == "__main__":
    main()
