"""GBNF rules for JSON, and helpers that build grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise

# White space is bounded, because some models never stop writing it.
PRIMITIVES = {
    "space": r'| " " | "\n" [ \t]{0,20}',
    # No control characters or surrogate escapes, so that each match is one character of the text.
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" escape)',
    "escape": "([0-9A-Ca-cE-Fe-f] [0-9A-Fa-f] | [Dd] [0-7]) [0-9A-Fa-f]{2}",
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,14})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": r'"{" space (pair ("," space pair)*)? "}"',
    "pair": r'string space ":" space value space',
    "array": r'"[" space (value space ("," space value space)*)? "]"',
    "value": "object | array | string | number | boolean | null",
}
_REPEAT_BLOCK = 200
_CONTROL = re.compile(r"[\x00-\x1f]")


def literal(text: str) -> str:
    """Return a GBNF literal that matches exactly `text`."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = _CONTROL.sub(lambda match: rf"\x{ord(match[0]):02X}", escaped)
    return f'"{escaped}"'


def without(name: str, markers: tuple[str, ...], *, not_first: str = "") -> dict[str, str]:
    """Return rules, starting with `name`, for text that contains none of `markers` and does not begin with `not_first`.

    The states are the marker prefixes that the text may end with (Aho and Corasick, 1975).
    """
    prefixes = ["", *sorted({marker[:size] for marker in markers for size in range(1, len(marker))})]
    alphabet = sorted({char for marker in markers for char in marker})

    def after(seen: str) -> str | None:
        while seen not in prefixes:
            if seen in markers:
                return None
            seen = seen[1:]
        return None if any(seen.endswith(marker) for marker in markers) else seen

    def rule(prefix: str, excluded: str = "") -> str:
        """Return a state's rule, with one alternative per next state, because llama.cpp follows all alternatives."""
        targets = {char: after(prefix + char) for char in alphabet if char not in excluded}
        special = [*excluded, *(char for char, target in targets.items() if target != "")]
        ways = [
            f"{characters([char for char in targets if targets[char] == target], negate=False)} "
            f"{name}-{prefixes.index(target)}"
            for target in dict.fromkeys(targets.values())
            if target
        ]
        others = f"{characters(special, negate=True)} {name}-0"
        return " | ".join(['""', *ways, others])

    return {name: rule("", not_first), **{f"{name}-{number}": rule(one) for number, one in enumerate(prefixes)}}


def characters(chars: list[str], *, negate: bool) -> str:
    """Return a GBNF class of `chars`, or of all other characters."""
    escapes = {"\\": "\\\\", "]": "\\]", "[": "\\[", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    inside = "".join(
        escapes.get(char, char) for char in sorted(set(chars), key=lambda char: (char in "^-", char == "-"))
    )
    return f"[{'^' if negate else ''}{inside}]"


def constant(value: object) -> str:
    """Return the literal for a JSON value. Raises ValueError for NaN and infinities."""
    return literal(json.dumps(value, ensure_ascii=False, allow_nan=False))


def repeated(rule: str, low: int, high: int | None, share: Callable[[str], str]) -> str:
    """Repeat `rule`, a name or a single symbol, `low` to `high` times; None: no upper bound.

    llama.cpp expands repetitions and rejects more than 2,000, so large counts are nested as blocks of blocks.
    """
    if high is None:
        return f"{_exactly(rule, low, share)} {rule}*".strip()
    return f"{_exactly(rule, low, share)} {_at_most(rule, high - low, share)}".strip() or '""'


def _exactly(rule: str, count: int, share: Callable[[str], str]) -> str:
    if count <= _REPEAT_BLOCK:
        return f"{rule}{{{count}}}" if count else ""
    blocks, rest = divmod(count, _REPEAT_BLOCK)
    return f"{_exactly(share(f'{rule}{{{_REPEAT_BLOCK}}}'), blocks, share)} {_exactly(rule, rest, share)}".strip()


def _at_most(rule: str, count: int, share: Callable[[str], str]) -> str:
    if count <= _REPEAT_BLOCK:
        return f"{rule}{{0,{count}}}" if count else ""
    blocks, rest = divmod(count, _REPEAT_BLOCK)
    block = share(f"{rule}{{{_REPEAT_BLOCK}}}")
    fewer = f"{_at_most(block, blocks - 1, share)} {rule}{{0,{_REPEAT_BLOCK - 1}}}".strip()
    return share(f"{fewer} | {_exactly(block, blocks, share)} {_at_most(rule, rest, share)}".strip())


def trie(texts: Iterable[str], share: Callable[[str], str]) -> str:
    """Return the texts as alternatives that share prefixes, so that the sampler follows only a few at a time."""
    ordered = sorted(set(texts))
    done: dict[tuple[int, int, int], str] = {}
    todo = [(0, len(ordered), 0)]
    while todo:
        low, high, depth = node = todo[-1]
        first, last = ordered[low], ordered[high - 1]
        end = next((at for at in range(depth, len(first)) if first[at] != last[at : at + 1]), len(first))
        ends = len(first) == end
        starts = [at for at in range(low + ends, high) if at == low + ends or ordered[at][end] != ordered[at - 1][end]]
        inner = [(at, to, end) for at, to in pairwise([*starts, high])]
        missing = [one for one in inner if one not in done]
        if missing:
            todo += missing
            continue
        text = [literal(first[depth:end])] if end > depth else []
        if inner:
            text.append(share(" | ".join([*(['""'] if ends else []), *(done[one] for one in inner)])))
        done[node] = " ".join(text) or '""'
        todo.pop()
    return done[(0, len(ordered), 0)]
