"""API keys: named, hashed at rest, each with its own limits, reloaded when their file changes."""

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
    """A caller. None means: no limit. `priority` is the key's share of a busy server relative to the others'.

    A `preemptible` one, for work that can wait, has what the others leave: theirs go first, and take its slots.
    """

    name: str
    sha256: str
    admin: bool = False
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # prompt and completion together, as in the next two
    tokens_per_day: int | None = None  # of the calendar, in UTC
    tokens_per_month: int | None = None
    max_concurrent: int | None = None
    models: list[str] | None = None
    expires: datetime.datetime | None = None
    priority: float = 1.0
    preemptible: bool = False

    @property
    def budgeted(self) -> bool:
        """Whether what it used before counts."""
        return self.tokens_per_day is not None or self.tokens_per_month is not None

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit needs to know a request's tokens beforehand."""
        return self.budgeted or self.tokens_per_minute is not None

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.datetime.now(datetime.UTC)


class Share(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """So many `servers` hold the keys' limits together; those from number `first`, from 0, are `here`, on this host."""

    servers: int = 1
    first: int = 0
    here: int = 1

    def __post_init__(self) -> None:
        if not (self.first >= 0 and 1 <= self.here <= self.servers - self.first):
            raise ValueError("share: first and here must be numbers of servers, of which there are as many as it says")


class KeysFile(Struct, forbid_unknown_fields=True):
    """What the file has."""

    keys: list[Key]
    share: Share = Share()


# Who calls when no keys are configured: anyone on this machine.
ANONYMOUS = Key(name="anonymous", sha256="", admin=False)


class KeyStore:
    """The keys of a file, read again when it changes. A file that has become unreadable leaves the old keys valid."""

    def __init__(self, path: Path, *, budgets: bool = True) -> None:
        """`budgets`: whether this server can hold keys to theirs. Raises KeysError when the file cannot be used."""
        self._path = path
        self._budgets = budgets
        self._version = self._file_version()
        self._file = self._read()
        self._warn_if_none()

    @property
    def share(self) -> Share:
        """This host's, of all keys' limits."""
        return self._file.share

    def find(self, token: str) -> Key | None:
        """The key that `token` is the secret of, whose time has not run out."""
        self._reload_if_changed()
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for key in self._file.keys:  # all of them, so that the time taken does not tell which one matched
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None or found.expired else found

    def holds(self, key: Key) -> bool:
        """Whether the key is still in the file, whatever its limits are now, and its time has not run out."""
        self._reload_if_changed()
        same = (one for one in self._file.keys if (one.name, one.sha256) == (key.name, key.sha256))
        return any(not one.expired for one in same)

    def _file_version(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        # Who writes a file may set its mtime, not its ctime.
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
            remedy = "set limits.usage_dir, where it is kept what was used"
            raise KeysError(f"{self._path}: key {key.name!r}: tokens_per_day and tokens_per_month: {remedy}")
        return file

    def _warn_if_none(self) -> None:
        if not self._file.keys:
            log.warning("no keys: every request is refused until `llamaherd-server keys add NAME` makes one")


def read_keys(path: Path, known_as: Path | None = None) -> KeysFile:
    """A file of keys, which errors call `known_as`; raises KeysError."""
    known_as = known_as or path
    try:
        table = tomllib.loads(path.read_text())
        if "keys" not in table:  # a file that is being written may be empty; `keys = []` is meant
            raise KeysError(f"{known_as}: no keys: make one with `llamaherd-server keys add NAME`")
        file = convert(table, KeysFile)
    except OSError as error:
        raise KeysError(f"{known_as}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise KeysError(f"{known_as}: {error}") from None
    for key in file.keys:
        _check(key, known_as)
    names = [key.name for key in file.keys]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise KeysError(f"{known_as}: two keys have the same name, {twice!r}")
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
