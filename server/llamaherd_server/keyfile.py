"""`llamaherd-server keys add|list|revoke`: edits keys.toml atomically; a running server reloads it.

Comments and order are preserved: a key's table is appended at the end of the file, and cut out of it on revocation.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import convert
from msgspec.structs import asdict, fields

from llamaherd_server.config.keys import Key, KeysError, read_keys

# A key's table, with the comment lines right above it.
_TABLE = re.compile(r"(?:^[ \t]*#[^\n]*\n)*^[ \t]*\[\[[ \t]*keys[ \t]*\]\]", re.MULTILINE)
# Replaces the table of the last key when it is revoked.
_NONE = "keys = []\n"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DEFAULTS = {field.name: field.default for field in fields(Key)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `keys` to the parser."""
    parser.add_argument("--file", type=Path, help="keys.toml (default: auth.keys_file of the settings)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    adding = verbs.add_parser("add", help="create a key, print it once, and store its hash")
    adding.add_argument("name", help="appears in logs and metrics")
    adding.add_argument("--admin", action="store_true", help="may use /admin")
    adding.add_argument("--requests-per-minute", type=float, metavar="N")
    adding.add_argument("--tokens-per-minute", type=float, metavar="N", help="prompt and completion together")
    adding.add_argument("--tokens-per-day", type=int, metavar="N", help="budget per day (UTC)")
    adding.add_argument("--tokens-per-month", type=int, metavar="N", help="budget per month (UTC)")
    adding.add_argument("--max-concurrent", type=int, metavar="N", help="concurrent requests")
    adding.add_argument("--model", action="append", dest="models", help="allow only this model; repeat for more")
    adding.add_argument("--expires", type=_time, metavar="TIME", help="ISO 8601; UTC if no time zone is given")
    adding.add_argument("--priority", type=float, default=1.0, help="share of a busy server (default: %(default)s)")
    adding.add_argument("--preemptible", action="store_true", help="its requests give up their slots to other keys'")
    verbs.add_parser("list", help="names and limits; neither keys nor hashes")
    revoking = verbs.add_parser("revoke", help="remove a key")
    revoking.add_argument("name")


def run(arguments: argparse.Namespace, path: Path) -> None:
    """Run the command on the keys file `path`; raises KeysError and leaves the file unchanged if that fails."""
    if arguments.verb == "list":
        sys.stdout.write(_table(read_keys(path).keys))
    elif arguments.verb == "revoke":
        revoke(path, arguments.name)
    else:
        values = {name: value for name, value in vars(arguments).items() if name in _DEFAULTS}
        sys.stdout.write(f"{add(path, values)}\n")


def add(path: Path, values: dict[str, Any]) -> str:
    """Add a key with these fields of config.keys.Key, without its hash; return the secret, which is not stored."""
    name = values["name"]
    if not _NAME.fullmatch(name):
        raise KeysError(f"key name {name!r}: use up to 64 letters, digits, dots, dashes and underscores")
    secret = f"lh-{secrets.token_urlsafe(32)}"
    key = convert({**values, "sha256": hashlib.sha256(secret.encode()).hexdigest()}, Key)
    lines = [f"{name} = {_toml(value)}" for name, value in asdict(key).items() if value != _DEFAULTS[name]]
    with _replaced(path) as text:
        table = "\n".join(["[[keys]]", *lines, ""])
        text.append(f"{text.pop().replace(_NONE, '').rstrip()}\n\n{table}".lstrip())
    return secret


def revoke(path: Path, name: str) -> None:
    """Remove the key of this name from the file."""
    with _replaced(path) as text:
        whole = text.pop()
        starts = [match.start() for match in _TABLE.finditer(whole)]
        for start, end in zip(starts, [*starts[1:], len(whole)], strict=True):
            if tomllib.loads(whole[start:end])["keys"][0].get("name") == name:
                text.append(whole[:start] + whole[end:] if len(starts) > 1 else f"{_NONE}{whole[:start]}{whole[end:]}")
                return
        available = ", ".join(key.name for key in read_keys(path).keys) or "none"
        raise KeysError(f"{path}: unknown key {name!r}; available: {available}")


@contextmanager
def _replaced(path: Path) -> Iterator[list[str]]:
    """Yield the file's text to change in place; replace the file if the result is valid. Locks out other writers."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = path.stat() if path.exists() else None
        text = [path.read_text() if before else ""]
        yield text
        handle, written = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write("".join(text))
                file.flush()
                if before:
                    os.fchmod(handle, before.st_mode & 0o7777)
                    os.fchown(handle, before.st_uid, before.st_gid)
                os.fsync(handle)
            read_keys(Path(written), known_as=path)
            Path(written).replace(path)
        except BaseException:
            Path(written).unlink()
            raise
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KeysError(f"{path}: {error}") from None
    finally:
        os.close(folder)


def _table(keys: list[Key]) -> str:
    rows = [[name.replace("_", " ") for name in _DEFAULTS if name != "sha256"]]
    rows += [[_cell(value) for name, value in asdict(key).items() if name != "sha256"] for key in keys]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(value)
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False)  # also valid TOML for strings, numbers, booleans and lists of them


def _time(text: str) -> datetime.datetime:
    time = datetime.datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
