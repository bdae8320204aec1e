"""`python -m bench GROUP|all`: runs one group of benchmarks, or all of them."""

from __future__ import annotations

import importlib
import sys

from bench.table import write

# Groups and their modules.
GROUPS = {
    "serving": "serving",
    "hostbound": "hostbound",
    "speculative": "speculative",
    "frontend": "frontend",
    "edge": "edge",
    "client": "client_cost",
    "tuner": "tuner",
    "gain": "gain",
    "plays": "plays",
    "hostile": "hostile",
    "conversations": "conversations",
    "swap": "swap",
    "priorities": "priorities",
}


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    if wanted not in [*GROUPS, "all"]:
        sys.exit(f"bench: no group {wanted!r}; there is {', '.join(GROUPS)} or all")
    for name in GROUPS if wanted == "all" else [wanted]:
        write(name, importlib.import_module(f"bench.{GROUPS[name]}").run())


if __name__ == "__main__":
    main()
