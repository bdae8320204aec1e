"""A simulated server for the tuner: a surface that is known, with noise, cliffs and settings that do not fit."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from llamaherd_loadtest.limits import parse_limit
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement
from llamaherd_loadtest.tune.pace import Calibrated
from llamaherd_loadtest.tune.search import Bench, Search, in_flight
from llamaherd_loadtest.tune.settings import Settings

LIMITS = [parse_limit("ttft_p95=2s"), parse_limit("tpot_p95=100ms")]
CURRENT: Settings = {"parallel": 4, "ubatch": 512, "kv_unified": True, "batch": 2048, "ctx_per_slot": 2048}
KNOBS: dict[str, list[Any]] = {
    "parallel": [1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
    "ubatch": [128, 256, 512, 1024],
    "kv_unified": [True, False],
}
GRID: list[Settings] = [
    {**CURRENT, **dict(zip(KNOBS, point, strict=True))} for point in itertools.product(*KNOBS.values())
]
TOKENS = 100  # of an answer
OVERHEAD = 1.4  # time that a window costs over its length


class SimulatedServer:
    """Throughput saturates with slots, ubatch has an optimum, KV layout shifts it, a cliff halves it, memory ends.

    5 to 15 % noise on throughput, 1.3 times as much on latencies, drawn anew for each window; of a window of 18 s, half
    of its variance being that of the requests in it. `flat`: all settings are alike in truth.
    """

    def __init__(self, seed: int, *, flat: bool = False) -> None:
        draw = self._draw = random.Random(seed)
        self._flat = flat
        self._noise = draw.uniform(0.05, 0.15)
        self._saturation, self._cliff = draw.uniform(4, 24), draw.choice([12, 24, 48, 99])
        self._best_ubatch, self._ubatch_slope = draw.choice([128, 256, 512]), draw.uniform(0.02, 0.12)
        self._unified, self._speed = draw.uniform(-0.15, 0.15), draw.uniform(20, 200)
        self._ttft, self._tpot = draw.uniform(20, 120), draw.uniform(2, 6)
        self._memory = draw.choice([8000, 16000, math.inf])

    def fits(self, settings: Any) -> bool:
        return bool(settings["parallel"] * settings["ubatch"] <= self._memory)

    def truth(self, settings: Any) -> tuple[float, dict[str, float]]:
        """True tokens per second, and the limited figures in ms."""
        if self._flat:
            return self._speed, {"ttft_p95": 500.0, "tpot_p95": 50.0}
        slots, ubatch = settings["parallel"], settings["ubatch"]
        over = slots >= self._cliff
        speed = self._speed * slots / (1 + slots / self._saturation) * (0.45 if over else 1)
        speed *= math.exp(-self._ubatch_slope * abs(math.log2(ubatch / self._best_ubatch)))
        speed *= math.exp(self._unified * settings["kv_unified"])
        ttft = 200 + self._ttft * slots * (1 + 0.1 * math.log2(512 / ubatch))
        return speed, {"ttft_p95": ttft, "tpot_p95": 15 + self._tpot * slots * (1.6 if over else 1)}

    def passes(self, settings: Any) -> bool:
        figures = self.truth(settings)[1]
        return self.fits(settings) and all(figures[limit.name] <= limit.ms for limit in LIMITS)

    def best(self) -> Settings:
        return max(filter(self.passes, GRID), key=lambda settings: self.truth(settings)[0])

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        if not self.fits(settings):
            return Measurement(took_s=0.4 * window_s, fault="not launched: out of memory", does_not_fit=True)
        speed, figures = self.truth(settings)
        share = load.concurrency / int(settings["parallel"]) if load.concurrency else 1.0  # of the slots
        if load.rate:
            share = load.rate * TOKENS / speed
        figures = {"ttft_p95": figures["ttft_p95"] * share, "tpot_p95": figures["tpot_p95"] * min(share, 1.0)}
        noise = self._noise * math.sqrt(0.5 + 9 / window_s)
        return Measurement(
            took_s=OVERHEAD * window_s,
            score=(measured := speed * math.exp(self._draw.gauss(0, noise))),
            tokens_per_s=measured,
            requests_per_s=measured / TOKENS,
            requests=max(1, round(2.8 * window_s)),
            observed={k: v * math.exp(self._draw.gauss(0, 1.3 * noise)) for k, v in figures.items()},
        )


class BusyServer(SimulatedServer):
    """A host as slow as `request_s` seconds a request under CURRENT say, that others slow down by `busy` (a standard
    deviation of the logarithm) and whose client spoils the share `spoiled` of the windows.

    Its windows cost what the live bench's do: each slot warms up, then a request a slot is waited for.
    """

    def __init__(self, seed: int, *, request_s: float, busy: float = 0.3, spoiled: float = 0.0) -> None:
        super().__init__(seed)
        self._memory = math.inf
        self._others = random.Random(f"{seed} others")
        self._busy, self._spoiled = busy, spoiled
        self._speed *= int(CURRENT["parallel"]) * TOKENS / request_s / self.truth(CURRENT)[0]

    def calibrated(self, load: Load = SLOTS) -> Calibrated:
        took_s = self.request_s(CURRENT, load) * self._slower()
        return Calibrated(in_flight(CURRENT, load), took_s, took_s)

    def request_s(self, settings: Settings, load: Load = SLOTS) -> float:
        return in_flight(settings, load) * TOKENS / self.truth(settings)[0]

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        concurrency, slower = in_flight(settings, load), self._slower()
        request_s, patience_s = self.request_s(settings, load) * slower, 20 + 2 * window_s
        if request_s > patience_s:
            return Measurement(took_s=patience_s, fault="invalid: not warmed up", request_s=patience_s)
        lasted_s = max(window_s, min(4 * window_s, request_s))
        measured = super().measure(settings, window_s, seed, load)
        measured.took_s, measured.request_s = request_s + lasted_s, request_s
        measured.requests = int(concurrency * lasted_s / request_s)
        measured.score = measured.tokens_per_s = measured.tokens_per_s / slower
        if not measured.requests or self._others.random() < self._spoiled:
            measured.fault = "invalid: the client was late"
        return measured

    def _slower(self) -> float:
        return math.exp(abs(self._others.gauss(0, self._busy)))


def search(
    server: SimulatedServer,
    current: Settings,
    *,
    budget_s: float,
    seed: int,
    bench: Bench | None = None,
    calibrated: Calibrated | None = None,
) -> Search:
    """A search over the whole grid from `current`; `bench` stands before the server where given."""
    others = [settings for settings in GRID if settings != current]
    return Search(
        [current, *others],
        LIMITS,
        always=1,
        budget_s=budget_s,
        bench=bench or server,
        seed=seed,
        calibrated=calibrated,
    )
