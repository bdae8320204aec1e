"""Writes a summary in llm-d's Benchmark Report format, version 0.2.1, so that its tools can read our runs.

The format is that of github.com/llm-d/llm-d-benchmark, package llmd-benchmark-report. It has no place for intervals, so
quantiles that our sample does not resolve are left out.
"""

from __future__ import annotations

import getpass
import hashlib
import uuid
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

import msgspec
import yaml

from llamaherd_loadtest.summary import Distribution, Summary

_ARGS = (
    *("workload", "prompt_tokens", "max_tokens", "requests", "limits", "num_users", "run_time"),
    *("rate", "arrivals", "burst", "trace_speed"),
)


def to_benchmark_report(summary: Summary, options: Any, parallelism: int, seed: int) -> str:
    """Return the report as YAML. `options` are Locust's with ours, `parallelism` the number of sending processes."""
    native = {name: value for name in _ARGS if (value := getattr(options, name, None))} | {"seed": seed}
    end = datetime.now(UTC)
    report = {
        "version": "0.2.1",
        "run": {
            "uid": uuid.uuid4().hex,
            "time": {
                "start": (end - timedelta(seconds=summary.window_s)).isoformat(),
                "end": end.isoformat(),
                "duration": f"PT{summary.window_s:.3f}S",
            },
            "user": getpass.getuser(),
        },
        "scenario": {
            "load": {
                "metadata": {"cfg_id": hashlib.sha256(msgspec.json.encode(native, order="sorted")).hexdigest()},
                "standardized": _load(summary, options, parallelism),
                "native": {"args": native},
            }
        },
        "results": {"request_performance": {"aggregate": _aggregate(summary)}},
    }
    return yaml.safe_dump(_without_none(report), sort_keys=False)


def _load(summary: Summary, options: Any, parallelism: int) -> dict[str, Any]:
    open_loop = hasattr(options, "rate")
    return {
        "tool": "llamaherd-loadtest",
        "tool_version": version("llamaherd-loadtest"),
        "parallelism": parallelism,
        "source": "sampled" if options.workload.endswith((".json", ".jsonl")) else "random",
        "input_seq_len": _lengths(summary.prompt_tokens),
        "output_seq_len": _lengths(summary.output_tokens),
        "rate_qps": options.rate if open_loop and not options.trace else None,
        "concurrency": None if open_loop else options.num_users,
    }


def _aggregate(summary: Summary) -> dict[str, Any]:
    errors = sum(summary.errors.values())
    return {
        "requests": {
            "total": summary.requests + errors + summary.cut_off,
            "failures": errors,
            "incomplete": summary.cut_off,
            "input_length": _statistics(summary.prompt_tokens, "count"),
            "output_length": _statistics(summary.output_tokens, "count"),
        },
        "latency": {
            "time_to_first_token": _statistics(summary.ttft, "ms"),
            "time_per_output_token": _statistics(summary.tpot, "ms/token"),
            "inter_token_latency": _statistics(summary.itl, "ms/token"),
            "request_latency": _statistics(summary.e2e, "ms"),
        },
        "throughput": {
            "output_token_rate": {"units": "tokens/s", "mean": summary.output_tokens_per_s},
            "request_rate": {"units": "queries/s", "mean": summary.requests_per_s},
        },
    }


def _lengths(tokens: Distribution | None) -> dict[str, Any]:
    return {"distribution": "other", "value": tokens.mean if tokens else 0}


def _statistics(values: Distribution | None, units: str) -> dict[str, Any] | None:
    if values is None:
        return None
    quantiles = {f"p{q.p * 100:g}": q.value for q in values.quantiles if q.resolved}
    return {"units": units, "mean": values.mean, **quantiles, "max": values.max}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
