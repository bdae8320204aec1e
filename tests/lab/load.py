"""Streaming load in an open loop while something happens to a fleet, and what became of each stream."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaherd_loadtest.samples import CUT_OFF, OK, Sample, read_samples
from tests.lab.conftest import ROOT, Herd

_SETTLE_S = 4.0


class Load:
    """Filled when the load has ended."""

    samples: list[Sample]

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests ended how; those that the load's own end cut off are left out."""
        return Counter(sample.outcome for sample in self.samples if sample.outcome != CUT_OFF)

    @property
    def failures(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.outcome not in (OK, CUT_OFF)]


@contextmanager
def streaming(
    herd: Herd, rate: float, *, edge: str = "e1", model: str = "chat", max_tokens: int = 32, ca: Path | None = None
) -> Iterator[Load]:
    """Send `rate` requests a second through the edge for as long as the block lasts, however slow the answers are.

    `ca` holds the certificates to trust, if not the lab's own CA.
    """
    load, secrets = Load(), herd.inventory / ".secrets"
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        locust = [sys.executable, "-m", "locust", "--headless", "-f", "loadtest/locustfiles/chat_open.py", "--users=1"]
        options = [f"--rate={rate}", f"--max-tokens={max_tokens}", f"--samples={samples}", "--request-timeout=60"]
        target = [f"--host=https://{herd.address(edge)}", f"--ca={ca or secrets / 'ca.crt'}", f"--model={model}"]
        target += [f"--key-file={secrets / 'keys/default'}", "--workload=tests/lab/brief.yml"]
        with (Path(folder) / "log").open("w") as log:
            running = subprocess.Popen(
                [*locust, *options, *target],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            try:
                while "All users spawned" not in (Path(folder) / "log").read_text():
                    assert running.poll() is None, (Path(folder) / "log").read_text()
                    time.sleep(0.2)
                time.sleep(_SETTLE_S)  # for streams to be under way
                yield load
                time.sleep(_SETTLE_S)
            finally:
                running.send_signal(signal.SIGTERM)
                running.wait(60)
        assert samples.exists(), (Path(folder) / "log").read_text()
        load.samples = [sample for sample in read_samples(samples) if not sample.warmup]
    print(load.outcomes)
