"""Debian's Prometheus, the rules as their role renders them, and the dashboard's queries."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jinja2
import yaml

from tests.debian import need
from tests.server.conftest import START_S, free_port, wait_ready

ROLE = Path(__file__).resolve().parents[2] / "roles/monitoring"
TEMPLATE = "ansible.builtin.template"
Query = Callable[
    [str], list[dict[str, Any]]
]  # PromQL to samples: a `metric` with its labels, a `value` of time and text


def rules() -> str:
    """The rules with the role's defaults, by the marks of the task that writes them."""
    [task] = [task for task in yaml.safe_load((ROLE / "tasks/config.yml").read_text()) if "rules" in task["name"]]
    marks: dict[str, Any] = {name: value for name, value in task[TEMPLATE].items() if name.endswith("_string")}
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, **marks)  # noqa: S701 (no HTML)
    template = environment.from_string((ROLE / "templates/rules.yml.j2").read_text())
    return template.render(yaml.safe_load((ROLE / "defaults/main.yml").read_text()), ansible_managed="rules")


@contextmanager
def scraping(folder: Path, target: str) -> Iterator[Query]:
    """A Prometheus with our rules that reads `target`, host and port, every second."""
    (folder / "rules.yml").write_text(rules())
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "llamaherd", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        need("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={url.removeprefix('http://')}"], stderr=log)
    try:
        wait_ready("Prometheus", f"{url}/-/ready", process, folder / "prometheus.log")
        yield lambda query: samples(httpx.post(f"{url}/api/v1/query", data={"query": query}).text)
    finally:
        process.terminate()
        process.wait(START_S)


def samples(answer: str) -> list[dict[str, Any]]:
    """The samples with a finite value of /api/v1/query's answer; a query that Prometheus refuses fails the test."""
    told = json.loads(answer)
    assert told["status"] == "success", told
    found: list[dict[str, Any]] = told["data"]["result"]
    return [sample for sample in found if math.isfinite(float(sample["value"][1]))]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROLE / "files/llamaherd.json").read_text())
    return found


def panel_queries() -> list[tuple[str, str]]:
    """Each panel's title and one of its queries, as Grafana sends it when `All` is chosen everywhere."""
    chosen = {one["name"]: one["allValue"] for one in dashboard()["templating"]["list"] if "allValue" in one}
    # What Grafana takes for a scrape every 15 s: four of them.
    chosen["__rate_interval"] = "1m"
    return [
        (panel["title"], re.sub(r"\$(\w+)", lambda name: chosen[name[1]], target["expr"]))
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    ]


def without_data(query: Query, queries: list[tuple[str, str]], timeout_s: float) -> list[tuple[str, str]]:
    """Those of the queries that have not returned data when the time is up."""
    deadline = time.monotonic() + timeout_s
    while queries and time.monotonic() < deadline:
        queries = [one for one in queries if not query(one[1])]
        time.sleep(0.5)
    return queries
