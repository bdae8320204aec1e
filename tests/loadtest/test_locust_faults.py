"""Runs of Locust that are no good: their exit status, and the one line that says why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Double
from .double import CONTEXT
from .test_locust import locust, summary_of, well


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("wedged", "the server stopped answering: nothing arrived"),
        ("silent", "it ended before the server had answered a first request"),
    ],
)
def test_a_server_that_does_not_answer_is_a_failed_run(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path, model: str, fault: str
) -> None:
    done = locust("chat.py", start_double(), key_file, tmp_path, "-u", "2", "-r", "2", "-t", "6s", model=model)
    assert done.returncode == 3, done.stderr
    assert f"this run is invalid: {fault}" in done.stderr


def test_an_open_loop_that_asks_too_much_says_how_many_were_late(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    """4 slots make 4 answers of 20 tokens in about 0.45 s: half of what is asked for, so the queue grows to the end."""
    more = ["--rate", "18", "--max-tokens", "20", "--limits", "ttft_p95=500ms", "-t", "8s", "--seed", "1"]
    done = locust("chat_open.py", start_double(), key_file, tmp_path, *more)
    summary = summary_of(tmp_path)
    assert done.returncode == 3
    assert re.search(r"this run is invalid: (over-saturated: \d+ requests waited|event loop|CPU)", done.stderr)
    assert summary["judged"][0]["judgement"] == "misses" and summary["waited_s"] > 1
    assert summary["cut_off"] > 20
    good = summary["goodput"]["requests_per_s"] * summary["window_s"]
    assert summary["goodput"]["attainment"] < 0.8 * good / summary["requests"]


def test_a_few_errors_are_counted_and_many_are_a_fault(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    more = ["-u", "4", "-r", "4", "-t", "3s", "--max-tokens", "2"]
    done = locust("chat.py", start_double(), key_file, tmp_path, *more, model="flaky")
    assert well(done), done.stderr
    assert [*summary_of(tmp_path)["errors"]] == ["http 429"]
    assert re.search(r"\d\.\d% \(0\.\d% to \d+\.\d%\) of the requests failed", done.stderr)
    done = locust("chat.py", start_double(), key_file, tmp_path, *more, model="dropped")
    assert done.returncode == 3
    assert re.search(r"this run is invalid: \d+ of \d+ requests failed, most with connection", done.stderr)
    url = start_double().url
    where = ["--url", url, "--key-file", str(key_file), "--model", "dropped", "--window", "1", "--concurrency=2"]
    command = [sys.executable, "-m", "llamaherd_loadtest.measure", *where]
    measured = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert (measured.returncode, measured.stdout, measured.stderr.count("\n")) == (1, "", 1)
    assert "3 windows of 1 s were invalid, the last one: " in measured.stderr


def test_a_server_that_is_not_warm_in_time_gets_more(double: Double, key_file: Path) -> None:
    """Answers take over two seconds here, and the first try waits for half of one."""
    impatient = "from llamaherd_loadtest import measure; measure.WARM_UP_S = 0.5 - 2 * 2; measure.main()"
    where = [
        "--url",
        double.url,
        "--key-file",
        str(key_file),
        "--model",
        "paced",
        "--window",
        "2",
        "--concurrency=2",
    ]
    command = [sys.executable, "-c", impatient, *where]
    measured = subprocess.run(command, check=False, capture_output=True, text=True, timeout=90)
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["output_tokens_per_s"] > 0


def test_files_that_cannot_be_written_are_one_clear_line_and_no_half_of_a_file(
    double: Double, key_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text("the former one")
    more = ["-u", "1", "--requests", "3", "--max-tokens", "2"]
    small, ours = ["prlimit", "--fsize=500"], {"samples": "samples.jsonl", "summary": "summary.json"}
    done = locust("chat.py", double, key_file, tmp_path, *more, model="paced", before=small, written=ours)
    assert done.returncode == 2
    assert f"cannot write {tmp_path}/samples.jsonl: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert "requests, no errors" in done.stderr, "the figures are in the log"
    assert (tmp_path / "summary.json").read_text() == "the former one"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_locustfiles_that_both_measure_are_one_clear_line(double: Double, key_file: Path, tmp_path: Path) -> None:
    done = locust("chat.py,chat_open.py", double, key_file, tmp_path, "-t", "1s")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "ChatUser and ChatArrivals cannot be measured together: start Locust once for each" in done.stderr


def test_an_unusable_server_ends_the_test_with_its_cause(double: Double, tmp_path: Path) -> None:
    wrong = tmp_path / "key"
    wrong.write_text("wrong")
    for processes in ([], ["--processes", "2"]):
        done = locust("chat.py", double, wrong, tmp_path, "-u", "1", "-t", "20s", *processes)
        assert done.returncode == 2
        assert f"{double.url} refuses the API key" in done.stderr


def test_a_workload_larger_than_the_context_is_refused_before_any_load(
    start_double: Any, key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    done = locust("chat.py", double, key_file, tmp_path, "-u", "4", "-t", "20s", "--prompt-tokens", str(CONTEXT))
    assert done.returncode == 2
    longest = CONTEXT + 96
    assert (
        f"workload chat sends requests of up to {longest} tokens including answers, but a slot of engine" in done.stderr
    )
    assert f"holds {CONTEXT}: raise the server's context per slot" in done.stderr
    assert len(double.get("/log")) == 1, "nothing was sent but the request that calibrates"


def test_a_run_that_never_was_full_is_invalid(double: Double, key_file: Path, tmp_path: Path) -> None:
    done = locust("chat.py", double, key_file, tmp_path, "-u", "2", "-t", "2s", "--max-tokens", "900", model="paced")
    assert "the load was never full: 0 of 2 users had warmed up" in summary_of(tmp_path)["fault"], done.stderr
    assert "this run is invalid" in done.stderr
