"""API keys: named, stored as hashes, each with its own limits, reloaded when their file changes."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import tomllib
from pathlib import Path

import structlog
from msgspec import Struct, ValidationError, convert

log = structlog.get_logger()


class KeysError(Exception):
    """The keys file cannot be used; the message names the file and the reason."""


class Key(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An API key and its limits; None: no limit. `priority`: its share of a busy server relative to other keys.

    Requests of a `preemptible` key are for work that can wait: other keys' requests go first and take its slots.
    """

    name: str
    sha256: str
    admin: bool = False
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # prompt and completion together, as in the next two limits
    tokens_per_day: int | None = None  # calendar day in UTC
    tokens_per_month: int | None = None
    max_concurrent: int | None = None
    models: list[str] | None = None
    expires: datetime.datetime | None = None
    priority: float = 1.0
    preemptible: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether the key has a budget, against which earlier usage counts."""
        return self.tokens_per_day is not None or self.tokens_per_month is not None

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit needs an estimate of each request's tokens in advance."""
        return self.budgeted or self.tokens_per_minute is not None

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.datetime.now(datetime.UTC)


class Share(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the keys' limits are split among `servers`. This host runs `here` of them, from number `first` (0-based)."""

    servers: int = 1
    first: int = 0
    here: int = 1

    def __post_init__(self) -> None:
        if not (self.first >= 0 and 1 <= self.here <= self.servers - self.first):
            raise ValueError("share: first must be at least 0, here at least 1, and first + here at most servers")


class KeysFile(Struct, forbid_unknown_fields=True):
    """The contents of the keys file."""

    keys: list[Key]
    share: Share = Share()


# The caller without keys: the server is then reachable from this machine only.
ANONYMOUS = Key(name="anonymous", sha256="", admin=False)


class KeyStore:
    """The keys of a file, reloaded when it changes. If a reload fails, the old keys stay valid."""

    def __init__(self, path: Path, *, budgets: bool = True) -> None:
        """`budgets`: whether this server stores usage and so can enforce token budgets. Raises KeysError."""
        self._path = path
        self._budgets = budgets
        self._version = self._file_version()
        self._file = self._read()
        self._warn_if_none()

    @property
    def share(self) -> Share:
        """This host's share of all keys' limits."""
        return self._file.share

    def find(self, token: str) -> Key | None:
        """Return the unexpired key whose secret is `token`, or None."""
        self._reload_if_changed()
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for key in self._file.keys:  # no early exit, so that timing does not reveal which one matched
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None or found.expired else found

    def holds(self, key: Key) -> bool:
        """Return whether the key is still in the file, even with other limits, and has not expired."""
        self._reload_if_changed()
        same = (one for one in self._file.keys if (one.name, one.sha256) == (key.name, key.sha256))
        return any(not one.expired for one in same)

    def _file_version(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        # A writer can set a file's mtime, but not its ctime.
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino

    def _reload_if_changed(self) -> None:
        version = self._file_version()
        if version == self._version:
            return
        self._version = version
        self.reload()

    def reload(self) -> None:
        """Read the file now."""
        try:
            self._file = self._read()
        except KeysError as error:
            log.error("keys not reloaded", error=str(error))
        else:
            log.info("keys reloaded", count=len(self._file.keys))
            self._warn_if_none()

    def _read(self) -> KeysFile:
        file = read_keys(self._path)
        if not self._budgets and (key := next((key for key in file.keys if key.budgeted), None)):
            needed = "limits.usage_dir, where usage is stored: set it"
            raise KeysError(f"{self._path}: key {key.name!r}: tokens_per_day and tokens_per_month need {needed}")
        return file

    def _warn_if_none(self) -> None:
        if not self._file.keys:
            log.warning("no keys: every request is refused until `llamaherd-server keys add NAME` creates one")


def read_keys(path: Path, known_as: Path | None = None) -> KeysFile:
    """Read a keys file. Raises KeysError, with messages that name the file `known_as`."""
    known_as = known_as or path
    try:
        table = tomllib.loads(path.read_text())
        if "keys" not in table:  # may be a file that is still being written; `keys = []` is intentional
            raise KeysError(f"{known_as}: no keys: create one with `llamaherd-server keys add NAME`")
        file = convert(table, KeysFile)
    except OSError as error:
        raise KeysError(f"{known_as}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise KeysError(f"{known_as}: {error}") from None
    for key in file.keys:
        _check(key, known_as)
    names = [key.name for key in file.keys]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise KeysError(f"{known_as}: two keys have the same name, {duplicate!r}")
    return file


def _check(key: Key, path: Path) -> None:
    if len(key.sha256) != 64 or not set(key.sha256) <= set("0123456789abcdef"):
        raise KeysError(f"{path}: key {key.name!r}: sha256 must be 64 lower-case hex digits (sha256sum of the secret)")
    if key.expires is not None and key.expires.tzinfo is None:
        raise KeysError(f"{path}: key {key.name!r}: expires needs a time zone, as in 2027-01-31T00:00:00Z")
    if not 0.01 <= key.priority <= 100:
        raise KeysError(f"{path}: key {key.name!r}: priority {key.priority} must be between 0.01 and 100")
    for name in ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "tokens_per_month", "max_concurrent"):
        if (value := getattr(key, name)) is not None and value <= 0:
            raise KeysError(f"{path}: key {key.name!r}: {name} {value} must be above 0")
