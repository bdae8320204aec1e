"""The streaming client beside a paced double that wrote down when it sent each event, on the same monotonic clock."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import gevent
import pytest

from llamaherd_loadtest.client import ChatClient, Target, clock
from llamaherd_loadtest.probe import ServerUnusable, calibrate
from llamaherd_loadtest.samples import Sample, read_samples, write_samples
from llamaherd_loadtest.workload import chat_body

from .conftest import KEY, Double
from .double import TOKENS


def ask(double: Double, scenario: str, streams: int = 1, **target: Any) -> list[Sample]:
    """`streams` requests at once, over connections that are open already (a handshake is the client's own time)."""
    client = ChatClient(Target(**{"url": double.url, "key": KEY, **target}))
    samples: list[Sample] = []
    for model in ("grouped", scenario):
        body = chat_body(model, "hello", 8, ignore_eos=False)
        samples = [Sample(index=i, scheduled=clock()) for i in range(streams)]
        gevent.joinall([gevent.spawn(client.stream, body, sample) for sample in samples])
    return samples


@contextmanager
def lag() -> Iterator[list[float]]:
    """By how many seconds a process of its own woke up too late while the block ran, on average."""
    found: list[float] = []
    watch = [sys.executable, "-c", LATE]
    with subprocess.Popen(watch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield found
        found.append(float(process.communicate("end\n")[0]))


LATE = """
import select, sys, time
print("begun", flush=True)
late = []
while not select.select([sys.stdin], [], [], 0)[0]:
    due = time.perf_counter() + 0.002
    time.sleep(0.002)
    late.append(time.perf_counter() - due)
print(sum(late) / len(late))
"""


def within(measured: Sequence[float | None], true: Sequence[float], late_s: float) -> bool:
    """2 ms or 2 % at the median, or three times what the machine is late: both ends wake up, and take turns.

    Where more wants to run than there are cores, both wait for theirs at each event.
    """
    error = median(abs(m - t) for m, t in zip(measured, true, strict=True) if m is not None)
    wait = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return error <= wait * max(0.002, 0.02 * median(true), 3 * late_s)


@pytest.mark.parametrize("streams", [1, 16, 64])
@pytest.mark.parametrize("scenario", ["constant", "jittered", "stalling", "slow_first", "split", "grouped"])
def test_times_are_the_servers(double: Double, scenario: str, streams: int) -> None:
    """A machine may be busy for some attempts; a client that measures wrongly spoils all six."""
    wrong: list[list[str]] = []
    while len(wrong) < 6 and [] not in wrong:
        wrong.append(differences(double, scenario, streams))
    assert [] in wrong, wrong


def differences(double: Double, scenario: str, streams: int) -> list[str]:
    """The figures that differ from the server's record by more than is `within` reason."""
    with lag() as late:
        samples = ask(double, scenario, streams)
    assert {s.outcome for s in samples} == {"ok"}
    log = double.get("/log")
    sent = [log[str(s.prompt_tokens)]["sent"] for s in samples]
    if scenario == "split":
        sent = [one[1::2] for one in sent]  # an event is there with its last piece
    gaps = [[b - a for a, b in pairwise(one)] for one in sent]
    assert [s.events for s in samples] == [len(one) for one in sent]
    figures: dict[str, tuple[list[float | None], list[float]]] = {
        "TTFT": ([s.ttft for s in samples], [one[0] - s.scheduled for s, one in zip(samples, sent, strict=True)]),
        "ITL": ([*(gap for s in samples for gap in s.gaps)], [gap for one in gaps for gap in one]),
        "largest gap": ([s.largest_gap for s in samples], [max(one) for one in gaps]),
        "TPOT": ([s.tpot for s in samples], [sum(g) / (s.tokens - 1) for s, g in zip(samples, gaps, strict=True)]),
    }
    return [name for name, (measured, true) in figures.items() if not within(measured, true, late[0])]


def test_tokens_are_counted_by_usage_not_by_events(double: Double) -> None:
    (sample,) = ask(double, "grouped")
    assert (sample.events, sample.tokens) == (5, 20)
    assert sample.tokens_between(sample.scheduled, sample.end) == 20


@pytest.mark.parametrize(
    ("scenario", "outcome", "detail"),
    [
        ("busy", "http 429", "slow down"),
        ("error", "stream_error", "engine crashed"),
        ("truncated", "truncated", "without a finish reason"),
        ("gone", "connection", ""),
        ("error_object", "stream_error", "engine crashed"),
        ("abort", "truncated", "the server ended the answer early: abort"),
        ("silent", "timeout", "not complete after 1 s"),
    ],
)
def test_errors_by_kind(double: Double, scenario: str, outcome: str, detail: str) -> None:
    (sample,) = ask(double, scenario, timeout_s=1.0)
    assert sample.outcome == outcome
    assert detail in sample.detail
    assert sample.end > sample.sent


def test_a_dropped_connection_is_an_error_and_no_request_is_sent_twice(start_double: Callable[..., Double]) -> None:
    double = start_double()
    client = ChatClient(Target(url=double.url, key=KEY))
    outcomes = []
    for index in range(6):
        sample = Sample(index=index, scheduled=clock())
        client.stream(chat_body("dropped", f"hello {index}", 8, ignore_eos=False), sample)
        outcomes.append(sample.outcome)
    sent = [entry["request"]["messages"][0]["content"] for entry in double.get("/log").values()]
    assert sent == [f"hello {index}" for index in range(6)]
    assert outcomes == ["ok", "connection"] * 3


def test_a_url_may_have_a_path_and_the_apis_version(double: Double) -> None:
    for path, prefix in (("", ""), ("/", ""), ("/v1", ""), ("/tenant", "/tenant"), ("/tenant/v1/", "/tenant")):
        client, sample = ChatClient(Target(url=double.url + path, key=KEY)), Sample(index=0, scheduled=clock())
        client.stream(chat_body("constant", "hello", 8, ignore_eos=False), sample)
        assert sample.outcome == "ok"
        assert double.get("/log")[str(sample.prompt_tokens)]["prefix"] == prefix
        assert client.call("/v1/models")[0] == 200


@pytest.mark.parametrize(("scenario", "shown"), [("hidden", TOKENS), ("bundled", 2 * TOKENS), ("nulls", TOKENS)])
def test_tpot_counts_the_tokens_after_the_first_event(double: Double, scenario: str, shown: int) -> None:
    (sample,) = ask(double, scenario)
    assert sample.outcome == "ok"
    assert sample.tokens - sample.hidden_tokens == shown
    assert sample.tpot == pytest.approx(sum(sample.gaps) / len(sample.gaps))


def test_an_error_does_not_poison_the_connection(double: Double) -> None:
    client = ChatClient(Target(url=double.url, key=KEY))
    outcomes = []
    for scenario in ("error", "constant", "busy", "constant"):
        sample = Sample(index=0, scheduled=clock())
        client.stream(chat_body(scenario, "hello", 8, ignore_eos=False), sample)
        outcomes.append(sample.outcome)
    assert outcomes == ["stream_error", "ok", "http 429", "ok"]


def test_a_client_without_sockets_blames_itself(double: Double) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    streams = [Sample(index=i, scheduled=clock()) for i in range(16)]
    client, body = ChatClient(Target(url=double.url, key=KEY)), chat_body("constant", "hello", 8, ignore_eos=False)
    os.close(lowest_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 6, hard))
    try:
        gevent.joinall([gevent.spawn(client.stream, body, sample) for sample in streams])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {s.outcome for s in streams} == {"ok", "client"}
    assert {s.detail for s in streams if s.outcome == "client"} == {"[Errno 24] Too many open files"}


def test_tls_is_verified_against_the_ca(start_double: Callable[..., Double], certificate: Path) -> None:
    double = start_double("--cert", str(certificate))
    assert ask(double, "constant", ca=certificate)[0].outcome == "ok"
    (unknown,) = ask(double, "constant")
    assert unknown.outcome == "connection"
    assert "CERTIFICATE_VERIFY_FAILED" in unknown.detail


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"key": "wrong", "model": "engine"}, "refuses the API key"),
        ({"url": "http://127.0.0.1:1", "model": "engine"}, "cannot be reached"),
        ({"model": "busy"}, "does not answer"),
    ],
)
def test_unusable_servers_are_named(double: Double, target: dict[str, Any], message: str) -> None:
    where = Target(**{"url": double.url, "key": KEY, **target})
    with pytest.raises(ServerUnusable, match=message):
        calibrate(ChatClient(where), where, seed=1)


@pytest.mark.parametrize("key", ["two\nlines", "schl\u00fcssel"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="one line of printable ASCII"):
        ChatClient(Target(url="http://127.0.0.1", key=key))


def test_calibration_reads_the_servers_tokenizer(double: Double) -> None:
    where = Target(url=double.url, key=KEY, model="engine")
    calibration = calibrate(ChatClient(where), where, seed=1)
    assert (calibration.per_word, calibration.overhead) == (1.0, 10.0)
    assert calibration.words(60) == 50


def test_samples_survive_the_file(double: Double, tmp_path: Path) -> None:
    samples = ask(double, "jittered", 3)
    write_samples(tmp_path / "s.jsonl", samples)
    assert list(read_samples(tmp_path / "s.jsonl")) == samples
