"""Filters of the llamaherd roles."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tree_hash(root: str) -> str:
    """The sha256 of all files under `root` with their relative names, less what tools leave behind."""
    found = hashlib.sha256()
    base = Path(root)
    for path in sorted(base.rglob("*")):
        parts = path.relative_to(base).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            found.update(f"{'/'.join(parts)}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def to_toml(table: Mapping[str, Any]) -> str:
    """The lines of one flat TOML table: strings, numbers and booleans. JSON writes them as TOML does, but for DEL."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    return "\n".join(lines).replace("\x7f", "\\u007f")


def gib(size: float) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def shell_split(line: str) -> list[str]:
    """The words of a shell command line."""
    return shlex.split(line)


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"tree_hash": tree_hash, "to_toml": to_toml, "gib": gib, "shell_split": shell_split}
