"""The files of this checkout as git would list them, in an archive without .git and in another user's checkout too."""

from __future__ import annotations

from pathlib import Path

from pathspec import GitIgnoreSpec

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[Path]:
    """Relative to the root, by name: what .gitignore does not leave out."""
    ignored = GitIgnoreSpec.from_lines([*(ROOT / ".gitignore").read_text().splitlines(), ".git"])
    return sorted(map(Path, ignored.match_tree_files(ROOT, negate=True, follow_links=False)))
