"""The ledger with a clock of its own: days, months, other servers' rows, files."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from llamaherd_server.config.keys import Key
from llamaherd_server.config.share import Part
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.budget import check_budget
from llamaherd_server.serving.ledger import Counts, Ledger, Row
from llamaherd_server.serving.meter import Usage
from llamaherd_server.serving.quota import SHARE_HEADER

WHOLE = Part(servers=1, server=0, here=1)


class Clock:
    now = datetime.datetime(2026, 1, 31, 23, 59, 30, tzinfo=datetime.UTC)

    def __call__(self) -> datetime.datetime:
        return self.now


def used(ledger: Ledger, tokens: int, key: str = "k") -> None:
    with ledger.account(key, "m", Usage(prompt_tokens=tokens), 0):
        pass


async def test_it_is_kept_over_restarts_for_the_service_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    for _ in range(2):
        ledger = Ledger(folder, 400)
        used(ledger, 3)
        await ledger.flush()
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        await ledger.close()
    again = Ledger(folder, 400)
    ((_, counts),) = await again.read()
    assert counts == Counts(2, 6, 0, 0)
    assert folder.stat().st_mode & 0o777 == 0o700
    await again.close()


async def test_a_request_over_midnight_counts_in_both_days(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, 400, clock)
    usage = Usage(prompt_tokens=5, completion_tokens=1)
    with ledger.account("k", "m", usage, 100):
        await ledger.flush()
        assert ledger.used("k") == (100, 100)
        clock.now += datetime.timedelta(minutes=1)
        usage.completion_tokens = 11
        assert ledger.used("k") == (94, 94)
    assert await ledger.read() == [
        (Row("2026-01-31", "k", "m"), Counts(1, 5, 0, 1)),
        (Row("2026-02-01", "k", "m"), Counts(0, 0, 0, 10)),
    ]
    assert await ledger.read(last="2026-01-31") == [(Row("2026-01-31", "k", "m"), Counts(1, 5, 0, 1))]
    await ledger.close()


async def test_old_rows_go(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, 31, clock)
    days = []
    for _ in range(3):
        used(ledger, 1)
        await ledger.flush()
        days.append([row.day for row, _ in await ledger.read()])
        clock.now += datetime.timedelta(31)
    assert days == [["2026-01-31"], ["2026-01-31", "2026-03-03"], ["2026-03-03", "2026-04-03"]]
    await ledger.close()


async def test_servers_of_a_host_count_into_the_same_rows_and_budgets(tmp_path: Path) -> None:
    one, other = Ledger(tmp_path, 400), Ledger(tmp_path, 400)
    for turn in range(1, 4):
        for ledger in (one, other):
            used(ledger, 10)
            await ledger.flush()
        await one.flush()
        assert one.used("k") == other.used("k") == (turn * 20, turn * 20)
    assert [counts.requests for _, counts in await one.read()] == [6]
    for ledger in (one, other):
        await ledger.close()


async def test_budgets_begin_anew_with_the_day_and_the_month(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path, 400, clock)
    daily, monthly = Key(name="k", sha256="", tokens_per_day=100), Key(name="k", sha256="", tokens_per_month=150)
    with pytest.raises(ApiError) as unknown:
        check_budget(ledger, daily, 1, WHOLE)
    assert (unknown.value.status_code, unknown.value.code) == (503, "budget_unknown")
    clock.now -= datetime.timedelta(1)
    used(ledger, 90)
    await ledger.flush()
    check_budget(ledger, daily, 10, WHOLE)
    with pytest.raises(ApiError, match="used or reserved 90 of its 100 tokens per day") as refused:
        check_budget(ledger, daily, 11, WHOLE)
    assert (refused.value.status_code, refused.value.code) == (429, "insufficient_quota")
    assert (refused.value.headers or {})["Retry-After"] == "30"
    clock.now += datetime.timedelta(1)
    check_budget(ledger, daily, 100, WHOLE)
    with pytest.raises(ApiError, match=r"150 tokens per month.*resets at 2026-02-01T00:00:00Z"):
        check_budget(ledger, monthly, 61, WHOLE)
    with ledger.account("k", "m", Usage(), 60), pytest.raises(ApiError, match="used or reserved 150"):
        check_budget(ledger, monthly, 1, WHOLE)
    clock.now += datetime.timedelta(minutes=1)
    check_budget(ledger, monthly, 150, WHOLE)
    await ledger.close()


async def test_a_hosts_part_of_a_budget_is_that_of_its_servers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 400, Clock())
    await ledger.flush()
    key, share = Key(name="k", sha256="", tokens_per_day=100), Part(servers=4, server=3, here=2)
    check_budget(ledger, key, 50, share)
    with pytest.raises(ApiError, match="0 of its 100 tokens per day, of which this host has 50, and") as refused:
        check_budget(ledger, key, 51, share)
    assert SHARE_HEADER in (refused.value.headers or {})
    await ledger.close()


async def test_a_key_without_a_budget_needs_no_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "file" / "folder", 400)
    (tmp_path / "file").touch()
    check_budget(ledger, Key(name="k", sha256=""), 1e9, WHOLE)
    used(ledger, 1)
    await ledger.flush()
    with pytest.raises(ApiError) as unread:
        await ledger.read()
    assert (unread.value.status_code, unread.value.code) == (503, "usage_unreadable")
    (tmp_path / "file").unlink()
    assert [counts.prompt_tokens for _, counts in await ledger.read()] == [1]
    await ledger.close()
