"""The tuner's command line."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from llamaherd_loadtest.client import Target
from llamaherd_loadtest.limits import Limit, QualityLimit, divide_limits
from llamaherd_loadtest.tune.evidence import Load
from llamaherd_loadtest.tune.objective import Objective, parse_load, parse_objective
from llamaherd_loadtest.workload import Workload, load_workload, workload_names

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Options(Struct, frozen=True, kw_only=True):
    """A tuning job on `subject`. `command` repeats it."""

    subject: str
    target: Target
    admin_url: str
    admin_key: str
    workload: Workload
    limits: list[Limit]
    answer_limits: list[QualityLimit]
    objective: Objective
    load: Load
    space: list[str]
    quality: bool
    budget_s: float
    seed: int | None
    out: Path
    command: str
    proposal: Path | None
    in_service: bool
    about: str


def parse(arguments: Sequence[str]) -> Options:
    """Parse the command line. Raises ValueError for an invalid value, SystemExit as argparse does."""
    args = _parser().parse_args(arguments)
    load = parse_load(args.load)
    limits, answer_limits = divide_limits(args.limit)
    if any(limit.name == "valid" for limit in answer_limits):
        raise ValueError("limit valid is for upgrades (llamaherd_upgrade_limits): the tuner takes same_top and kld")
    return Options(
        subject=args.subject or args.url,
        target=Target(url=args.url, model=args.model, key=_secret(args.key_file), ca=args.ca),
        admin_url=args.admin_url or args.url,
        admin_key=_secret(args.admin_key_file or args.key_file),
        workload=load_workload(args.workload),
        limits=limits,
        answer_limits=answer_limits,
        objective=parse_objective(args.objective, load),
        load=load,
        space=args.space,
        quality=args.quality,
        budget_s=_seconds(args.budget),
        seed=args.seed,
        out=args.out,
        command="python -m llamaherd_loadtest.tune " + shlex.join(arguments),
        proposal=args.proposal,
        in_service=args.in_service,
        about=args.about,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llamaherd_loadtest.tune",
        description="Find the engine settings with the highest throughput, or the lowest latency, by measuring.",
    )
    add = parser.add_argument
    add("--url", required=True, help="URL that clients use")
    add("--ca", type=Path, help="certificate of the server's CA")
    add("--key-file", type=Path, help="file that holds the API key")
    add("--admin-url", help="URL that serves /admin/engine (default: --url)")
    add("--admin-key-file", type=Path, help="file that holds an admin key (default: --key-file)")
    add("--model", required=True, help="the model's name")
    add(
        "--subject",
        help="host, model hash and build; only a journal of the same subject is resumed (default: --url)",
    )
    add("--about", default="", help="the host's hardware and build, for the report")
    add("--workload", default="chat", help=f"a .yml file, or one of {', '.join(workload_names())}")
    add(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="such as ttft_p95=2s, mlperf-llama2-70b, or, to search KV types, kld=0.02; may be repeated",
    )
    add("--objective", default="tokens", help="maximise tokens or requests per second, or minimise e.g. e2e_p95")
    add(
        "--load",
        default="",
        metavar="N or R/s",
        help="requests in flight, or arrivals per second (default: one request per slot)",
    )
    add("--space", action="append", default=[], metavar="KNOB=V,V", help="values to try; may be repeated")
    add("--quality", action="store_true", help="allow kv_type_k and kv_type_v, which change answers, in --space")
    add("--try", dest="proposal", type=Path, metavar="VERDICT.JSON", help="compare only what this verdict chose")
    add(
        "--in-service",
        action="store_true",
        help="measure the deployed settings that the verdict in --out chose",
    )
    add("--budget", default="15m", help="time for the whole search: 180s, 15m, 1h")
    add("--seed", type=int, help="seed of the search (default: random)")
    add("--out", type=Path, required=True, help="folder for verdict.json, report.html, journal.jsonl and samples")
    return parser


def _secret(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot read key file {path}: {error.strerror}") from error


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise ValueError(f"invalid budget {text!r}: write for example 180s or 15m")
    return float(match[1]) * _UNITS[match[2]]
