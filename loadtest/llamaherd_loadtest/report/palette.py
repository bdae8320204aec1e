"""Renders Matplotlib figures as inline SVG in the page's CSS variables, so that they follow light and dark mode."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Placeholders that no default palette uses; each becomes var(--name).
PALETTE = {
    "fg": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    "chosen": "#010206",
    "current": "#010207",
    "miss": "#010208",
}

# Used while charts are drawn: `with mpl.rc_context(STYLE)`.
STYLE = {
    "svg.fonttype": "none",  # keeps text selectable and in the page's font
    "svg.hashsalt": "llamaherd",
    "font.size": 11,
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["fg"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": PALETTE["grid"],
    "text.color": PALETTE["fg"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["fg"],
    "ytick.labelcolor": PALETTE["fg"],
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.0,
    "lines.linewidth": 1.8,
}


def figure(panels: int = 1, height: float = 3.0) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, stacked; five inches wide, so that its text is legible on a phone."""
    drawn = Figure(figsize=(5, height * panels), layout="constrained")
    return drawn, list(drawn.subplots(panels, 1, squeeze=False)[:, 0])


def in_ms(axes: Any, side: Literal["x", "y"], label: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic, so that `values` and a limit ten times as high can both be read."""
    low, high = min(values) / 1.3, max(values) * 1.3
    middle = math.sqrt(low * high)  # at least two ticks: of 1, 2, 5 times powers of ten, any span of 6.25 holds two
    ends = (min(low, middle / 2.5), max(high, middle * 2.5))
    axes.set(**{f"{side}scale": "log", f"{side}label": f"{label}, ms", f"{side}lim": ends})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def legend_above(axes: Any, columns: int) -> None:
    """Place the legend above the panel, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.12, 1.0), ncols=columns)


def to_svg(drawn: Any, description: str) -> str:
    """Return the figure as an `svg` element that scales with the page; `description` is for screen readers."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
