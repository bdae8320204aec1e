"""Locust's own command with our locustfiles: statistics, samples, summaries, the open loop, its web page."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from llmd_benchmark_report.schema_v0_2 import BenchmarkReportV02

from llamaherd_loadtest.arrivals import Arrivals
from llamaherd_loadtest.samples import Sample, read_samples
from llamaherd_loadtest.summary import distribution, json_schema
from tests.server.conftest import Server

from .conftest import KEY, Double
from .double import PREFILL_S

LOCUSTFILES = Path(__file__).parents[2] / "loadtest/locustfiles"
WRITTEN = {"json-file": "stats", "samples": "samples.jsonl", "summary": "summary.json", "benchmark-report": "br.yml"}


def locust(
    file: str,
    double: Double | Server,
    key_file: Path,
    out: Path,
    *more: str,
    model: str = "engine",
    before: Sequence[str] = (),
    written: Mapping[str, str] = WRITTEN,
) -> subprocess.CompletedProcess[str]:
    where = ["-f", file, "--host", double.url, "--key-file", str(key_file), "--model", model, "--headless"]
    files = [argument for option, name in written.items() for argument in (f"--{option}", str(out / name))]
    arguments = [*before, sys.executable, "-m", "locust", *where, *files, *more]
    return subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=90, cwd=LOCUSTFILES)


def well(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a run went well; on a busy machine its client may be late, and the run is then rightly invalid."""
    late = re.search(r"this run is invalid: (CPU|event loop): ", done.stderr)
    return done.returncode == 0 or (done.returncode == 3 and late is not None)


def samples_of(out: Path) -> list[Sample]:
    return list(read_samples(out / "samples.jsonl"))


def summary_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "summary.json").read_text()))


def entries(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((out / "stats.json").read_text())}


def test_ttft_and_tpot_are_entries_of_locusts_statistics(double: Double, key_file: Path, tmp_path: Path) -> None:
    done = locust("chat.py", double, key_file, tmp_path, "-u", "3", "-r", "3", "-t", "3s", "--max-tokens", "8")
    assert well(done), done.stderr
    samples = list(read_samples(tmp_path / "samples.jsonl"))
    counted = [s for s in samples if not s.warmup and s.outcome == "ok"]
    assert {s.tokens for s in counted} == {8}
    stats = entries(tmp_path)
    for name in ("/v1/chat/completions", "TTFT", "TPOT"):
        assert stats[name]["num_requests"] == len(counted)
    mean = sum(s.ttft or 0 for s in counted) / len(counted)
    assert stats["TTFT"]["total_response_time"] / len(counted) == pytest.approx(1000 * mean, rel=0.01)
    assert 0 < sum(s.outcome == "cut_off" for s in samples) <= 3
    rows = re.findall(r"(completions|Aggregated) +(\d+) +0\(0\.00%\)", done.stderr)
    assert int(rows[-1][1]) == int(rows[-2][1]) > 0, "TTFT and TPOT are no requests"


def prompts_of(double: Double) -> list[str]:
    return [str(entry["request"]["messages"]) for entry in double.get("/log").values()]


def test_two_runs_send_no_prompt_twice(start_double: Callable[..., Double], key_file: Path, tmp_path: Path) -> None:
    double = start_double()
    where = ["--url", double.url, "--key-file", str(key_file), "--model", "paced", "--window", "1"]
    for _ in range(2):
        done = locust("chat.py", double, key_file, tmp_path, "-u", "1", "--requests", "3", "--max-tokens", "2")
        assert well(done), done.stderr
        assert "to send the same requests again: --seed" in done.stderr
        for module, load in (("measure", ["--concurrency", "2"]), ("profile", ["--parallel", "2"])):
            command = [sys.executable, "-m", f"llamaherd_loadtest.{module}", *where, *load]
            subprocess.run(command, check=False, capture_output=True, timeout=90)  # a late client sends them too
    prompts = prompts_of(double)
    assert len(prompts) > 20
    assert len(prompts) == len(set(prompts))


