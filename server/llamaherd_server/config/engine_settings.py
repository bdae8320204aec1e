"""Validates an engine's settings and a model's placement, by the same rules for server.toml, the environment and
PUT /admin/engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from llamaherd_server.config.setting_rules import out_of_range, placement_mistakes, setting_mistakes
from llamaherd_server.errors import nearest
from llamaherd_server.wire.engine_settings import EngineSettings, Placement

Settings = TypeVar("Settings", EngineSettings, Placement)
_MISTAKES = {EngineSettings: setting_mistakes, Placement: placement_mistakes}


@cache
def schema(kind: type[EngineSettings | Placement] = EngineSettings) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each setting."""
    properties: dict[str, dict[str, Any]] = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    return properties


def merge(base: Settings, values: Mapping[str, Any]) -> Settings:
    """Return `base` with `values` applied. Numbers may be strings, as in environment variables.

    Raises ValueError with one line: the field, the value and the remedy.
    """
    kind = type(base)
    known = schema(kind)
    for name in values:
        if name not in known:
            raise ValueError(f"unknown engine setting {name!r}{nearest(name, known)}")
    settings = {**msgspec.to_builtins(base), **values}
    try:
        merged = msgspec.convert(settings, kind, strict=False)
    except msgspec.ValidationError as error:
        found = out_of_range(settings, known)
        raise ValueError(found[0] if found else f"engine setting: {error}") from None
    if found := _MISTAKES[kind](msgspec.to_builtins(merged), known):
        raise ValueError(found[0])
    return merged
