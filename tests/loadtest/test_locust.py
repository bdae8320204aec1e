"""Locust's own command with our locustfiles: statistics, samples, the open loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.samples import read_samples

from .conftest import Double

LOCUSTFILES = Path(__file__).parents[2] / "loadtest/locustfiles"


def locust(file: str, double: Double, key_file: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    where = ["-f", str(LOCUSTFILES / file), "--host", double.url, "--key-file", str(key_file), "--model", "engine"]
    headless = ["--headless", "--json-file", str(out / "stats"), "--samples", str(out / "samples.jsonl")]
    arguments = [sys.executable, "-m", "locust", *where, *headless, *more]
    return subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=60)


def entries(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((out / "stats.json").read_text())}


def test_ttft_and_tpot_are_entries_of_locusts_statistics(double: Double, key_file: Path, tmp_path: Path) -> None:
    done = locust("chat.py", double, key_file, tmp_path, "-u", "3", "-r", "3", "-t", "3s", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    samples = list(read_samples(tmp_path / "samples.jsonl"))
    counted = [s for s in samples if not s.warmup and s.outcome == "ok"]
    assert {s.tokens for s in counted} == {8}
    stats = entries(tmp_path)
    for name in ("/v1/chat/completions", "TTFT", "TPOT"):
        assert stats[name]["num_requests"] == len(counted)
    mean = sum(s.ttft or 0 for s in counted) / len(counted)
    assert stats["TTFT"]["total_response_time"] / len(counted) == pytest.approx(1000 * mean, rel=0.01)
    assert 0 < sum(s.outcome == "cut_off" for s in samples) <= 3


def test_an_open_loop_sends_on_schedule_and_counts_latency_from_it(
    double: Double, key_file: Path, tmp_path: Path
) -> None:
    """Ten requests a second of half a second each: a closed loop of one user would send two a second."""
    more = ["--rate", "10", "--arrivals", "poisson", "--seed", "3", "-t", "4s"]
    done = locust("chat_open.py", double, key_file, tmp_path, *more)
    assert done.returncode == 0, done.stderr
    samples = sorted(read_samples(tmp_path / "samples.jsonl"), key=lambda s: s.index)
    offsets = list(zip(Arrivals("poisson", 10.0, seed=3).offsets(), samples, strict=False))
    start = samples[0].scheduled - offsets[0][0]
    assert len(samples) >= 20
    assert [s.scheduled - start for _, s in offsets] == pytest.approx([offset for offset, _ in offsets], abs=1e-6)
    assert all(s.schedule_delay >= 0 for s in samples)
    answered = [s for s in samples if s.outcome == "ok"]
    assert all(s.ttft == (s.first or 0) - s.scheduled for s in answered)
    assert max(s.ttft or 0 for s in answered) > 3 * min(s.ttft or 0 for s in answered), "they queue for four slots"


def test_an_unusable_server_ends_the_test_with_its_cause(double: Double, tmp_path: Path) -> None:
    wrong = tmp_path / "key"
    wrong.write_text("wrong")
    done = locust("chat.py", double, wrong, tmp_path, "-u", "1", "-t", "20s")
    assert done.returncode == 2
    assert f"ERROR/locust.runners: {double.url} refuses the API key" in done.stderr
