"""Writes requirements, an example play and the table of variables into each role's README, from its meta directory.

Text above the first of these headings is kept. In a new README, it comes from argument_specs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scripts.docs_pages import ROOT, sentence, table

HEADING = "## Requirements"
# Hosts of the example plays that do not run on group inference.
HOSTS = {
    "bundle": "inference:edge",
    "common": "all",
    "lab": "localhost",
    "monitoring": "monitoring",
    "nginx": "inference:edge",
    "open_webui": "chat",
    "preflight": "inference:edge",
    "rpc": "rpc",
    "status": "inference:edge",
    "verify": "inference:edge",
}


def readme(role: Path) -> str:
    """Return the README of `role`, a directory."""
    lines: list[str] = []
    for entry in yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"].values():
        lines += [f"# {role.name}", "", f"{sentence(entry['short_description'])}.", ""]
        lines += [line for text in entry.get("description", []) for line in (sentence(text), "")]
        lines += [*requirements(role), "## Variables", "", *table(entry["options"])]
    path = role / "README.md"
    head = path.read_text().partition(HEADING)[0] if path.exists() else ""
    made = "\n".join(lines) + "\n"
    return head + HEADING + made.partition(HEADING)[2] if head else made


def requirements(role: Path) -> list[str]:
    """Return the requirements of the role and an example play."""
    meta: dict[str, Any] = yaml.safe_load((role / "meta/main.yml").read_text())
    info = meta["galaxy_info"]
    platforms = (f"{one['name']} ({', '.join(one['versions'])})" for one in info["platforms"])
    collections = yaml.safe_load((ROOT / "galaxy.yml").read_text())["dependencies"]
    needs = [
        f"- ansible-core {info['min_ansible_version']} or newer on the controller",
        f"- the collections {', '.join(f'`{name}` {version}' for name, version in collections.items())}",
        f"- a host with {' or '.join(platforms)}; [docs/support.md](../../docs/support.md) says which were tested",
    ]
    if depends := [f"`{one['role']}`" for one in meta.get("dependencies", [])]:
        needs.append(f"- the role {', '.join(depends)}, which runs first by itself")
    play = [
        f"- hosts: {HOSTS.get(role.name, 'inference')}",
        "  gather_facts: false",
        *([] if role.name == "lab" else ["  become: true"]),
        "  roles:",
        f"    - role: llamaherd.llamaherd.{role.name}",
    ]
    return [HEADING, "", *needs, "", "## Example", "", "```yaml", *play, "```", ""]


def roles() -> list[Path]:
    return sorted(path.parent.parent for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


if __name__ == "__main__":
    for role in roles():
        (role / "README.md").write_text(readme(role))
