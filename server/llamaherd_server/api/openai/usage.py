"""GET /v1/usage: what keys used of which model on which day, in the words of OpenAI's organization usage."""

from __future__ import annotations

import csv
import datetime
import io
import re
from functools import partial
from itertools import groupby
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llamaherd_server.api.answer import json_response
from llamaherd_server.api.state import state_of
from llamaherd_server.errors import ApiError
from llamaherd_server.http.json_body import on_thread
from llamaherd_server.serving.ledger import Counts, Row

router = APIRouter()  # no ModelRoute: a model may be served no more

_DAY_S = 24 * 60 * 60
_COLUMNS = ("day", "api_key_id", "model", "num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")


def _date(text: str) -> datetime.date:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        raise ValueError("a day in UTC is written as in 2026-01-31")
    return datetime.date.fromisoformat(text)


Day = Annotated[datetime.date, BeforeValidator(_date)]


class UsageQuery(BaseModel):
    """Which rows."""

    model_config = ConfigDict(extra="forbid")

    key: str | None = Field(None, description="A key's name; for an admin key, which sees all. Others see their own.")
    model: str | None = Field(None, description="A model's name; left out: all.")
    first: Day = Field(datetime.date.min, alias="from", description="The first day, in UTC; left out: all days kept.")
    last: Day = Field(datetime.date.max, alias="to", description="The last day.")
    format: Literal["json", "csv"] | None = Field(None, description="Left out: as the header Accept says, or JSON.")

    @model_validator(mode="after")
    def _in_order(self) -> UsageQuery:
        if self.first > self.last:
            raise ValueError(f"from {self.first} is after to {self.last}")
        return self


@router.get("/v1/usage", response_class=Response)
async def usage(asked: Annotated[UsageQuery, Query()], request: Request) -> Response:
    """Requests and tokens by day, key and model, as counted on this host. `input_tokens` include the cached ones.

    A request counts once the engine has taken it in.
    """
    key = request.state.key
    if not key.admin and asked.key not in (None, key.name):
        message = f"key {key.name!r} is not an admin key: it sees its own usage alone"
        raise ApiError(403, message, param="key", code="admin_required")
    rows = await state_of(request).serving.ledger.read(
        key=asked.key if key.admin else key.name,
        model=asked.model,
        first=asked.first.isoformat(),
        last=asked.last.isoformat(),
    )
    accepted = "csv" if "text/csv" in request.headers.get("accept", "") else "json"
    if (asked.format or accepted) == "csv":
        return Response(await on_thread(partial(_csv, rows)), media_type="text/csv; charset=utf-8")
    return await on_thread(lambda: json_response(_page(rows)))


def _page(rows: list[tuple[Row, Counts]]) -> dict[str, Any]:
    buckets = []
    for day, of_day in groupby(rows, key=lambda one: one[0].day):
        start = int(datetime.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp())
        results = [
            {
                "object": "organization.usage.completions.result",
                **dict(zip(_COLUMNS[1:], _cells(*one)[1:], strict=True)),
            }
            for one in of_day
        ]
        buckets.append({"object": "bucket", "start_time": start, "end_time": start + _DAY_S, "results": results})
    return {"object": "page", "data": buckets, "has_more": False, "next_page": None}


def _csv(rows: list[tuple[Row, Counts]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *(_cells(*one) for one in rows)])
    return text.getvalue()


def _cells(row: Row, counts: Counts) -> tuple[str | int, ...]:
    """In the order of the columns."""
    return (*row, counts.requests, counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens)
