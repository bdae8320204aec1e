"""Turns options into a load: the target, what the server reports about itself, and the source of requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.client import ChatClient, Target
from llamaherd_loadtest.limits import divide_limits
from llamaherd_loadtest.probe import ServerFacts, ask, calibrate, check_fits, count_tokens
from llamaherd_loadtest.replay import Replay, read_replay
from llamaherd_loadtest.session import Source
from llamaherd_loadtest.trace import Trace, TracePrompts, read_trace
from llamaherd_loadtest.workload import Calibration, Prompts, Workload, load_workload


class Probed(Struct, frozen=True):
    """What the probe found before the load; all processes of a run use the same."""

    facts: ServerFacts
    calibration: Calibration


class TargetSession:
    """One test as given by its options (see `locust_options`), with the prompts and arrivals of `seed`.

    Raises ValueError or OSError for an invalid option.
    """

    def __init__(self, options: Any, host: str, seed: int) -> None:
        self._options, self._seed = options, seed
        self._target = Target(
            url=host,
            model=options.model,
            key=Path(options.key_file).read_text(encoding="utf-8").strip() if options.key_file else "",
            ca=Path(options.ca) if options.ca else None,
            timeout_s=options.request_timeout,
        )
        self.client = ChatClient(self._target)
        self.limits = divide_limits([text for text in options.limits.split(",") if text])[0]  # answer limits: tuner's
        self._material = self._read()

    def probe(self) -> Probed:
        """Probe the server. Raises ServerUnusable, and ValueError if the load does not fit into its context."""
        facts = ask(self.client, self._target.model)
        target, material = replace(self._target, model=facts.model), self._material
        extra = material.extra if isinstance(material, Workload) else {}
        calibration = calibrate(self.client, target, self._seed, extra, timings=facts.is_llamaherd)
        check_fits(self.name, material.longest, facts)
        return Probed(facts, calibration)

    @property
    def name(self) -> str:
        """The name of the workload or trace."""
        return Path(self._options.trace).name if self._is_trace else self._options.workload

    def source(self, probed: Probed) -> Source:
        """Return the source of requests."""
        model, calibration, seed = probed.facts.model, probed.calibration, self._seed
        match self._material:
            case Trace() as trace:
                return TracePrompts(trace, model=model, seed=seed, calibration=calibration)
            case Replay() as replay:
                return replay.use(model, calibration)
            case workload:
                return Prompts(workload, model=model, seed=seed, calibration=calibration)

    def offsets(self) -> Iterator[float]:
        """Yield when an open loop sends its requests, in seconds from its start."""
        if isinstance(self._material, Trace):
            return self._material.offsets()
        options = self._options
        return Arrivals(options.arrivals, options.rate, self._seed, options.burst).offsets()

    @property
    def at_once(self) -> int:
        """The number of requests of an open loop that arrive together."""
        return int(self._options.burst) if self._options.arrivals == "bursts" and not self._is_trace else 1

    @property
    def _is_trace(self) -> bool:
        return bool(getattr(self._options, "trace", ""))

    def _read(self) -> Workload | Replay | Trace:
        options = self._options
        if self._is_trace:
            return read_trace(Path(options.trace), options.trace_speed)
        path = Path(options.workload)
        if path.suffix in (".jsonl", ".json"):
            return read_replay(path, self._seed, options.max_tokens, partial(count_tokens, self.client))
        return load_workload(options.workload).with_prompt(options.prompt_tokens).with_output(options.max_tokens)
