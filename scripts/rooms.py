"""Draws the packages of the server and their imports, as found in the code: docs/images/rooms.svg.

`python -m scripts.rooms` writes it; with `--check` it fails if the drawing is stale. The layers are those of
import-linter in pyproject.toml.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/images/rooms.svg"
PACKAGE = "llamaherd_server"
WIDTH, FLOOR, BOX_WIDTH, BOX_HEIGHT = 620, 64, 150, 36


def floors() -> list[list[str]]:
    """Return the packages by layer, the topmost first."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    return [[name.strip().removeprefix(f"{PACKAGE}.") for name in layer.split("|")] for layer in contract["layers"]]


def imports(rooms: set[str]) -> set[tuple[str, str]]:
    """Return pairs of packages of which the first imports the second, without those implied by other pairs."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules - {PACKAGE}:
        room = module.split(".")[1]
        names = (name.split(".") for name in graph.find_modules_directly_imported_by(module))
        found[room] |= {name[1] for name in names if len(name) > 1 and name[1] != room}

    def reached(room: str) -> set[str]:
        return found[room].union(*map(reached, found[room]))

    return {(room, one) for room, below in found.items() for one in below.difference(*map(reached, below))}


def drawing() -> str:
    """Return the SVG."""
    plan = floors()
    places = {
        room: (WIDTH * (2 * column + 1) // (2 * len(rooms)), FLOOR * row + FLOOR // 2)
        for row, rooms in enumerate(plan)
        for column, room in enumerate(rooms)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {FLOOR * len(plan)}" font-family="sans-serif" '
        'font-size="14" text-anchor="middle"><style>rect{fill:#fff;stroke:#345}path{fill:none;stroke:#678;'
        "stroke-width:1.5}text{fill:#123}</style><title>What each room of the server imports</title>"
    ]
    for number, (source, target) in enumerate(sorted(imports({*places}))):
        (x1, y1), (x2, y2) = places[source], places[target]
        bend = 150 * (-1 if number % 2 else 1) * (y2 - y1 > FLOOR and x1 == x2)
        start, end = y1 + BOX_HEIGHT // 2, y2 - BOX_HEIGHT // 2
        lines.append(
            f'<path d="M{x1} {start}C{x1 + bend} {start + 30} {x2 + bend} {end - 30} {x2} {end}">'
            f"<title>{source} imports {target}</title></path>"
        )
    for room, (x, y) in places.items():
        name = f"{room}.py" if (ROOT / "server" / PACKAGE / f"{room}.py").exists() else f"{room}/"
        left, top = x - BOX_WIDTH // 2, y - BOX_HEIGHT // 2
        lines.append(f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>')
        lines.append(f'<text x="{x}" y="{y + 5}">{name}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    made = drawing()
    if "--check" in sys.argv:
        sys.exit(None if PICTURE.exists() and PICTURE.read_text() == made else "stale: run python -m scripts.rooms")
    PICTURE.write_text(made)
