"""Per-key budgets of tokens per day and month in UTC: this host's part of each, against the usage in its ledger."""

from __future__ import annotations

import datetime
import math

from llamaherd_server.config.keys import Key
from llamaherd_server.config.share import Part
from llamaherd_server.errors import ApiError
from llamaherd_server.serving.ledger import Ledger
from llamaherd_server.serving.quota import SHARE_HEADER


def check_budget(ledger: Ledger, key: Key, tokens: float, mine: Part) -> None:
    """Raise a 429 if a request of `tokens` exceeds one of the key's budgets, a 503 while the key's usage is unknown."""
    if not key.budgeted:
        return
    if not ledger.readable:
        message = f"the usage of key {key.name!r} is unknown, so its budget cannot be checked; see the server's log"
        raise ApiError(503, message, code="budget_unknown", retry_after=5)
    day, month = ledger.used(key.name)
    today = ledger.clock().replace(hour=0, minute=0, second=0, microsecond=0)
    tomorrow = today + datetime.timedelta(1)
    next_month = (today.replace(day=1) + datetime.timedelta(31)).replace(day=1)
    budgets = ((key.tokens_per_month, month, "month", next_month), (key.tokens_per_day, day, "day", tomorrow))
    for budget, used, period, anew in budgets:
        part = None if budget is None else mine.budget(budget)
        if part is not None and used + max(1, tokens) > part:
            of = "" if part == budget else f", of which this host has {part:.0f}"
            message = (
                f"key {key.name!r} has used or reserved {used:.0f} of its {budget} tokens per {period}{of}, and this "
                f"request may use {max(1, tokens):.0f}: the budget resets at {anew:%Y-%m-%dT%H:%M:%SZ}"
            )
            wait_s = math.ceil((anew - ledger.clock()).total_seconds())
            # OpenAI's clients would otherwise retry, in vain
            headers = {"X-Should-Retry": "false", SHARE_HEADER: "used up"}
            raise ApiError(429, message, code="insufficient_quota", retry_after=wait_s, headers=headers)
