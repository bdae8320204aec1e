"""The search's log: one JSON object per line for every step. An interrupted search resumes from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct, field

from llamaherd_loadtest.tune.answers import Answers
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement
from llamaherd_loadtest.tune.pace import Calibrated
from llamaherd_loadtest.tune.search import Bench, Step
from llamaherd_loadtest.tune.settings import Settings


class Header(Struct, tag="search", frozen=True):
    """The first line. A search resumes only with the same `fingerprint`, and with its original seed and the settings
    that it `found` at its start."""

    fingerprint: str
    seed: int
    found: Settings = field(default_factory=dict)


class Trying(Struct, tag="trying", frozen=True):
    """Written before settings are applied: a killed search may have left them on the server."""

    settings: Settings


class StepLine(Struct, tag="step", frozen=True):
    step: Step


class Done(Struct, tag="done", frozen=True):
    """The last line of a completed search."""


Line = Header | Calibrated | Answers | Trying | StepLine | Done
_decoder = msgspec.json.Decoder(Line)


class Journal:
    """Appends to one file, and holds the steps of an unfinished search found in it.

    `current` are the settings to improve: those that the server has now, `found`, or, if an unfinished search was
    killed with others applied, those that it found. `calibrated` is None until a search has measured how slow the host
    is, `answers` until it has compared those of KV types.
    """

    def __init__(self, path: Path, fingerprint: str, seed: int, found: Settings) -> None:
        """Raises OSError if the file cannot be written."""
        self._path = path
        lines = _read(path)
        self.resumed: list[Step] = []
        self.calibrated: Calibrated | None = None
        self.answers: Answers | None = None
        self.seed, self.current = seed, found
        if lines and isinstance(lines[0], Header) and lines[0].fingerprint == fingerprint and Done() not in lines:
            tried = [line.settings for line in lines if isinstance(line, Trying)][-2:]
            if lines[0].found == found or any({**found, **settings} == found for settings in tried):
                self.seed, self.current = lines[0].seed, lines[0].found
                self.calibrated = next((line for line in lines if isinstance(line, Calibrated)), None)
                self.answers = next((line for line in lines if isinstance(line, Answers)), None)
                self.resumed = [line.step for line in lines if isinstance(line, StepLine)]
        path.write_bytes(b"")
        self._append(Header(fingerprint, self.seed, self.current))

    def note(self, found: Calibrated | Answers) -> None:
        """Record the calibration that sizes the windows, or which KV types may be tried."""
        self._append(found)

    def trying(self, settings: Settings) -> None:
        self._append(Trying(settings))

    def record(self, step: Step) -> None:
        self._append(StepLine(step))

    def close(self) -> None:
        """Mark the search as finished."""
        self._append(Done())

    def _append(self, line: Line) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def read_steps(path: Path) -> list[Step]:
    """Return the steps in a journal."""
    return [line.step for line in _read(path) if isinstance(line, StepLine)]


class ReplayBench:
    """Replays the resumed steps, then measures. A search depends only on measurements, so it continues.

    `trying` is called with settings before they are measured.
    """

    def __init__(
        self, bench: Bench, resumed: Sequence[Step], trying: Callable[[Settings], None] = lambda _: None
    ) -> None:
        self._bench, self._resumed, self._trying = bench, list(resumed), trying

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        if self._resumed and self._resumed[0].settings == settings:
            return self._resumed.pop(0).measurement
        self._resumed.clear()
        self._trying(settings)
        return self._bench.measure(settings, window_s, seed, load)


def _read(path: Path) -> list[Line]:
    """Return all whole lines; a crash may have truncated the last one."""
    if not path.is_file():
        return []
    lines: list[Line] = []
    for raw in path.read_bytes().splitlines():
        try:
            lines.append(_decoder.decode(raw))
        except msgspec.MsgspecError:
            break
    return lines
