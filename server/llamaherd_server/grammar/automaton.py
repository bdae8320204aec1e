"""Deterministic automata over characters, as GBNF: llama.cpp's sampler then follows only one stack."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llamaherd_server.grammar.gbnf import literal
from llamaherd_server.grammar.ranges import Ranges, common, minus

MAX_STATES = 4000
_MAX_INLINE_CHARS = 40  # a longer character class becomes a rule of its own
# Characters that a JSON string can contain only as escapes.
_ESCAPED: Ranges = ((0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\")))
_SHORT = {code: json.dumps(chr(code))[2] for code in (8, 9, 10, 12, 13, ord('"'), ord("\\"))}

Share = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Automaton:
    """State 0 is the start. `edges`: each state's transitions; `accepts`: whether a text may end in the state.

    Every state except the start is reachable and leads to an accepting state.
    """

    edges: list[list[tuple[Ranges, int]]]
    accepts: list[bool]

    @classmethod
    def pruned(cls, edges: list[list[tuple[Ranges, int]]], accepts: list[bool]) -> Automaton:
        """Create an automaton without the states from which no accepting state is reachable."""
        sources: list[list[int]] = [[] for _ in edges]
        for state, out in enumerate(edges):
            for _, target in out:
                sources[target].append(state)
        alive = {state for state, accepting in enumerate(accepts) if accepting}
        queue = list(alive)
        while queue:
            new = set(sources[queue.pop()]) - alive
            alive |= new
            queue += new
        kept = sorted({0} | alive)
        number = {state: position for position, state in enumerate(kept)}
        return cls(
            [[(ranges, number[to]) for ranges, to in edges[state] if to in alive] for state in kept],
            [accepts[state] for state in kept],
        )

    @property
    def void(self) -> bool:
        """Whether the automaton accepts no text at all."""
        return not any(self.accepts)

    @property
    def longest(self) -> int | None:
        """The length of the longest accepted text in characters; None: unbounded, because there is a cycle."""
        lengths, sources = [0] * len(self.edges), self._entered()
        ready = [state for state, count in enumerate(sources) if not count]
        for state in ready:
            for _, target in self.edges[state]:
                lengths[target] = max(lengths[target], lengths[state] + 1)
                sources[target] -= 1
                if not sources[target]:
                    ready.append(target)
        return max(lengths) if len(ready) == len(self.edges) else None

    def _entered(self) -> list[int]:
        """Return the number of edges that lead to each state."""
        entered = [0] * len(self.edges)
        for out in self.edges:
            for _, target in out:
                entered[target] += 1
        return entered

    def matches(self, text: str) -> bool:
        state: int | None = 0
        for char in text:
            if state is None:
                return False
            code = ord(char)
            state = next((to for ranges, to in self.edges[state] if any(a <= code <= b for a, b in ranges)), None)
        return state is not None and self.accepts[state]

    def rules(self, name: str, share: Share, *, escape: bool) -> dict[str, str]:
        """Return GBNF rules for the accepted texts, with the start rule `name`. `escape`: as inside a JSON string.

        `share` makes a rule of a rule text that may recur, and returns its name.
        """
        entered = self._entered()

        def chained(state: int) -> bool:
            """Return whether the state can be inlined into the rule that leads to it."""
            return state > 0 and entered[state] == 1 and len(self.edges[state]) == 1 and not self.accepts[state]

        def alternative(ranges: Ranges, target: int) -> str:
            sets = [ranges]
            while chained(target):
                [(ranges, target)] = self.edges[target]
                sets.append(ranges)
            ends = self.accepts[target] and not self.edges[target]
            return " ".join([*_symbols(sets, share, escape=escape), *([] if ends else [_name(name, target)])])

        return {
            _name(name, state): " | ".join(
                [*(['""'] if self.accepts[state] else []), *(alternative(*edge) for edge in out)]
            )
            for state, out in enumerate(self.edges)
            if not chained(state) and (out or not state)
        }


def _name(name: str, state: int) -> str:
    return f"{name}-{state}" if state else name


def _symbols(sets: list[Ranges], share: Share, *, escape: bool) -> Iterator[str]:
    """Yield GBNF symbols for a sequence of one character from each set."""
    text = ""
    for ranges in sets:
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            char = chr(ranges[0][0])
            text += json.dumps(char, ensure_ascii=False)[1:-1] if escape else char
            continue
        if text:
            yield literal(text)
        text = ""
        yield _class(ranges, share, escape=escape)
    if text:
        yield literal(text)


def _class(ranges: Ranges, share: Share, *, escape: bool) -> str:
    """Return the GBNF symbol for one character of `ranges`; `escape`: as inside a JSON string."""
    symbols = []
    if plain := minus(ranges, _ESCAPED) if escape else ranges:
        symbols.append(
            f"[{''.join(_code(low) if low == high else f'{_code(low)}-{_code(high)}' for low, high in plain)}]"
        )
    escaped = [code for low, high in (common(ranges, _ESCAPED) if escape else ()) for code in range(low, high + 1)]
    short = "".join(_code(ord(_SHORT[code])) for code in escaped if code in _SHORT)
    if short:
        symbols.append(rf'"\\" [{short}]')
    for high in (0, 1):
        digits = "".join(f"{code % 16:x}" for code in escaped if code not in _SHORT and code // 16 == high)
        if digits:
            symbols.append(rf'"\\u00{high}" [{digits}]')
    text = " | ".join(symbols)
    return share(text) if len(symbols) > 1 or len(text) > _MAX_INLINE_CHARS else text


def _code(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
