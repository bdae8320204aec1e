"""The search's log: every step as it is measured, one JSON object a line; what an interrupted search resumes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement
from llamaherd_loadtest.tune.search import Bench, Step
from llamaherd_loadtest.tune.settings import Settings


class Header(Struct, tag="search", frozen=True):
    """The first line. A search resumes only under the same `fingerprint`, and with the seed it began with."""

    fingerprint: str
    seed: int


class StepLine(Struct, tag="step", frozen=True):
    step: Step


class Done(Struct, tag="done", frozen=True):
    """The last line of a search that came to its end."""


_decoder = msgspec.json.Decoder(Header | StepLine | Done)


class Journal:
    """Appends to one file, and knows the steps of an unfinished search that it found there."""

    def __init__(self, path: Path, fingerprint: str, seed: int) -> None:
        """Raises OSError where the file cannot be written."""
        self._path = path
        found = _read(path)
        self.resumed: list[Step] = []
        self.seed = seed
        if found and isinstance(found[0], Header) and found[0].fingerprint == fingerprint and Done() not in found:
            self.seed = found[0].seed
            self.resumed = [line.step for line in found if isinstance(line, StepLine)]
        path.write_bytes(b"")
        self._append(Header(fingerprint, self.seed))

    def record(self, step: Step) -> None:
        self._append(StepLine(step))

    def close(self) -> None:
        """Mark the search as finished."""
        self._append(Done())

    def _append(self, line: Header | StepLine | Done) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def read_steps(path: Path) -> list[Step]:
    """The steps that a journal holds."""
    return [line.step for line in _read(path) if isinstance(line, StepLine)]


class ReplayBench:
    """Gives the resumed steps again, then measures: a search is a function of what was measured, so it goes on."""

    def __init__(self, bench: Bench, resumed: Sequence[Step]) -> None:
        self._bench, self._resumed = bench, list(resumed)

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        if self._resumed and self._resumed[0].settings == settings:
            return self._resumed.pop(0).measurement
        self._resumed.clear()
        return self._bench.measure(settings, window_s, seed, load)


def _read(path: Path) -> list[Header | StepLine | Done]:
    """All whole lines: a crash may have cut the last one off."""
    if not path.is_file():
        return []
    lines: list[Header | StepLine | Done] = []
    for raw in path.read_bytes().splitlines():
        try:
            lines.append(_decoder.decode(raw))
        except msgspec.MsgspecError:
            break
    return lines
