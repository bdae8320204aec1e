"""What openai's and anthropic's clients raise for each refusal: the status decides, a 422 is never sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest

from .conftest import Serve, Served
from .double import Double
from .test_auth import keys

HELLO: Any = [{"role": "user", "content": "Hello"}]
Ask = Callable[..., Awaitable[Any]]


def ask_openai(served: Served, key: str) -> Ask:
    client = openai.AsyncOpenAI(base_url=f"{served.http.base_url}/v1", api_key=key, max_retries=0)
    return lambda **fields: client.chat.completions.create(**{"model": "double", "messages": HELLO, **fields})


def ask_anthropic(served: Served, key: str) -> Ask:
    client = anthropic.AsyncAnthropic(base_url=str(served.http.base_url), api_key=key, max_retries=0)
    return lambda **fields: client.messages.create(**{"model": "double", "messages": HELLO, "max_tokens": 5, **fields})


@pytest.mark.parametrize(
    ("ask", "sdk"), [(ask_openai, openai), (ask_anthropic, anthropic)], ids=["openai", "anthropic"]
)
async def test_each_refusal_is_the_exception_that_the_sdk_has_for_it(
    serve: Serve, ask: Callable[[Served, str], Ask], sdk: Any
) -> None:
    limited = keys(requests_per_minute="6")  # one that is refused with a 400 or 404 counts too
    async with serve(double := Double(), keys=limited, max_body_bytes=2048) as served:
        with pytest.raises(sdk.AuthenticationError):
            await ask(served, "wrong")()
        asked = ask(served, "user")
        with pytest.raises(sdk.BadRequestError):
            await asked(extra_body={"temperature": -1})
        with pytest.raises(sdk.NotFoundError):
            await asked(model="other")
        with pytest.raises(sdk.APIStatusError) as large:
            await asked(messages=[{"role": "user", "content": "x" * 4096}])
        assert large.value.status_code == 413
        for _ in range(4):
            await asked()
        with pytest.raises(sdk.RateLimitError) as often:
            await asked()
        assert int(often.value.response.headers["Retry-After"]) >= 1
        double.state = "restarting"
        served.state.lifecycle.drain()
        with pytest.raises(sdk.APIStatusError) as down:
            await ask(served, "root")()
        assert down.value.status_code == 503
        assert int(down.value.response.headers["Retry-After"]) >= 1
