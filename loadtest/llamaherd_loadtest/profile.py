"""Measures a host for the capacity simulation: `python -m llamaherd_loadtest.profile --url … --parallel 8`."""

from __future__ import annotations

from itertools import takewhile

from llamaherd_loadtest.capacity import Profile
from llamaherd_loadtest.client import Target
from llamaherd_loadtest.measure import measure, options, print_result, target
from llamaherd_loadtest.rng import fresh_seed


def main() -> None:
    """Print a Profile; if none can be measured, exit with one line on stderr."""
    parser = options("llamaherd_loadtest.profile", __doc__)
    parser.add_argument("--parallel", type=int, required=True, help="the host's slots")
    print_result(parser, lambda args: measured(target(args), args.workload, args.parallel, args.window, args.seed))


def measured(server: Target, workload: str, parallel: int, window_s: float, seed: int | None = None) -> Profile:
    """Run closed loops of 1, 2, 4 … and `parallel` requests. The TTFT of a single request is the time for its prompt.

    Raises ServerUnusable, RunFailed, ValueError.
    """
    below = takewhile(lambda busy: busy < parallel, (1 << n for n in range(16)))
    first = fresh_seed() if seed is None else seed
    runs = {busy: measure(server, workload, busy, window_s, first + busy) for busy in (*below, parallel)}
    tpot_s = {busy: run.tpot.mean / 1000 for busy, run in runs.items() if run.tpot}
    alone = runs[1]
    if not (alone.prompt_tokens and alone.ttft and tpot_s):
        raise ValueError(f"no answer of {server.url} was long enough to measure")
    return Profile(parallel, 1000 * alone.prompt_tokens.mean / alone.ttft.mean, tpot_s)


if __name__ == "__main__":
    main()
