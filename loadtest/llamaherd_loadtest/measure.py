"""Measures a server once, briefly, and prints the result as JSON: `python -m llamaherd_loadtest.measure --url …`.

An invalid window is repeated, and a slow server gets more time to warm up. The exit status is 1 if no window was valid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from llamaherd_loadtest.client import ChatClient, Target
from llamaherd_loadtest.drive import WARM_UP_S, NotWarmedUp, RunFailed, closed_loop
from llamaherd_loadtest.probe import ServerUnusable, calibrate
from llamaherd_loadtest.rng import fresh_seed
from llamaherd_loadtest.summary import Summary, summarise
from llamaherd_loadtest.workload import Prompts, load_workload, workload_names

_TRIES = 3
_WARM_UP_FACTOR = 4  # factor by which a server too slow to warm up gets more time


def main() -> None:
    """Print a Summary; if there is none, exit with one line on stderr."""
    parser = options("llamaherd_loadtest.measure", __doc__)
    parser.add_argument("--concurrency", type=int, required=True, help="requests in flight, e.g. the server's parallel")
    print_result(parser, lambda args: measure(target(args), args.workload, args.concurrency, args.window, args.seed))


def print_result(parser: argparse.ArgumentParser, measured: Callable[[argparse.Namespace], msgspec.Struct]) -> None:
    """Print the result of `measured` for the command line as JSON, or exit with one line on stderr."""
    args = parser.parse_args()
    try:
        found = measured(args)
    except (ServerUnusable, RunFailed, ValueError) as error:
        sys.exit(f"{parser.prog.removeprefix('python -m ')}: {error}")
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


def options(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the common options of programs that measure: the server, the workload and the duration."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    add = parser.add_argument
    add("--url", required=True, help="URL of the server")
    add("--ca", type=Path, help="certificate of the server's CA")
    add("--key-file", type=Path, help="file that holds the API key")
    add("--model", default="", help="the model's name")
    add("--workload", default="chat", help=f"{', '.join(workload_names())}, or a .yml file")
    add("--seed", type=int, help="seed of the prompts (default: random)")
    add("--window", type=float, default=10.0, help="seconds (default: %(default)s)")
    return parser


def target(args: argparse.Namespace) -> Target:
    """Return the server that those options name."""
    key = args.key_file.read_text(encoding="utf-8").strip() if args.key_file else ""
    return Target(url=args.url, model=args.model, key=key, ca=args.ca)


def measure(server: Target, workload: str, concurrency: int, window_s: float, seed: int | None = None) -> Summary:
    """Measure a closed loop of `concurrency` for `window_s` seconds, with prompts new to the server unless `seed` is
    given. Raises ServerUnusable, ValueError, and RunFailed if no window was valid."""
    client, seed = ChatClient(server), fresh_seed() if seed is None else seed
    try:
        calibration, fault, warm_up_s = calibrate(client, server, seed), "", WARM_UP_S + 2 * window_s
        for attempt in range(_TRIES):
            prompts = Prompts(
                load_workload(workload), model=server.model, seed=seed + (attempt << 64), calibration=calibration
            )
            loop = partial(closed_loop, server, client, prompts, concurrency=concurrency, window_s=window_s)
            try:
                run = loop(warm_up_s=warm_up_s)
            except NotWarmedUp as slow:
                fault, warm_up_s = str(slow), _WARM_UP_FACTOR * slow.waited_s
                continue
            summary = summarise(run.samples, run.start, run.end, run.health)
            if summary.ttft is not None and not summary.fault:
                return summary
            fault = summary.fault
    finally:
        client.close()
    raise RunFailed(f"{_TRIES} windows of {window_s:g} s were invalid, the last one: {fault}")


if __name__ == "__main__":
    main()
