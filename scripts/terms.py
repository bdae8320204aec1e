"""Prints each line that uses a replaced term, with its replacement; exits with 1 if there are any.

Texts, metrics, variables and messages use the same term for the same thing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "docs/*.md", "playbooks/*.yml", "roles/*", "templates/*")
TERMS = {
    r"park(s|ed|ing)?": "preempt",
    r"begins? alike|beginnings?": "share a prefix, prefix",
    r"lives": "attempt",
    r"tells?|told": "report, return, print, show",
    r"gather(s|ed)?|joins": "batch window",
    r"in force": "current, apply",
    r"retun(e|es|ed|ing)": "reconfigure",
    r"tak(e|es|en|ing) back|took back": "roll back",
    r"put(s|ting)? back": "restore",
    r"mend(s|ed|ing)?": "fix",
    r"hopeless": "infeasible",
    r"beliefs?": "estimate",
    r"contenders?": "candidate",
    r"dice": "rng",
    r"growing": "scaling out",
    r"brought by": "installed by",
}
PATTERN = re.compile(
    "|".join(rf"(\b(?:{term})\b)" for term in (re.sub(r"\((?!\?)", "(?:", one) for one in TERMS)), re.I
)


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, term and replacement of each replaced term in `text`."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in PATTERN.finditer(line):
            yield number, match[0], list(TERMS.values())[(match.lastindex or 1) - 1]


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "--", *FILES], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [
        f"{name}:{number}: '{term}': write {instead}"
        for name in listed.stdout.splitlines()
        if (path := ROOT / name).is_file() and path.suffix not in (".lock", ".png")
        for number, term, instead in found(path.read_text(encoding="utf-8"))
    ]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
