"""Token usage of each key by day and model: counted in memory and persisted in a small SQLite database.

Servers on one host with the same folder add to the same rows. The event loop only adds numbers; a thread reads and
writes the database.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from operator import add
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import structlog

from llamaherd_server.errors import ApiError
from llamaherd_server.serving.meter import Usage

log = structlog.get_logger()
P = ParamSpec("P")
T = TypeVar("T")

TICK_S = 0.5  # interval of writes: a killed server loses at most this much usage
_BUSY_S = 5.0  # how long to wait for another server's write
_CREATE = """
    CREATE TABLE IF NOT EXISTS usage (
        day TEXT, key TEXT, model TEXT,
        requests INTEGER, prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER,
        PRIMARY KEY (day, key, model)
    ) WITHOUT ROWID
"""
_ADD = """
    INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
        requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens
"""
_SUM = "SELECT day, key, sum(prompt_tokens + completion_tokens) FROM usage WHERE day >= ? GROUP BY day, key"
_FIND = "SELECT * FROM usage WHERE day BETWEEN ? AND ? AND ifnull(?, key) = key AND ifnull(?, model) = model"


class Row(NamedTuple):
    """Key of a row. `day` is in UTC, such as 2026-01-31."""

    day: str
    key: str
    model: str


class Counts(NamedTuple):
    """Usage of a row. A request counts once it has used tokens. `prompt_tokens` includes cached ones."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that count towards budgets."""
        return self.prompt_tokens + self.completion_tokens


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(slots=True, eq=False)
class Account:
    """A running request. `counted`: the part of its usage in the ledger; `reserved`: tokens reserved for it."""

    key: str
    model: str
    usage: Usage
    reserved: float
    counted: Counts = field(default_factory=Counts)

    def uncounted(self) -> Counts | None:
        usage = self.usage
        begun = usage.prompt_tokens + usage.completion_tokens > 0
        whole = Counts(int(begun), usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        if whole == self.counted:
            return None
        before, self.counted = self.counted, whole
        return Counts(*(new - old for new, old in zip(whole, before, strict=True)))


class Ledger:
    """Usage of all keys. `folder` None keeps it in memory only. Rows older than `days` days are deleted.

    Call `start` first. `readable`: whether the usage before this process started is known.
    """

    def __init__(
        self, folder: Path | None, days: int, clock: Callable[[], datetime.datetime] = now, tick_s: float = TICK_S
    ) -> None:
        self.folder = folder
        self.readable = False
        self._days = days
        self.clock = clock
        self._tick_s = tick_s
        self._open: set[Account] = set()
        self._unwritten: dict[Row, Counts] = {}
        self._used: Counter[tuple[str, str]] = Counter()  # this month's tokens by day and key, written or not
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._lock = asyncio.Lock()
        self._database: sqlite3.Connection | None = None
        self._version = -1  # SQLite's data_version, which changes when another server writes
        self._day = ""  # when old rows were last deleted
        self._failed = False

    @contextmanager
    def account(self, key: str, model: str, usage: Usage, reserved: float) -> Iterator[None]:
        """Count the usage of a request while it runs, and at its end."""
        account = Account(key, model, usage, reserved)
        self._open.add(account)
        try:
            yield
        finally:
            self._count((account,))
            self._open.discard(account)

    def used(self, key: str) -> tuple[float, float]:
        """Return the key's tokens today and this month, including those that its running requests may still use."""
        self._count(self._open)
        today = self._today()
        month = sum(tokens for (day, name), tokens in self._used.items() if name == key and day[:7] == today[:7])
        running = sum(max(0, one.reserved - one.usage.tokens) for one in self._open if one.key == key)
        return self._used[today, key] + running, month + running

    async def start(self) -> None:
        """Read the usage so far; waits for a slow disk for _BUSY_S at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_BUSY_S):
                await asyncio.shield(self.flush())

    async def run(self) -> None:
        """Write the counts every `tick_s`, until cancelled."""
        while True:
            await asyncio.shield(self.flush())  # the writing thread cannot be cancelled
            await asyncio.sleep(self._tick_s)

    async def flush(self) -> None:
        """Write the counts so far. If that fails, log it once and keep them for the next attempt."""
        async with self._lock:
            await self._flush()

    async def read(
        self, *, key: str | None = None, model: str | None = None, first: str = "", last: str = "9"
    ) -> list[tuple[Row, Counts]]:
        """Return the sorted rows from day `first` to `last`, of one or all keys and models; raises ApiError."""
        async with self._lock:
            await self._flush()
            try:
                written = await self._on_thread(self._rows, first, last, key, model)
            except (OSError, sqlite3.Error):
                message = "usage cannot be read now; see the server's log"
                raise ApiError(503, message, code="usage_unreadable", retry_after=5) from None
            for row, counts in self._unwritten.items():
                if first <= row.day <= last and key in (None, row.key) and model in (None, row.model):
                    written[row] = _sum(written.get(row), counts)
        return sorted(written.items())

    async def close(self) -> None:
        await self.flush()
        await self._on_thread(self._close)
        self._thread.shutdown()

    def _today(self) -> str:
        return self.clock().date().isoformat()

    def _count(self, accounts: Iterable[Account]) -> None:
        today = self._today()
        for account in accounts:
            if counts := account.uncounted():
                row = Row(today, account.key, account.model)
                self._unwritten[row] = _sum(self._unwritten.get(row), counts)
                self._used[today, account.key] += counts.tokens

    async def _flush(self) -> None:
        self._count(self._open)
        batch, self._unwritten = self._unwritten, {}
        try:
            written = await self._on_thread(self._write, batch)
        except (OSError, sqlite3.Error) as error:
            self._keep(batch)
            if not self._failed:
                where = self.folder and self.folder / "usage.db"
                log.error("usage is counted in memory until it can be written", file=str(where), error=str(error))
            self._failed = True
            return
        if self._failed:
            log.info("usage is written again")
        self._failed, self.readable = False, True
        if written is not None:
            self._used = Counter(written)
            for row, counts in self._unwritten.items():
                self._used[row.day, row.key] += counts.tokens

    def _keep(self, batch: Mapping[Row, Counts]) -> None:
        for row, counts in batch.items():
            self._unwritten[row] = _sum(self._unwritten.get(row), counts)

    async def _on_thread(self, work: Callable[P, T], *args: P.args, **_: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # These run on the thread.

    def _write(self, batch: Mapping[Row, Counts]) -> dict[tuple[str, str], int] | None:
        """Write the batch; return this month's tokens by day and key if the day or another server's rows changed."""
        database = self._database or self._connect()
        today = self._today()
        with database:
            if self._day != today:
                oldest = self.clock().date() - datetime.timedelta(self._days)
                database.execute("DELETE FROM usage WHERE day < ?", (oldest.isoformat(),))
            if batch:
                database.executemany(_ADD, [(*row, *counts) for row, counts in batch.items()])
        version = database.execute("PRAGMA data_version").fetchone()[0]
        if (version, today) == (self._version, self._day):
            return None
        sums = {(day, key): tokens for day, key, tokens in database.execute(_SUM, (f"{today[:7]}-01",))}
        self._version, self._day = version, today
        return sums

    def _rows(self, first: str, last: str, key: str | None, model: str | None) -> dict[Row, Counts]:
        found = (self._database or self._connect()).execute(_FIND, (first, last, key, model))
        return {Row(*row[:3]): Counts(*row[3:]) for row in found}

    def _connect(self) -> sqlite3.Connection:
        path = ":memory:"
        if self.folder:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = str(self.folder / "usage.db")
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(_CREATE)
        except BaseException:
            database.close()
            raise
        self._database = database
        return database

    def _close(self) -> None:
        if self._database:
            with closing(self._database):
                self._database = None


def _sum(one: Counts | None, other: Counts) -> Counts:
    return Counts(*map(add, one, other)) if one else other
