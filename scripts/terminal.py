"""Draws the end of `make demo` as a terminal: docs/images/demo.svg, from demo/recorded.json with the demo's own code.

`python -m scripts.terminal` writes it; with `--check` it fails if the drawing is stale. With `--record` it first
updates the recording from build/demo.json of the last `make demo`, without the key and this machine's paths.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from demo.show import summary

ROOT = Path(__file__).resolve().parents[1]
RECORDED, PICTURE = ROOT / "demo/recorded.json", ROOT / "docs/images/demo.svg"
COLUMNS = 112
# Rich's own format loads its font from another host.
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>The end of make demo: the settings measured, the choice, the time each stage took, a curl line</title>
<style>.{unique_id}-matrix{{font-family:monospace;font-size:{char_height}px;line-height:{line_height}px}}{styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def record() -> None:
    text = (ROOT / "build/demo.json").read_text().replace(str(ROOT), "~/llamaherd")
    RECORDED.write_text(json.dumps(json.loads(text) | {"key": ""}, indent=2, ensure_ascii=False) + "\n")


def drawing() -> str:
    """Return the SVG."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text("$ make demo", style="bold"), Text("…", style="dim"))
        console.print(Text(summary(json.loads(RECORDED.read_text()))))
        svg = console.export_svg(title="make demo", code_format=FORMAT, unique_id="demo")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    if sys.argv[1:] == ["--check"]:
        if PICTURE.read_text() != drawing():
            sys.exit("docs/images/demo.svg is stale: run python -m scripts.terminal")
    else:
        PICTURE.write_text(drawing())