def test_an_open_loop_sends_on_schedule_and_counts_latency_from_it(
    double: Double, key_file: Path, tmp_path: Path
) -> None:
    """Ten requests a second of half a second each: a closed loop of one user would send two a second."""
    more = ["--rate", "10", "--arrivals", "poisson", "--seed", "3", "--requests", "24"]
    done = locust("chat_open.py", double, key_file, tmp_path, *more)
    assert well(done), done.stderr
    samples = sorted(read_samples(tmp_path / "samples.jsonl"), key=lambda s: s.index)
    offsets = list(zip(Arrivals("poisson", 10.0, seed=3).offsets(), samples, strict=False))
    start = samples[0].scheduled - offsets[0][0]
    assert len(samples) == 24
    assert [s.scheduled - start for _, s in offsets] == pytest.approx([offset for offset, _ in offsets], abs=1e-6)
    assert all(s.schedule_delay >= 0 for s in samples)
    answered = [s for s in samples if s.outcome == "ok"]
    assert all(s.ttft == (s.first or 0) - s.scheduled for s in answered)
    assert max(s.ttft or 0 for s in answered) > 3 * min(s.ttft or 0 for s in answered), "they queue for four slots"


def test_the_summary_keeps_to_its_schema_and_exports_llm_ds_report(
    double: Double, key_file: Path, tmp_path: Path
) -> None:
    more = ["--rate", "20", "--requests", "80", "--max-tokens", "4", "--limits", "mlperf-llama2-70b,gap_max=1s"]
    done = locust("chat_open.py", double, key_file, tmp_path, *more, model="paced")
    assert well(done), done.stderr
    summary = summary_of(tmp_path)
    jsonschema.validate(summary, json.loads(json_schema()))
    assert (summary["requests"], summary["errors"], summary["cut_off"]) == (80, {}, 0)
    p95, p99 = summary["ttft"]["quantiles"][2:]
    assert p95["low"] <= p95["value"] <= p95["high"], "80 values resolve p95"
    assert p99["low"] is p99["high"] is None, "and not p99"
    assert summary["prefill"]["mean"] == pytest.approx(1000 * PREFILL_S)
    waited = summary["ttft"]["mean"] - 1000 * PREFILL_S
    assert summary["queue"]["mean"] == pytest.approx(waited, rel=0.01)
    assert summary["queue_share"] == pytest.approx(waited / summary["ttft"]["mean"], rel=0.01)
    assert [limit["name"] for limit in summary["goodput"]["limits"]] == ["ttft_p99", "tpot_p99", "gap_max"]
    assert summary["goodput"]["attainment"] > 0
    assert "p99" in done.stderr and "(unresolved)" in done.stderr

    report = BenchmarkReportV02.model_validate(yaml.safe_load((tmp_path / "br.yml").read_text()))
    aggregate = report.model_dump()["results"]["request_performance"]["aggregate"]
    assert aggregate["requests"]["total"] == 80
    assert aggregate["latency"]["time_to_first_token"]["p95"] == pytest.approx(p95["value"])
    assert aggregate["latency"]["time_to_first_token"]["p99"] is None, "unresolved"
    assert KEY not in (tmp_path / "br.yml").read_text()


def test_the_published_schema_is_the_codes() -> None:
    """Otherwise: python -m llamaherd_loadtest.summary > loadtest/llamaherd_loadtest/summary.schema.json"""
    assert (LOCUSTFILES.parent / "llamaherd_loadtest/summary.schema.json").read_bytes() == json_schema()


def test_workers_together_measure_what_one_process_does(double: Double, key_file: Path, tmp_path: Path) -> None:
    more = ["--rate", "12", "--requests", "48", "--seed", "5", "--max-tokens", "8"]
    runs = {"one": [], "two": ["--processes", "2"]}
    for name, processes in runs.items():
        (tmp_path / name).mkdir()
        done = locust("chat_open.py", double, key_file, tmp_path / name, *more, *processes, model="paced")
        assert well(done), done.stderr
    one, two = (sorted(samples_of(tmp_path / name), key=lambda s: s.index) for name in runs)
    assert [(s.index, s.prompt_tokens, s.tokens, s.outcome) for s in one] == [
        (s.index, s.prompt_tokens, s.tokens, s.outcome) for s in two
    ]
    assert [s.index for s in one] == list(range(48))
    offsets = [[s.scheduled - run[0].scheduled for s in run] for run in (one, two)]
    assert offsets[0] == pytest.approx(offsets[1], abs=0.01), "both kept one schedule, whoever sent"
    first, second = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    assert (first["requests"], first["errors"], first["cut_off"]) == (second["requests"], {}, 0) == (48, {}, 0)
    for run, samples in ((first, one), (second, two)):
        of_all: dict[str, list[float | None]] = {
            "tpot": [s.tpot for s in samples],
            "itl": [gap for s in samples for gap in s.gaps],
        }
        for metric, values in of_all.items():
            merged = [quantile["value"] for quantile in run[metric]["quantiles"]]
            together = distribution(values)
            assert together is not None
            assert merged == pytest.approx([quantile.value for quantile in together.quantiles])
    assert [first[metric]["count"] for metric in of_all] == [second[metric]["count"] for metric in of_all]


