"""Names of plays, tasks and handlers are a verb and its object, and can be read without the tasks around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.unit.conftest import ROOT

FILES = [
    *ROOT.glob("roles/*/tasks/*.yml"),
    *ROOT.glob("roles/*/handlers/*.yml"),
    *ROOT.glob("playbooks/*.yml"),
    *ROOT.glob("playbooks/tasks/*.yml"),
]
BLOCKS = ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks")
# A name begins with one of these; a new verb is added where none of them fits.
VERBS = frozenset(
    re.findall(
        r"\w+",
        "Activate Add Apply Ask Back Boot Bootstrap Build Change Check Clean Close Compile Compute Configure "
        "Connect Copy Create Deploy Download Drain Enable Fail Fetch Find Format Generate Grant Hold Import Install "
        "Link List Load Measure Mount Move Open Pack Print Publish Pull Quantize Read Receive Record Release "
        "Reload Remove Report Request Restart Restore Roll Route Run Select Serve Set Sign Stage Start Stop Store "
        "Swap Switch Test Tune Undrain Unload Unpack Update Upgrade Upload Verify Wait Warn Write",
    )
)
LEANING = re.compile(
    r"\b(it|its|itself|they|them|their|there|this|these|those|so|here|one|ones|what|who|whom|somebody|something)\b",
    re.I,
)


def entries(nodes: Any) -> Iterator[dict[str, Any]]:
    """Every play, block and task of a file's list, at any depth."""
    for node in nodes or []:
        yield node
        for key in BLOCKS:
            yield from entries(node.get(key))


def named() -> Iterator[tuple[str, str]]:
    """Path and name of every play, block, task and handler."""
    for path in FILES:
        for entry in entries(yaml.safe_load(path.read_text())):
            assert "name" in entry, f"{path.relative_to(ROOT)}: a task without a name: {entry}"
            yield str(path.relative_to(ROOT)), re.sub(r"\s*{{.*}}", "", entry["name"])


def test_every_name_begins_with_a_verb() -> None:
    assert [found for found in named() if found[1].split()[0].rstrip(",") not in VERBS] == []


def test_no_name_leans_on_the_tasks_around_it() -> None:
    assert [found for found in named() if LEANING.search(found[1]) or found[1].endswith(" that")] == []


def test_a_notified_handler_exists() -> None:
    handlers: set[str] = set()
    notified: dict[str, str] = {}
    for path in FILES:
        for entry in entries(yaml.safe_load(path.read_text())):
            if path.parent.name == "handlers":
                handlers |= {entry["name"], entry.get("listen", entry["name"])}
            for name in [notify] if isinstance(notify := entry.get("notify", []), str) else notify:
                notified[name] = str(path.relative_to(ROOT))
    assert len(notified) > 5
    assert {name: path for name, path in notified.items() if name not in handlers} == {}
