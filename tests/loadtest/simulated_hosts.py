"""Simulated hosts with a space of thousands of settings, whose truth is not of the form that the tuner's prior has.

Compute comes in tiles and overlaps with the reading of weights, threads follow the universal scalability law (Gunther,
Guerrilla Capacity Planning, 2007) up to where memory's bandwidth ends, prompts have a best ubatch, waiting grows with
the busy share, some hosts fall off a cliff, and some settings do not fit. Windows hold as many requests as they have
time for; their percentiles are of those.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from llamaherd_loadtest.limits import Limit
from llamaherd_loadtest.quantiles import unbiased_quantile
from llamaherd_loadtest.tune.evidence import SLOTS, Load, Measurement
from llamaherd_loadtest.tune.pace import Calibrated, needed_s
from llamaherd_loadtest.tune.physics import Shape
from llamaherd_loadtest.tune.search import Search, in_flight, pair
from llamaherd_loadtest.tune.settings import Settings

KNOBS: dict[str, list[Any]] = {
    "parallel": [1, 2, 4, 6, 8, 12, 16, 24, 32],
    "batch": [512, 2048],
    "ubatch": [128, 256, 512, 1024],
    "kv_unified": [True, False],
    "threads": [4, 8, 16],
    "threads_batch": [4, 8, 16],
    "flash_attention": ["on", "off"],
}
CURRENT: Settings = {
    **{"parallel": 4, "batch": 2048, "ubatch": 512, "kv_unified": True},
    **{"threads": 8, "threads_batch": 8, "flash_attention": "on", "ctx_per_slot": 2048},
}
SPACE: list[Settings] = [
    {**CURRENT, **point}
    for values in itertools.product(*KNOBS.values())
    if (point := dict(zip(KNOBS, values, strict=True)))["ubatch"] <= point["batch"]
]
PROMPT, OUTPUT = 400.0, 120.0
Truth = tuple[float, dict[str, float]]


class Host:
    """One host. `drift`: the logarithm of its speed at the end of `budget_s` less that at the start; its truth is that
    in the middle. `spoiled`: the share of windows whose client is too slow."""

    def __init__(self, seed: int, *, drift: float = 0.0, budget_s: float = 900.0, spoiled: float = 0.0) -> None:
        draw = self._draw = np.random.default_rng([seed, 20])
        uniform = draw.uniform
        self._drift, self._budget_s, self._spoiled, self._spent_s = drift, budget_s, spoiled, 0.0
        self._gpu = uniform() < 0.5
        self._cores, self._serial = draw.choice([4, 8, 16]), uniform(0.005, 0.06)
        self._hyper, self._bandwidth = uniform(0.75, 1.05), draw.choice([4, 6, 8, 12])
        self._read, self._compute = 1.0, math.exp(uniform(math.log(0.02), math.log(0.35)))
        self._overhead, self._overlap = uniform(0.05, 0.4), uniform(1.2, 6)
        self._tile, self._kv = draw.choice([1, 4, 8]), self._compute * uniform(0.05, 0.8)
        self._waste, self._split = uniform(-0.03, 0.15), uniform(-0.05, 0.12)
        self._no_flash = (uniform(0.9, 1.6), uniform(0.97, 1.3))
        self._prompt, self._half = self._compute * uniform(0.15, 0.8), uniform(10, 200)
        self._spill, self._spilled = draw.choice([128, 256, 512, 2048]), uniform(0.0, 0.15)
        self._small_batch, self._queue, self._stall = uniform(0.0, 0.1), uniform(0.2, 1.2), uniform(0.5, 1.0)
        self._cliff, self._fallen = draw.choice([12, 24, 99, 99, 99]), uniform(0.45, 0.8)
        self._memory = draw.choice([6000, 12000, math.inf, math.inf])
        self._noise, self._ttft_sd, self._tpot_sd = uniform(0.01, 0.06), uniform(0.15, 0.4), uniform(0.04, 0.12)
        self._tails, self._network_ms = (uniform(1.2, 1.8), uniform(1.05, 1.3)), uniform(5, 80)
        low, high = (1.0, 6.0) if uniform() < 0.8 else (6.0, 30.0)
        self._unit_s = 1.0
        self._unit_s = math.exp(uniform(math.log(low), math.log(high))) / self.request_s(CURRENT)
        now = self.truth(CURRENT)[1]
        self.limits = [
            Limit(f"{metric}_p95", metric, 0.95, now[f"{metric}_p95"] * math.exp(uniform(-0.1, most)))
            for metric, most in (("ttft", 2.0), ("tpot", 1.4))
        ]

    def fits(self, s: Settings) -> bool:
        return bool(int(s["parallel"]) * (200 + 0.4 * int(s["ubatch"])) <= self._memory)

    def _parts(self, s: Any) -> tuple[float, float]:
        """Seconds of a step that makes a token for each slot, and of one prompt."""
        n, ubatch = s["parallel"], s["ubatch"]
        off = (1.0, 1.0) if s["flash_attention"] == "on" else self._no_flash
        tiles = 0.5 * n + 0.5 * self._tile * math.ceil(n / self._tile)
        compute, read = tiles * self._compute / self._faster(s["threads"]), self._read
        if not self._gpu:
            read /= min(1.0, min(s["threads"], self._cores) / self._bandwidth)
        step = self._overhead + (read**self._overlap + compute**self._overlap) ** (1 / self._overlap)
        spread = 1 + self._waste * math.log2(n) if s["kv_unified"] else 1 + self._split
        step += n * self._kv * off[0] * spread
        prompt = PROMPT / 100 * self._prompt * (1 + self._half / ubatch) * off[1] / self._faster(s["threads_batch"])
        prompt *= (1 + self._spilled) ** max(0.0, math.log2(ubatch / self._spill))
        prompt *= 1 + self._small_batch * (s["batch"] == 512)
        fallen = 1 / self._fallen if n >= self._cliff else 1.0
        return self._unit_s * step * fallen, self._unit_s * prompt * fallen

    def _faster(self, threads: int) -> float:
        """Of compute, beside eight threads."""
        if self._gpu:
            return 1.0

        def scaled(t: int) -> float:
            own = min(t, int(self._cores))
            return own / (1 + self._serial * (own - 1)) * (self._hyper if t > self._cores else 1.0)

        return scaled(threads) / scaled(8)

    def request_s(self, s: Settings) -> float:
        step, prompt = self._parts(s)
        return OUTPUT * step + int(s["parallel"]) * prompt

    def truth(self, s: Settings) -> Truth:
        """True tokens per second, and the limited figures in ms."""
        n, (step, prompt) = int(s["parallel"]), self._parts(s)
        busy = n * prompt / self.request_s(s)
        chunks = 1 - 0.5 * self._small_batch * (s["batch"] == 512)
        ttft = (prompt * (1 + self._queue * busy * (n - 1)) + step) * self._tails[0]
        tpot = (step + self._stall * (n - 1) * prompt / OUTPUT) * chunks * self._tails[1]
        return n * OUTPUT / self.request_s(s), {"ttft_p95": 1000 * ttft + self._network_ms, "tpot_p95": 1000 * tpot}

    def passes(self, s: Settings) -> bool:
        figures = self.truth(s)[1]
        return self.fits(s) and all(figures[limit.name] <= limit.ms for limit in self.limits)

    def best(self) -> Settings | None:
        return max(filter(self.passes, SPACE), key=lambda s: self.truth(s)[0], default=None)

    def calibrated(self) -> Calibrated:
        took_s = self.request_s(CURRENT) * math.exp(self._draw.normal(0, self._noise))
        return Calibrated(in_flight(CURRENT, SLOTS), took_s, took_s)

    def measure(self, settings: Settings, window_s: float, seed: int, load: Load = SLOTS) -> Measurement:
        measured = self._measure(settings, window_s)
        self._spent_s += measured.took_s
        return measured

    def _measure(self, s: Settings, window_s: float) -> Measurement:
        draw = self._draw
        if not self.fits(s):
            return Measurement(took_s=2.0, fault="not launched: out of memory", does_not_fit=True)
        slower = math.exp(draw.normal(0, self._noise) - self._drift * (self._spent_s / self._budget_s - 0.5))
        request_s = self.request_s(s) * slower
        requests = int(int(s["parallel"]) * window_s / request_s + draw.uniform())
        measured = Measurement(took_s=0.5 + request_s + window_s, request_s=request_s, requests=requests)
        if requests == 0 or draw.uniform() < self._spoiled:
            measured.fault = "invalid: event loop" if requests else "invalid: no request ended"
            return measured
        speed, figures = self.truth(s)
        measured.score = measured.tokens_per_s = speed / slower * math.exp(draw.normal(0, 0.2 / math.sqrt(requests)))
        measured.requests_per_s = measured.tokens_per_s / OUTPUT
        for limit, sd in zip(self.limits, (self._ttft_sd, self._tpot_sd), strict=True):
            p95 = figures[limit.name] * slower
            values = np.sort(p95 * np.exp(sd * (draw.standard_normal(requests) - 1.645))).tolist()
            setattr(measured, f"{limit.metric}_ms", values)
            measured.observed[limit.name] = unbiased_quantile(values, limit.p)
            measured.over[limit.name] = (sum(v > limit.ms for v in values), requests)
        return measured


def tune(host: Host, current: Settings, *, budget_s: float, seed: int) -> tuple[Search | None, Settings]:
    """What a job does, with its choice: calibrate, refuse a budget that is too small, search."""
    found = host.calibrated()
    candidates = [current, *(s for s in SPACE if s != current)]
    if needed_s(found, pair(candidates, SLOTS), budget_s) > budget_s:
        return None, current
    search = Search(
        candidates,
        host.limits,
        always=1,
        budget_s=budget_s - found.took_s,
        bench=host,
        seed=seed,
        calibrated=found,
        shape=Shape(PROMPT, OUTPUT),
    )
    return search, search.run().record.settings
