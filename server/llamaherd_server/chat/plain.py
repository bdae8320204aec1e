"""Simplifies tools for templates that print only one type and a description for each parameter."""

from __future__ import annotations

from typing import Any

_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def plain_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool with one type for each parameter. Calls are still enforced by the original schema."""
    function = tool["function"]
    return {**tool, "function": {**function, "parameters": {"properties": {}, **plain(function["parameters"])}}}


def plain(schema: Any) -> dict[str, Any]:
    """Reduce a schema, and those nested in it, to one type each. Null and unknown types become string."""
    if not isinstance(schema, dict):
        schema = {}
    kind = schema.get("type")
    options = [one for word in ("anyOf", "oneOf") if isinstance(schema.get(word), list) for one in schema[word]]
    if kind is None and (first := next((one for one in options if plain_type(one) != "null"), None)) is not None:
        schema = {**schema, **first}
    kind = "string" if plain_type(schema) == "null" else plain_type(schema)
    result = {"description": "", **schema, "type": kind}
    if isinstance(schema.get("properties"), dict):
        result["properties"] = {name: plain(one) for name, one in schema["properties"].items()}
    if kind == "array":
        result["items"] = plain(schema.get("items"))
    if kind == "object" and not isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = {"type": "string"}
    return result


def plain_type(schema: Any) -> str:
    """Return the schema's first type that is not null, or else "null"."""
    if not isinstance(schema, dict):
        return "string"
    kinds = schema.get("type")
    if kinds is None:
        values = schema.get("enum") or [schema.get("const", "")]
        kinds = "object" if "properties" in schema else _TYPES.get(type(next(iter(values), "")), "string")
    listed = kinds if isinstance(kinds, list) else [kinds]
    return next((str(kind) for kind in listed if kind != "null"), "null")
