"""Checks an engine's settings: the same rules for server.toml, the environment and PUT /admin/engine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from llamaherd_server.config.setting_rules import out_of_range, setting_mistakes
from llamaherd_server.errors import nearest
from llamaherd_server.wire.protocol import EngineSettings


@cache
def schema() -> dict[str, dict[str, Any]]:
    """The JSON schema of each setting."""
    properties: dict[str, dict[str, Any]] = msgspec.json.schema(EngineSettings)["$defs"]["EngineSettings"]["properties"]
    return properties


def merge(base: EngineSettings, values: Mapping[str, Any]) -> EngineSettings:
    """`base` with `values` put over it; numbers may be strings, as they are in the environment.

    Raises ValueError with one line that names the field, the value and the remedy.
    """
    for name in values:
        if name not in schema():
            raise ValueError(f"unknown engine setting {name!r}{nearest(name, schema())}")
    settings = {**msgspec.to_builtins(base), **values}
    try:
        merged = msgspec.convert(settings, EngineSettings, strict=False)
    except msgspec.ValidationError as error:
        found = out_of_range(settings, schema())
        raise ValueError(found[0] if found else f"engine setting: {error}") from None
    if found := setting_mistakes(msgspec.to_builtins(merged), schema()):
        raise ValueError(found[0])
    return merged
