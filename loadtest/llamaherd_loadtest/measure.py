"""One short measurement of a server as it is, printed as JSON: `python -m llamaherd_loadtest.measure --url …`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from llamaherd_loadtest.client import ChatClient, Target
from llamaherd_loadtest.drive import RunFailed, closed_loop
from llamaherd_loadtest.probe import ServerUnusable, calibrate
from llamaherd_loadtest.summary import Summary, summarise
from llamaherd_loadtest.workload import Prompts, load_workload, workload_names


def main() -> None:
    """Print a Summary; exits with one line on stderr where there is nothing to sum up."""
    parser = argparse.ArgumentParser(prog="python -m llamaherd_loadtest.measure", description=__doc__)
    add = parser.add_argument
    add("--url", required=True, help="where to send the load")
    add("--ca", type=Path, help="certificate of the server's CA")
    add("--key-file", type=Path, help="file that holds the API key")
    add("--model", default="", help="the model's name")
    add("--workload", default="chat", help=f"{', '.join(workload_names())}, or a .yml file")
    add("--concurrency", type=int, required=True, help="requests in flight, best the server's parallel")
    add("--window", type=float, default=10.0, help="seconds (default: %(default)s)")
    args = parser.parse_args()
    key = args.key_file.read_text(encoding="utf-8").strip() if args.key_file else ""
    try:
        target = Target(url=args.url, model=args.model, key=key, ca=args.ca)
        summary = measure(target, args.workload, args.concurrency, args.window)
    except (ServerUnusable, RunFailed, ValueError) as error:
        sys.exit(f"llamaherd_loadtest.measure: {error}")
    sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")


def measure(target: Target, workload: str, concurrency: int, window_s: float, seed: int = 0) -> Summary:
    """A closed loop of `concurrency` for `window_s` seconds. Raises ServerUnusable, RunFailed, ValueError."""
    client = ChatClient(target)
    try:
        calibration = calibrate(client, target, seed)
        prompts = Prompts(load_workload(workload), model=target.model, seed=seed, calibration=calibration)
        warm_up_s = 20 + 2 * window_s
        run = closed_loop(target, client, prompts, concurrency=concurrency, window_s=window_s, warm_up_s=warm_up_s)
    finally:
        client.close()
    return summarise(run.samples, run.start, run.end, run.health)


if __name__ == "__main__":
    main()
