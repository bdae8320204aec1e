"""Write report.html from a tuning job's folder."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamaherd_loadtest.files import write_whole
from llamaherd_loadtest.report import charts
from llamaherd_loadtest.tune.journal import read_steps
from llamaherd_loadtest.tune.settings import difference
from llamaherd_loadtest.tune.verdict import read_verdict

_pages = Environment(
    loader=PackageLoader("llamaherd_loadtest.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def write_report(folder: Path, page: Path) -> None:
    """Read `verdict.json` and `journal.jsonl` of `folder`, write the HTML file `page`.

    Raises ValueError where the folder does not hold a finished or interrupted tuning job.
    """
    verdict = read_verdict(folder / "verdict.json")
    steps = read_steps(folder / "journal.jsonl")
    html = _pages.get_template("page.html.j2").render(
        verdict=verdict,
        change=difference(verdict.current, verdict.chosen),
        charts=charts.draw(verdict, steps),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, html)
