"""Writes report.html from the folder of a tuning job or a load test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamaherd_loadtest.files import write_whole
from llamaherd_loadtest.report import charts, load_test
from llamaherd_loadtest.tune.journal import read_steps
from llamaherd_loadtest.tune.settings import difference
from llamaherd_loadtest.tune.verdict import read_verdict

_pages = Environment(
    loader=PackageLoader("llamaherd_loadtest.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def write_report(folder: Path, page: Path, about: Mapping[str, str] | None = None) -> None:
    """Read what a tuning job (`verdict.json`, `journal.jsonl`) or a load test (`summary.json`, `samples.jsonl`) left in
    `folder` and write the HTML file `page`. `about` holds facts about the host that a load test cannot know.

    Raises ValueError if the folder holds neither a finished or interrupted tuning job nor a load test.
    """
    if (folder / "summary.json").exists():
        template, context = "load.html.j2", load_test.context(folder, about or {})
    else:
        verdict = read_verdict(folder / "verdict.json")
        steps = read_steps(folder / "journal.jsonl")
        template = "page.html.j2"
        context = {
            "title": f"Tuning report: {verdict.provenance['model']['name']}",  # type: ignore[index]
            "verdict": verdict,
            "change": difference(verdict.current, verdict.chosen),
            "charts": charts.draw(verdict, steps),
            "facts": {name: value for name, value in verdict.provenance.items() if name != "command"},
        }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, _pages.get_template(template).render(context))
