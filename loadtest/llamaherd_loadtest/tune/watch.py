"""Reads the server's slots and KV cache under load from its /metrics, once a second."""

from __future__ import annotations

import re

import gevent
import requests

from llamaherd_loadtest.client import clock
from llamaherd_loadtest.tune.evidence import EngineSample

_EVERY_S = 1.0
_GAUGES = ("llamaherd_slots_busy", "llamaherd_kv_cells_used", "llamaherd_kv_cells")


class EngineWatch:
    """Samples `url` through `session` until `stop`; yields no samples if the server has no such metrics."""

    def __init__(self, session: requests.Session, url: str) -> None:
        self._session, self._url, self._start = session, url, clock()
        self._samples: list[EngineSample] = []
        self._watcher = gevent.spawn(self._watch)

    def stop(self) -> list[EngineSample]:
        """Stop and return the samples."""
        self._watcher.kill()
        return self._samples

    def _watch(self) -> None:
        while True:
            try:
                page = self._session.get(self._url, timeout=5).text
            except requests.RequestException:  # the load itself reports what is wrong
                page = ""
            found = [re.search(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE) for name in _GAUGES]
            if all(found):
                figures = [int(float(match[1])) for match in found if match]
                self._samples.append(EngineSample(round(clock() - self._start, 1), *figures))
            gevent.sleep(_EVERY_S)
