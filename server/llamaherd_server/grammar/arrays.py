"""Converts array schemas to GBNF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaherd_server.grammar.gbnf import literal, repeated
from llamaherd_server.grammar.strings import MAX_LENGTH, lengths
from llamaherd_server.grammar.subschemas import Schema, json_text, refuse

_MAX_DISTINCT = 100  # values of a set that are written out

if TYPE_CHECKING:
    from llamaherd_server.grammar.schema import Converter


def array_rule(converter: Converter, schema: Schema, where: str) -> str | None:
    """Return the rule for arrays that satisfy a schema from Subschemas.flat; None: no array does."""
    low, high = lengths(schema, "minItems", "maxItems", where, MAX_LENGTH)
    first = schema.get("prefixItems", [])
    if not isinstance(first, list):
        refuse(where, "has prefixItems that is not a list")
    if schema.get("uniqueItems") is True and (high is None or high > 1):
        values = None if first else _distinct(converter, schema.get("items", True), f"{where}/items")
        if values is not None:
            return _subset(converter, values, low, high)
        converter.cannot(where, "has the keyword 'uniqueItems', which can only be enforced where items are an enum")
    if not first:
        item = converter.convert(schema.get("items", True), f"{where}/items") if high != 0 else None
        if item is None:
            return '"[" space "]"' if not low else None
        return converter.share(f'"[" space {converter.separated(f"{item} space", low, high)} "]"')
    return _tuple(converter, schema, where)


def _tuple(converter: Converter, schema: Schema, where: str) -> str | None:
    """Return the rule for arrays of prefixItems, of which minItems or maxItems may allow fewer, followed by `items`."""
    low, high = lengths(schema, "minItems", "maxItems", where, MAX_LENGTH)
    first = schema["prefixItems"]
    low = low if "minItems" in schema else len(first)
    items: list[str] = []
    for at, one in enumerate(first[:high]):
        item = converter.convert(one, f"{where}/prefixItems/{at}")
        if item is None:
            break
        items.append(f"{item} space")
    low = min(low, high) if high is not None and "minItems" not in schema else low
    rest = '""'
    open_end = "items" in schema or low > len(first)
    if len(items) == len(first) and open_end and (high is None or high > len(first)):
        more = converter.convert(schema.get("items", True), f"{where}/items")
        if more is not None:
            left = None if high is None else high - len(first)
            following = converter.share(f'"," space {more} space')
            rest = repeated(following, max(0, low - len(first)), left, converter.share)
            low = min(low, len(first))
    if low > len(items):
        return None
    for at in range(len(items) - 1, -1, -1):
        following = f"{items[at]} {rest}" if at == 0 else f'"," space {items[at]} {rest}'
        rest = converter.share(following if at < low else f"({following})?")
    return converter.share(f'"[" space {rest} "]"')


def _distinct(converter: Converter, schema: Any, where: str) -> list[str] | None:
    """Return all values that a schema allows, as JSON; None: it does not list them, or there are too many."""
    values: dict[str, None] = {}
    for one in converter.parts.flat(schema, where):
        kinds = one.get("type", [])
        if "enum" in one:
            values |= dict.fromkeys(
                json_text(value) for value in one["enum"] if converter.admits(value, one, kinds, where)
            )
        elif kinds and set(kinds) <= {"boolean", "null"}:
            values |= dict.fromkeys(
                text for kind in kinds for text in (("true", "false") if kind == "boolean" else ("null",))
            )
        else:
            return None
    return list(values) if len(values) <= _MAX_DISTINCT else None


def _subset(converter: Converter, values: list[str], low: int, high: int | None) -> str | None:
    """Return the rule for arrays of `low` to `high` of the values, each at most once and in this order."""
    count = len(values)
    high = count if high is None else min(high, count)
    if low > count:
        return None
    # What may follow from value `at` on, after `taken` values. Exact counts are needed only for bounds that matter.
    counts = range(high + 1) if low > 1 or high < count else range(2)
    following: dict[tuple[int, int], str | None] = {
        (count, taken): '""' if taken >= min(low, counts[-1]) else None for taken in counts
    }
    for at in range(count - 1, -1, -1):
        for taken in counts:
            after = min(taken + 1, counts[-1]) if counts[-1] < high else taken + 1
            then = following.get((at + 1, after))
            skipped = following[at + 1, taken]
            comma = '"," space ' if taken else ""
            alternatives = [skipped] if skipped is not None else []
            if then is not None:
                alternatives.insert(0, f"{comma}{literal(values[at])} space {then}")
            following[at, taken] = converter.either(alternatives)
    rule = following[0, 0]
    return None if rule is None else converter.share(f'"[" space {rule} "]"')
