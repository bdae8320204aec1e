"""Writes each role's table of variables into its README, from its argument_specs.

What stands above the heading is written by hand; a role without a README gets one from what its argument_specs say.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from scripts.docs_pages import ROOT, sentence, table

HEADING = "## Variables"


def readme(role: Path) -> str:
    """The README that `role`, a folder, should have."""
    lines = []
    for entry in yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"].values():
        lines += [f"# {role.name}", "", f"{sentence(entry['short_description'])}.", ""]
        lines += [line for text in entry.get("description", []) for line in (sentence(text), "")]
        lines += [HEADING, "", *table(entry["options"])]
    path = role / "README.md"
    head = path.read_text().partition(HEADING)[0] if path.exists() else ""
    made = "\n".join(lines) + "\n"
    return head + HEADING + made.partition(HEADING)[2] if head else made


def roles() -> list[Path]:
    return sorted(path.parent.parent for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


if __name__ == "__main__":
    for role in roles():
        (role / "README.md").write_text(readme(role))
