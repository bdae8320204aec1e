"""The dashboard: every panel's query, asked of a real Prometheus that reads a real server under load."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx
import pytest

from tests.monitoring.prometheus import dashboard, panel_queries, scraping, without_data
from tests.server.conftest import Server, running

pytestmark = pytest.mark.needs("prometheus")

KEYS = {"team-a": "sk-a", "team-b": "sk-b"}
# Of nginx, hosts and certificates; tests/lab/test_monitoring.py asks them of a host that was deployed.
ELSEWHERE = re.compile(r"\b(nginx_|node_|probe_|instance_listener:)")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    keys = "\n".join(
        f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"'
        for name, secret in KEYS.items()
    )
    (tmp_path / "keys.toml").write_text(keys)
    with running(tmp_path, auth={"keys_file": str(tmp_path / "keys.toml")}) as server:
        yield server


@contextmanager
def loaded(server: Server) -> Iterator[Counter[str]]:
    """More requests than slots while the block lasts; then, by key, how many tokens the answers told of."""
    over, tokens = Event(), Counter[str]()

    def client(name: str) -> Counter[str]:
        told = Counter[str]()
        with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEYS[name]}"}, timeout=60) as http:
            while not over.is_set():
                body = {"prompt": "One, two, three,", "max_tokens": 24}
                told[name] += (
                    http.post("/v1/completions", json=body).raise_for_status().json()["usage"]["completion_tokens"]
                )
                assert http.get("/v1/models", headers={"Authorization": "Bearer no-key"}).status_code == 401
        return told

    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(client, name) for name in [*KEYS, *KEYS]]
        try:
            yield tokens
        finally:
            over.set()
        for one in clients:
            tokens += one.result()


def test_every_panel_shows_data_of_a_loaded_server(server: Server, tmp_path: Path) -> None:
    queries = [one for one in panel_queries() if not ELSEWHERE.search(one[1])]
    assert len(queries) > 20
    with scraping(tmp_path, server.url.removeprefix("http://")) as query:
        with loaded(server) as tokens:
            assert without_data(query, queries, 60) == []
            by_key = dict(panel_queries())["Tokens/s by key and model"]
            assert {one["metric"]["key"] for one in query(by_key) if float(one["value"][1]) > 0} == set(KEYS)
        said = {(name, "smollm2"): count for name, count in tokens.items()}

        def counted() -> dict[tuple[str, str], float]:
            found = query("llamaherd_output_tokens_sum")
            return {(one["metric"]["key"], one["metric"]["model"]): float(one["value"][1]) for one in found}

        while counted() != said:  # at the next scrape; the test's own timeout ends a wait in vain
            pass


def test_the_panels_stand_beside_each_other() -> None:
    cells = Counter[tuple[int, int]]()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells.update(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
    assert set(cells.values()) == {1}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_a_panel_names_no_data_source_of_its_own() -> None:
    for panel in dashboard()["panels"]:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