def test_a_closed_loop_of_workers_shares_the_requests_out(double: Double, key_file: Path, tmp_path: Path) -> None:
    more = ["-u", "4", "-r", "4", "--requests", "30", "--max-tokens", "8", "--processes", "2"]
    done = locust("chat.py", double, key_file, tmp_path, *more, model="paced")
    assert well(done), done.stderr
    assert sorted(s.index for s in samples_of(tmp_path) if not s.warmup) == list(range(30))
    assert sorted(s.index for s in samples_of(tmp_path) if s.warmup) == [-4, -3, -2, -1]


def test_workers_on_other_hosts_have_files_of_their_own(double: Double, key_file: Path, tmp_path: Path) -> None:
    """As there, the master's (here relative) paths name nothing where the workers run."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for folder in ("there", "one", "two"):
        (tmp_path / folder).mkdir()
    workload = LOCUSTFILES.parent / "llamaherd_loadtest/workloads/summarise.yml"
    (tmp_path / "there/key").write_text(KEY)
    (tmp_path / "there/workload.yml").write_text(workload.read_text())
    where = ["--worker", "--master-host=127.0.0.1", f"--master-port={port}", f"--host={double.url}"]
    files = ["--key-file=key", "--workload=workload.yml"]
    worker = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILES / "chat.py"), *where, *files]
    more = ["-u", "4", "-r", "4", "--requests", "12", "--max-tokens", "4", "--seed", "2"]
    more += ["--workload", os.path.relpath(workload, LOCUSTFILES)]
    key = Path(os.path.relpath(key_file, LOCUSTFILES))
    master = ["--master", "--master-bind-host=127.0.0.1", f"--master-bind-port={port}", "--expect-workers=2"]
    workers = [subprocess.Popen(worker, cwd=tmp_path / "there", stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        two = locust("chat.py", double, key, tmp_path / "two", *more, *master, model="paced")
        assert well(two), two.stderr
        assert [process.wait(20) for process in workers] == [0, 0]
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert well(locust("chat.py", double, key, tmp_path / "one", *more, model="paced"))
    sent = [
        sorted((s.index, s.prompt_tokens, s.tokens) for s in samples_of(tmp_path / name) if not s.warmup)
        for name in ("one", "two")
    ]
    assert sent[0] == sent[1]
    assert [index for index, *_ in sent[0]] == list(range(12))


def test_conversations_of_an_agent_grow_by_the_answers(start_double: Any, key_file: Path, tmp_path: Path) -> None:
    double = start_double()
    more = ["-u", "2", "-r", "2", "--requests", "4", "--workload", "agent", "--max-tokens", "3"]
    done = locust("chat.py", double, key_file, tmp_path, *more, model="paced")
    assert well(done), done.stderr
    turns = [s for s in samples_of(tmp_path) if s.index == 0]
    assert [s.turn for s in turns] == list(range(len(turns))) and len(turns) >= 2
    lengths = [s.prompt_tokens or 0 for s in turns]
    assert lengths == sorted(set(lengths)), "each repeats all before it"
    requests = [entry["request"] for entry in double.get("/log").values()]
    last = max(requests, key=lambda request: len(request["messages"]))
    assert [tool["function"]["name"] for tool in last["tools"]] == ["search", "read_file", "run"]
    assert [message["role"] for message in last["messages"][:3]] == ["user", "assistant", "tool"]
    assert last["messages"][1]["content"] == "t0 t1 t2 ", (
        "the server's own answer, so that its cache serves the next turn"
    )
    assert last["messages"][2]["tool_call_id"] == last["messages"][1]["tool_calls"][0]["id"]


def test_a_trace_is_replayed_at_its_times_with_its_lengths(double: Double, key_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [(27482, 300, 4), (27482, 64, 2), (28482, 900, 5), (30482, 40, 3)]
    trace.write_text(
        "".join(json.dumps({"timestamp": t, "input_length": i, "output_length": o}) + "\n" for t, i, o in rows)
    )
    more = ["--trace", str(trace), "--trace-speed", "2"]
    done = locust("chat_open.py", double, key_file, tmp_path, *more, model="paced")
    assert well(done), done.stderr
    samples = samples_of(tmp_path)
    assert [(s.prompt_tokens, s.tokens) for s in samples] == [(i, o) for _, i, o in rows]
    assert [s.scheduled - samples[0].scheduled for s in samples] == pytest.approx([0, 0, 0.5, 1.5], abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "users"),
    [
        ("ramp", [0, 25, 50, 99]),
        ("steps", [20, 40, 60, 100]),
        ("spike", [20, 20, 100, 20]),
        ("soak", [0, 100, 100, 100]),
    ],
)
def test_shapes(shape: str, users: list[int]) -> None:
    """Users of 100 at the start, a quarter, the middle and the end."""
    program = f"""
