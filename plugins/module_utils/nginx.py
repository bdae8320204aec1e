"""Finds the nginx sites of a host that llamaherd does not own."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_CONFIGURATION = Path("/etc/nginx/nginx.conf")
_BEFORE = Path("/etc/nginx/nginx.conf.before-llamaherd")
_OURS = "/etc/nginx/llamaherd/"
_LISTEN = re.compile(r"(?:^|[{;])\s*listen\s+(unix:)?(?:\S*:)?(?:(\d+)(?=[\s;]))?", re.MULTILINE)


def nginx(root: Path = Path("/")) -> dict[str, Any]:
    """Return the sites other than llamaherd's, and why nginx rejects the configuration.

    sites: [{path, listens [{line, port}]}], the files in conf.d and sites-enabled except the distribution's own, and
    nginx.conf if it has a server of its own. complaint: the error of `nginx -t`, unless it is in a file of llamaherd.
    """
    folder = root / "etc/nginx"
    packaged = _packaged(root)
    paths = [*folder.glob("conf.d/*.conf"), *folder.glob("sites-enabled/*")]
    main = root / _CONFIGURATION.relative_to("/")
    ours = (root / _BEFORE.relative_to("/")).exists()
    if not ours and main.exists() and _listens(main):
        paths.append(main)
    sites = [
        {"path": f"/{path.relative_to(root)}", "listens": _listens(path)}
        for path in sorted(paths)
        if path.is_file() and not _is_packaged(path, root, packaged)
    ]
    complaint = _complaint() if root == Path("/") else ""
    if ours and (_OURS in complaint or f"{_CONFIGURATION}:" in complaint):
        complaint = ""
    return {"sites": sites, "complaint": complaint}


def _listens(path: Path) -> list[dict[str, int]]:
    text = re.sub("#.*", "", path.read_text(errors="replace"))
    return [
        {"line": text.count("\n", 0, found.end()) + 1, "port": int(found.group(2) or 80)}
        for found in _LISTEN.finditer(text)
        if not found.group(1)
    ]


def _packaged(root: Path) -> dict[str, str]:
    """Return the configuration files of dpkg's packages in /etc/nginx with their MD5 sums."""
    try:
        status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^ (/etc/nginx/\S+) ([0-9a-f]{32})$", status, re.MULTILINE))


def _is_packaged(path: Path, root: Path, packaged: dict[str, str]) -> bool:
    """Whether the file is unchanged from a package of the distribution."""
    file = path.resolve()
    if packaged:
        name = f"/{file.relative_to(root.resolve())}" if file.is_relative_to(root.resolve()) else str(file)
        return packaged.get(name) == hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    if shutil.which("rpm") is None:
        return False
    done = _run("rpm", "-Vf", str(file))
    changed = re.search(rf"^..5\S*\s+(?:\w\s+)?{re.escape(str(file))}$", done.stdout, re.MULTILINE)
    return "not owned by any package" not in done.stdout + done.stderr and changed is None


def _complaint() -> str:
    if shutil.which("nginx") is None:
        return ""
    done = _run("nginx", "-t")
    found = re.findall(r"\[emerg\](?: \d+#\d+:)? (.*)", done.stderr)
    return (found or done.stderr.splitlines() or ["nginx -t fails"])[0] if done.returncode else ""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    # There is no AnsibleModule here for its run_command. pylint: disable-next=ansible-bad-function
    return subprocess.run(command, capture_output=True, text=True, check=False)
