"""Converts object schemas to GBNF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamaherd_server.grammar.gbnf import constant
from llamaherd_server.grammar.language import Term, TooLarge
from llamaherd_server.grammar.numbers import bounds_of
from llamaherd_server.grammar.strings import MAX_LENGTH, lengths
from llamaherd_server.grammar.subschemas import Schema, names, properties

if TYPE_CHECKING:
    from llamaherd_server.grammar.schema import Converter


def object_rule(converter: Converter, schema: Schema, where: str) -> str | None:
    """Return the rule for objects that satisfy a schema from Subschemas.flat; None: no object does."""
    required = set(names(schema, where))
    listed = listed_properties(converter, schema, where)
    extra = _extra(converter, schema, listed, where)
    if not listed:
        low, high = lengths(schema, "minProperties", "maxProperties", where, MAX_LENGTH)
        if extra is None or high == 0:
            return '"{" space "}"' if not low else None
        return converter.share(f'"{{" space {converter.separated(f"{extra} space", low, high)} "}}"')
    members: list[tuple[str, bool]] = []
    for name, one in listed.items():
        value = converter.convert(one, f"{where}/properties/{name}")
        if value is None and name in required:
            return None
        if value is not None:
            members.append((f'{constant(name)} space ":" space {value} space', name in required))
    least = _counted(converter, schema, len(required), None if extra else len(members), where)
    any_left = f"{extra} space" if extra else None  # the remaining members without a leading comma; None: none
    rest, must = '""', False  # the remaining members after another one; whether one of them is required
    if any_left:
        rest = converter.reserved()
        converter.add(rest, f'("," space {any_left} {rest})?')
        any_left = converter.share(f"{any_left} {rest}")
    for member, needed in reversed(members):
        taken = f"{member} {rest}"
        any_left = converter.share(taken if needed or any_left is None else f"{taken} | {any_left}")
        must = must or needed
        rest = converter.share(f'"," space {any_left}' if must else f'("," space {any_left})?')
    if any_left is None:
        return '"{" space "}"'
    return converter.share(f'"{{" space {any_left}{"" if must or least else "?"} "}}"')


def _counted(converter: Converter, schema: Schema, least: int, most: int | None, where: str) -> bool:
    """Return whether minProperties requires a property. Without it, there are `least` to `most` (None: unbounded)."""
    low, high = lengths(schema, "minProperties", "maxProperties", where, MAX_LENGTH)
    if low > max(1, least):
        converter.cannot(where, "has the keyword 'minProperties', which cannot be enforced beside optional properties")
    if high is not None and (most is None or most > high):
        converter.cannot(where, "has the keyword 'maxProperties', which cannot be enforced beside optional properties")
    return low > 0


def listed_properties(converter: Converter, schema: Schema, where: str) -> dict[str, Any]:
    """Return the schema of each property that is listed or required, by name."""
    listed = properties(schema, where)
    patterns = properties(schema, where, "patternProperties")
    for pattern, one in patterns.items() if listed else ():
        automaton = converter.terms.automaton(_keys(converter, [{"pattern": [pattern]}], where))
        listed = {name: {"allOf": [own, one]} if automaton.matches(name) else own for name, own in listed.items()}
    more = list(dict.fromkeys(name for name in names(schema, where) if name not in listed))
    if "propertyNames" in schema:
        alternatives = converter.parts.flat(schema["propertyNames"], f"{where}/propertyNames")
        if alternatives and all("enum" in one for one in alternatives):
            known = {name: None for one in alternatives for name in one["enum"] if isinstance(name, str)}
            listed = {name: one for name, one in listed.items() if name in known}
            more = [name for name in known if name not in listed]
    additional = schema.get("additionalProperties", True)
    listed = dict(listed)
    for name in more:
        of_patterns = [
            one
            for pattern, one in patterns.items()
            if converter.terms.automaton(_keys(converter, [{"pattern": [pattern]}], where)).matches(name)
        ]
        listed[name] = {"allOf": of_patterns} if of_patterns else additional
    return listed


def _extra(converter: Converter, schema: Schema, listed: dict[str, Any], where: str) -> str | None:
    """Return the rule for a property that is not listed; None: no other property is allowed."""
    patterns = properties(schema, where, "patternProperties")
    additional = schema.get("additionalProperties", not listed and "properties" not in schema and not patterns)
    allowed = [(pattern, one) for pattern, one in [*patterns.items(), (None, additional)] if one is not False]
    if not allowed:  # avoids building an automaton of all other names
        return None
    keyed = converter.terms.all
    if "propertyNames" in schema:
        alternatives = converter.parts.flat(schema["propertyNames"], f"{where}/propertyNames")
        if all("enum" in one for one in alternatives):
            return None
        keyed = _keys(converter, alternatives, where)
    others = converter.terms.other(converter.terms.either(*map(converter.terms.text, listed)))
    of_patterns = {pattern: _keys(converter, [{"pattern": [pattern]}], where) for pattern in patterns}
    pairs = []
    for pattern, one in allowed:
        keys = converter.terms.both(
            keyed,
            others,
            *(term if other == pattern else converter.terms.other(term) for other, term in of_patterns.items()),
        )
        try:
            key = "string" if keys is converter.terms.all else converter.text(keys, escape=True)
        except TooLarge:  # too many names to exclude, so no other property is allowed
            continue
        value = converter.convert(one, f"{where}/additionalProperties") if key else None
        if key and value:
            quoted = key if key == "string" else rf'"\"" {key} "\""'
            pairs.append(converter.share(f'{quoted} space ":" space {value}'))
    return converter.either(pairs)


def _keys(converter: Converter, alternatives: list[Schema], where: str) -> Term:
    """Return the property names that `alternatives` allow: strings, or numbers as text, which zod generates."""
    terms = []
    for one in alternatives:
        kinds = one.get("type", ["string"])
        if "enum" in one:
            terms.append(
                converter.terms.either(*(converter.terms.text(name) for name in one["enum"] if isinstance(name, str)))
            )
        elif "string" in kinds:
            terms.append(converter.strings.term(one, f"{where}/propertyNames"))
        elif "number" in kinds or "integer" in kinds:
            terms.append(bounds_of(one, where).term(converter.terms, whole="number" not in kinds))
    return converter.terms.either(*terms)
