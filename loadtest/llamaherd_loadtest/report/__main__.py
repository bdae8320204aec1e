"""`python -m llamaherd_loadtest.report FOLDER PAGE`: make the report again from a tuning job's folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llamaherd_loadtest.report.write import write_report


def main() -> int:
    """Write the page that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m llamaherd_loadtest.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="what was given to the tuner as --out")
    parser.add_argument("page", type=Path, help="the HTML file to write")
    args = parser.parse_args()
    try:
        write_report(args.folder, args.page)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    sys.stdout.write(f"{args.page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
