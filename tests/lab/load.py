"""Streaming load in an open loop while something happens to a fleet, and what became of each stream."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx

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


def only_running_streams_failed(load: Load, slots: int, *, server_ended: bool = False) -> None:
    """Each failed request had sent something, its client saw that at once, and one host had no more of them.

    A server that ended may have been ended by a request, so none is tried elsewhere: those without a token get a 500.
    """
    broken = [sample for sample in load.failures if not (server_ended and sample.outcome == "http 500")]
    assert {sample.outcome for sample in broken} <= {"connection", "truncated"}, load.failures
    assert all(sample.first is not None for sample in broken), load.failures
    assert len(broken) <= slots


LOCUST = (sys.executable, "-m", "locust", "--headless", "-f")


def target(herd: Herd, edge: str = "e1", ca: Path | None = None) -> list[str]:
    """The edge's address, and options with the CA and the key."""
    secrets = herd.inventory / ".secrets"
    return [
        f"https://{herd.address(edge)}",
        f"--ca={ca or secrets / 'ca.crt'}",
        f"--key-file={secrets / 'keys/default'}",
    ]


def bearable(herd: Herd, most: float, *, edge: str, model: str, share: float = 0.25) -> float:
    """Requests a second that take this share of a host's time, at most `most`: hosts may be ten times slower."""
    secrets, times = herd.inventory / ".secrets", []
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 32}
    trusted = ssl.create_default_context(cafile=secrets / "ca.crt")
    with httpx.Client(base_url=f"https://{herd.address(edge)}", verify=trusted, timeout=300) as client:
        headers = {"Authorization": f"Bearer {(secrets / 'keys/default').read_text().strip()}"}
        for _ in range(3):
            began = time.monotonic()
            client.post("/v1/completions", json=body, headers=headers).raise_for_status()
            times.append(time.monotonic() - began)
    return min(most, share / median(times))


@contextmanager
def streaming(
    herd: Herd,
    rate: float,
    *,
    edge: str = "e1",
    model: str = "chat",
    max_tokens: int = 32,
    ca: Path | None = None,
    patience_s: int = 60,
) -> Iterator[Load]:
    """Send `rate` requests a second through the edge for as long as the block lasts, however slow the answers are.

    Each may take `patience_s`. `ca` holds the certificates to trust, if not the lab's own CA.
    """
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        options = ["--users=1", f"--rate={rate}", f"--max-tokens={max_tokens}", f"--samples={samples}"]
        options += [f"--request-timeout={patience_s}", "--workload=tests/lab/brief.yml", f"--model={model}"]
        with (Path(folder) / "log").open("w") as log:
            running = subprocess.Popen(
                [*LOCUST, "loadtest/locustfiles/chat_open.py", *options, "--host", *target(herd, edge, ca)],
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


def thinking(herd: Herd, users: int, think_s: float, workload: Path, *, settle_s: int, window_s: int) -> list[Sample]:
    """What `users` got who ask, read and think, of requests sent in the window after the load had settled."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        # Spread over their first pause, as the simulation's are.
        options = [f"--users={users}", f"--spawn-rate={users / think_s}", f"--think={think_s}", f"--samples={samples}"]
        options += [f"--workload={workload}", f"--run-time={settle_s + window_s}", "--model=chat"]
        command = [*LOCUST, "loadtest/locustfiles/chat.py", *options, "--host", *target(herd)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert samples.exists(), done.stderr
        found = list(read_samples(samples))
    since = min(sample.sent for sample in found) + settle_s
    return [sample for sample in found if sample.sent >= since and sample.outcome != CUT_OFF]