import runpy  # in a process of its own: Locust patches the one it is imported into
found = runpy.run_path("shapes/{shape}.py")["{shape.capitalize()}"]()
print([round(100 * found.share(progress)) for progress in (0.0, 0.25, 0.5, 0.99)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=LOCUSTFILES, timeout=60
    )
    assert json.loads(done.stdout) == users, done.stderr


def test_a_shape_beside_the_locustfile_drives_the_users(double: Double, key_file: Path, tmp_path: Path) -> None:
    more = ["-u", "5", "-t", "8s", "--max-tokens", "2"]
    done = locust("chat.py,shapes/steps.py", double, key_file, tmp_path, *more, model="paced")
    assert well(done), done.stderr
    assert [f"updating to {users} users" in done.stderr for users in range(1, 6)] == [True] * 5
    answered = len([s for s in samples_of(tmp_path) if s.outcome == "ok" and not s.warmup])
    assert answered - 5 <= summary_of(tmp_path)["requests"] <= answered, "all of it counts but what the end cut off"
    done = locust("chat.py,shapes/steps.py", double, key_file, tmp_path, "-u", "5")
    assert "a load shape needs --users and --run-time" in done.stderr


def test_locusts_web_page_shows_ttft_and_tpot(double: Double, key_file: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = ["--host", double.url, "--key-file", str(key_file), "--web-host", "127.0.0.1", "--web-port", str(port)]
    arguments = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILES / "chat.py"), *where]
    environment = {**os.environ, "LOCUST_SKIP_UPDATE_CHECK": "1"}
    page = httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=3))
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            for _ in range(100):
                try:
                    assert "max_tokens" in (form := page.get("/").text) and "key_file" not in form
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            options = {"user_count": 2, "spawn_rate": 2, "max_tokens": 4, "model": "paced"}
            page.post("/swarm", data=options | {"host": "http://127.0.0.1:1"})
            options["samples"] = str(tmp_path / "samples.jsonl")
            assert page.post("/swarm", data=options | {"host": double.url}).json()["success"]
            names: set[str] = set()
            for _ in range(100):
                names = {entry["name"] for entry in page.get("/stats/requests").json()["stats"]}
                if "TPOT" in names:
                    break
                time.sleep(0.2)
            assert {"/v1/chat/completions", "TTFT", "TPOT"} <= names
            assert page.post("/stop").json()["success"]
        finally:
            running.terminate()
            assert running.stderr is not None
            log = running.stderr.read()
    assert f"the API key is for {double.url}, not for http://127.0.0.1:1" in log, "the page cannot send it elsewhere"
    assert list(tmp_path.iterdir()) == [], "nor write files"
    assert "requests, no errors" in log, "the summary is logged when the test is stopped in the page"
