"""A small model of an engine's step that predicts every setting: the prior that measurements then correct.

A step reads the weights once and computes one token of each of n sequences: a + b n seconds. A prompt of P tokens takes
P (e + s / ubatch). In a closed loop, n - 1 other prompts interrupt a request while it generates its O tokens:

    cycle = O (a + b n) + n P (e + s / ubatch)    tokens/s = n O / cycle
    TPOT = a + b n + h (n - 1) P (...) / O        TTFT = P (...) (1 + q (n - 1)) + a + b n

Threads speed up a and b, or the prompt, by a power of their number, whose exponent falls as cores or memory bandwidth
run out; a unified KV cache multiplies b. All eleven have wide priors: only the shape is known beforehand. See model for
what the shape leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from llamaherd_loadtest.tune.posterior import Array
from llamaherd_loadtest.tune.settings import Settings


class Shape(Struct, frozen=True):
    """Tokens of a request, at the median, and the requests in flight if the load fixes them (0: one per slot)."""

    prompt: float = 300.0
    output: float = 100.0
    concurrency: int = 0


SHAPE = Shape()
# Logarithms: the median guess and its standard deviation.
_PRIOR = {
    "a": (math.log(0.02), 3.0),  # seconds
    "b/a": (math.log(0.1), 1.8),  # 0.01 on GPUs, 1.6 on CPUs
    "e/b": (math.log(0.2), 1.2),
    "s/256e": (math.log(0.15), 1.0),
    "q": (math.log(0.3), 1.0),
    "h": (math.log(0.7), 0.5),
    "unified": (0.0, 0.15),
    "threads": (0.3, 0.3),  # the exponent
    "threads_batch": (0.6, 0.4),
    "bend": (0.1, 0.2),  # by how much the exponent falls for each e-fold of threads
    "bend_batch": (0.1, 0.2),
}
_KNOBS = [("parallel", 1.0), ("ubatch", 512.0), ("threads", 1.0), ("threads_batch", 1.0)]
MEAN = np.array([mean for mean, _ in _PRIOR.values()])
SD = np.array([sd for _, sd in _PRIOR.values()])


class Physics:
    """The settings of a space as arrays. The model ignores many knobs, so only a few rows differ."""

    def __init__(self, settings: Sequence[Settings], shape: Shape) -> None:
        numbers = [_numbers(settings, *knob) for knob in _KNOBS]
        unified = np.array([float(s.get("kv_unified") is True) for s in settings])
        found, place = np.unique(np.array([*numbers, unified]), axis=1, return_inverse=True)
        self.place = place.ravel()
        slots, self._ubatch, threads, threads_batch, self._unified = found
        self.shape = shape
        self._n = np.minimum(slots, shape.concurrency) if shape.concurrency else slots
        self._queue = shape.concurrency / slots - 1 if shape.concurrency else 0 * slots
        self._threads, self._threads_batch = np.log(threads / numbers[2][0]), np.log(threads_batch / numbers[3][0])

    def predict(self, theta: Array, metrics: Sequence[str], rows: Any = slice(None)) -> Array:
        """Logarithms of each metric (tokens, ttft, tpot, e2e; seconds, tokens/s) as metric x guess x row; `theta` has a
        guess per row."""
        a, b, e, s = np.exp(np.cumsum(theta[:, :4], axis=1)).T[:, :, None]
        queued, stalled = np.exp(theta[:, 4:6]).T[:, :, None]
        unified, power, power_batch, bend, bend_batch = theta[:, 6:].T[:, :, None]
        different, place = np.unique(self.place[rows], return_inverse=True)
        n, ubatch, threads, threads_batch, one = (
            part[different] for part in (self._n, self._ubatch, self._threads, self._threads_batch, self._unified)
        )
        prompt, output = self.shape.prompt, self.shape.output
        step = np.exp((bend * threads - power) * threads) * (a + b * n * np.exp(unified * one))
        read = np.exp((bend_batch * threads_batch - power_batch) * threads_batch) * prompt * (e + 256 * s / ubatch)
        cycle = output * step + n * read
        found = {"tokens": n * output / cycle, "tpot": step + stalled * (n - 1) * read / output}
        found["ttft"] = read * (1 + queued * (n - 1)) + step + np.maximum(self._queue[different], 0) * cycle
        found["e2e"] = found["ttft"] + output * found["tpot"]
        logs: Array = np.log(np.array([found[metric] for metric in metrics]))
        return logs[:, :, place]


def _numbers(settings: Sequence[Settings], name: str, otherwise: float) -> Array:
    found = [s.get(name) for s in settings]
    return np.array([float(v) if isinstance(v, int | float) and v > 0 else otherwise for v in found])
