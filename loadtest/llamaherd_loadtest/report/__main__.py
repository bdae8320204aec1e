"""`python -m llamaherd_loadtest.report FOLDER PAGE`: renders the report of a tuning job's or load test's folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llamaherd_loadtest.report.write import write_report


def main() -> int:
    """Write the report given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m llamaherd_loadtest.report", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="the tuner's --out, or a folder with a load test's summary.json and samples.jsonl")
    add("page", type=Path, help="the HTML file to write")
    add(
        "--about",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="facts that a load test cannot know, such as host, hardware, build; may be repeated",
    )
    args = parser.parse_args()
    try:
        write_report(args.folder, args.page, dict(pair.split("=", 1) for pair in args.about))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    sys.stdout.write(f"{args.page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
