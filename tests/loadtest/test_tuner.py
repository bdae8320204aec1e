"""The tuner's command line against a double whose speed depends on its settings."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaherd_loadtest.tune.options import parse

from .conftest import KEY, Double


def command(double: Double, key_file: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--url", double.url, "--key-file", str(key_file), "--model", "engine", "--out", str(out), "--seed", "5"]
    return [sys.executable, "-m", "llamaherd_loadtest.tune", *fixed, *more]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), check=False, capture_output=True, text=True, timeout=120)


def verdict(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "verdict.json").read_text()))


def in_force(double: Double) -> dict[str, Any]:
    return dict(double.get("/admin/engine")["settings"])


def test_finds_the_best_settings_past_refusals_and_crashes(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    before = in_force(double)
    space = ["--space", "parallel=4,8,16,64", "--space", "ubatch=128"]
    limits = ["--limit", "ttft_p95=2s", "--limit", "tpot_p95=500ms"]
    done = run(double, key_file, tmp_path, *space, *limits, "--budget", "60s")
    assert done.returncode == 0, done.stderr
    found = verdict(tmp_path)
    assert found["verdict"] == "change"
    assert found["chosen"] == {**before, "parallel": 8, "ubatch": 128}
    assert found["sentence"].startswith("Change parallel 4 → 8, ubatch 512 → 128: +")
    assert found["sentence"] in done.stdout
    assert in_force(double) == before == found["current"]
    rows = {row["label"]: row for row in found["table"]}
    chosen = rows["parallel 8, batch 2048, ubatch 128"]
    assert chosen["confirmed"] and chosen["verdict"] == "chosen" and chosen["errors"] == 0
    assert rows["parallel 16, batch 2048, ubatch 128"]["verdict"].startswith("failed: all requests fail")
    assert "does not fit" in rows["parallel 64, batch 2048, ubatch 128"]["verdict"]
    assert found["limits"] == {"ttft_p95": 2000, "tpot_p95": 500}
    assert found["provenance"]["model"]["name"] == "engine"
    assert found["provenance"]["spent_s"] <= 60
    assert found["provenance"]["measured"]["output_tokens_per_s"] == round(chosen["output_tokens_per_s"], 1)
    page = (tmp_path / "report.html").read_text()
    assert found["sentence"] in page and page.count("<svg") == 6
    assert not any(outside in page for outside in ("<script", "<link", "@import", 'src="http', "url(http"))


@pytest.mark.parametrize("load", ["2", "4/s"])
def test_finds_the_lowest_latency_at_a_load(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path, load: str
) -> None:
    double = start_double()
    short = tmp_path / "short.yml"
    short.write_text("{name: short, description: short, prompt: {median: 20}, output: {median: 20}}")
    space = ["--space", "ubatch=128,512", "--objective", "tpot_p50", "--load", load, "--workload", str(short)]
    done = run(double, key_file, tmp_path, *space, "--budget", "25s")
    assert done.returncode == 0, done.stderr
    found = verdict(tmp_path)
    assert found["chosen"]["ubatch"] == 128
    assert found["sentence"].startswith("Change ubatch 512 → 128: tpot_p50 -")
    assert found["table"][0]["score"] > 1.3 * found["table"][1]["score"]
    assert "tpot_p50, ms" in (tmp_path / "report.html").read_text()


def test_what_another_host_chose_is_compared_deployed_and_measured_again(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    row = {"label": "", "settings": {}, "verdict": ""}
    elsewhere = {"verdict": "change", "sentence": "", "current": {}, "chosen": {"ubatch": 128}, "table": [row]}
    (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
    out = tmp_path / "out"
    done = run(double, key_file, out, "--try", str(tmp_path / "elsewhere.json"), "--budget", "20s")
    assert done.returncode == 0, done.stderr
    assert "2 settings to search" in done.stdout
    found = verdict(out)
    assert (found["verdict"], found["chosen"]["ubatch"]) == ("change", 128)

    early = run(double, key_file, out, "--in-service")
    assert early.returncode == 2
    assert "the server does not have the chosen settings: ubatch 512 → 128" in early.stderr
    httpx.put(double.url + "/admin/engine", json=found["chosen"], headers={"Authorization": f"Bearer {KEY}"})
    better = run(double, key_file, out, "--in-service")
    assert better.returncode == 0, better.stderr
    assert "in service, compared with the previous settings: +" in better.stdout
    assert verdict(out)["provenance"]["in_service"] in better.stdout
    before = next(row for row in found["table"] if row["settings"] == found["current"])
    before["score"] *= 10
    (out / "verdict.json").write_text(json.dumps(found))
    worse = run(double, key_file, out, "--in-service")
    assert worse.returncode == 3
    assert "compared with the previous settings: -" in worse.stdout
    kept = verdict(out)
    assert (kept["verdict"], kept["chosen"]) == ("keep", found["current"])
    assert "the search chose ubatch 512 → 128, but in service" in kept["sentence"]
    assert "not confirmed in service" in [row["verdict"] for row in kept["table"]]


def test_a_killed_search_is_resumed_from_the_settings_that_it_found(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    before = in_force(double)
    arguments = command(double, key_file, tmp_path, "--space", "ubatch=128", "--budget", "120s")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        while in_force(double) == before and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert in_force(double)["ubatch"] == 128
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        again = [process.stdout.readline() for _ in range(3)]
        process.terminate()
    assert again.pop(0) == "An earlier search was killed before it could restore the settings: ubatch 128 → 512\n"
    assert again == lines, "the first window is not measured again"
    assert in_force(double) == before == verdict(tmp_path)["current"]


def test_a_budget_that_is_too_small_names_one_that_does(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    """Requests of 60 tokens take about 1.3 s: four windows of them do not fit into 4 s."""
    long = tmp_path / "long.yml"
    long.write_text("{name: long, description: long, prompt: {median: 20}, output: {median: 60}}")
    double = start_double()
    arguments = [double, key_file, tmp_path, "--space", "ubatch=128", "--workload", str(long)]
    refused = run(*arguments, "--budget", "4s")
    assert (refused.returncode, refused.stderr.count("\n")) == (4, 1), refused.stderr
    budget = json.loads((tmp_path / "budget.json").read_text())
    assert budget["budget_s"] == 4
    assert f"give --budget {budget['needed_s']:.0f}s" in refused.stderr
    assert not (tmp_path / "verdict.json").exists() and not double.get("/applied")
    done = run(*arguments, "--budget", f"{budget['needed_s']:g}s")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "budget.json").exists()
    prompts = [str(entry["request"]["messages"]) for entry in double.get("/log").values()]
    assert len(prompts) == len(set(prompts)), "a search repeated with its seed finds nothing in the server's cache"
    assert len([row for row in verdict(tmp_path)["table"] if row["windows"]]) == 2


def test_two_tuners_do_not_measure_one_server(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    arguments = command(double, key_file, tmp_path / "first", "--space", "ubatch=128", "--budget", "20s")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        lines = [first.stdout.readline() for _ in range(2)]
        second = run(double, key_file, tmp_path / "second", "--space", "ubatch=128")
        while first.poll() is None:  # within a window, sooner or later
            httpx.put(double.url + "/admin/engine", json={"ubatch": 64}, headers={"Authorization": f"Bearer {KEY}"})
            time.sleep(0.3)
        _, errors = first.communicate(timeout=60)
    assert lines[1].startswith("  1 screen")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"another tuner is measuring {double.url}" in second.stderr
    assert first.returncode == 2
    assert "no longer has the settings that were being measured (ubatch " in errors and "→ 64)" in errors


def test_nothing_to_compare_takes_no_time(start_double: Callable[..., Double], key_file: Path, tmp_path: Path) -> None:
    done = run(start_double(), key_file, tmp_path, "--space", "parallel=4")
    assert done.returncode == 0, done.stderr
    assert verdict(tmp_path)["sentence"].endswith(": there are no other settings to try.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_restores_reports_and_resumes(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    double = start_double()
    before = in_force(double)
    arguments = command(double, key_file, tmp_path, "--space", "ubatch=128", "--budget", "20s")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        while in_force(double) == before and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"interrupted by {number.name}" in errors
    assert in_force(double) == before
    partial = verdict(tmp_path)
    assert partial["partial"] and partial["verdict"] == "keep"
    assert "interrupted" in (tmp_path / "report.html").read_text()
    if number is signal.SIGTERM:
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            again = [process.stdout.readline() for _ in range(2)]
            process.terminate()
        assert again == lines, "the first window is not measured again"


def test_arrivals_beyond_what_settings_carry_are_a_fault_of_theirs(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    done = run(double, key_file, tmp_path, "--objective", "tpot_p50", "--load", "20/s", "--budget", "20s")
    assert done.returncode == 0, done.stderr
    sentence = verdict(tmp_path)["sentence"]
    assert re.search(r"Keep .*: failed: \d+ of \d+ requests were not answered within \S+ s after the last", sentence)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--key-file", "/dev/null"], "refuses the admin key"),
        (["--space", "slots=1,2"], "unknown setting 'slots'; available: parallel, batch"),
        (["--model", "busy"], "does not answer (http 429): slow down"),
    ],
)
def test_servers_that_cannot_be_tuned_are_one_clear_line(
    double: Double, key_file: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    done = run(double, key_file, tmp_path, *more)
    assert done.returncode == 2
    assert done.stderr.startswith("tune: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "verdict.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "ttft=2s"], "invalid limit 'ttft=2s'"),
        (["--workload", "nothing"], "unknown workload 'nothing'"),
        (["--budget", "5"], "invalid budget '5'"),
        (["--key-file", "/nowhere/key"], "cannot read key file /nowhere/key"),
    ],
)
def test_options_that_make_no_sense_are_named(more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--url", "http://127.0.0.1:1", "--model", "m", "--out", "build/never", *more])


def test_a_self_signed_server_needs_its_ca(
    start_double: Callable[..., Double], key_file: Path, certificate: Path, tmp_path: Path
) -> None:
    double = start_double("--cert", str(certificate))
    done = run(double, key_file, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "give its CA with --ca" in done.stderr


def test_a_server_that_is_not_ready_is_not_loaded(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    done = run(start_double("--state", "restarting"), key_file, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is restarting: wait until its /readyz answers 200" in done.stderr


def test_no_room_for_what_is_measured_ends_the_search_and_restores_the_settings(
    start_double: Callable[..., Double], key_file: Path, tmp_path: Path
) -> None:
    double = start_double()
    before = in_force(double)
    done = subprocess.run(
        ["prlimit", "--fsize=6000", *command(double, key_file, tmp_path, "--space", "ubatch=128", "--budget", "15s")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"tune: cannot write to {tmp_path}: File too large; free space there")
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("verdict.*")), "whole, or not there"
    assert in_force(double) == before


def test_a_workload_larger_than_the_context_is_refused(double: Double, key_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.yml"
    path.write_text("{name: long, description: long, prompt: {median: 4000}, output: {median: 100}}")
    done = run(double, key_file, tmp_path, "--workload", str(path))
    assert done.returncode == 2
    assert "a slot of 2048 tokens is smaller than the workload's 4100 at p99" in done.stderr
