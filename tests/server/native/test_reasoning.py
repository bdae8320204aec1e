"""How long a model may reason, on either engine: SmolLM2 with a template that has it think first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ..conftest import required, running
from .conftest import native

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>{% if not enable_thinking %}</think>{% endif %}"""


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("reasoning")
    (folder / "think.jinja").write_text(TEMPLATE)
    model = {"path": required("LLAMAHERD_TEST_MODEL"), "chat_template": str(folder / "think.jinja")}
    small = {"ctx_per_slot": 512, "parallel": 2}
    models = [{"name": "ours", **model, "engine": small}, {"name": "theirs", **model, "engine": native(**small)}]
    with running(folder, models=models) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def chat(http: httpx.Client, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **more}
    return http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Count to ten."}], **body})


@pytest.mark.parametrize("model", ["ours", "theirs"])
@pytest.mark.parametrize("name", ["reasoning_budget_tokens", "thinking_budget_tokens"])
def test_a_budget_ends_reasoning(http: httpx.Client, model: str, name: str) -> None:
    free = chat(http, model).json()["choices"][0]["message"]
    assert free["reasoning_content"]
    assert not free["content"]
    bound = chat(http, model, **{name: 6}).json()["choices"][0]["message"]
    assert 0 < len(bound["reasoning_content"].split()) <= 6
    assert bound["content"]


@pytest.mark.parametrize("model", ["ours", "theirs"])
def test_no_effort_is_no_reasoning(http: httpx.Client, model: str) -> None:
    message = chat(http, model, reasoning_effort="none").json()["choices"][0]["message"]
    assert not message.get("reasoning_content")
    assert message["content"]
    thinking = {"thinking": {"type": "disabled"}, "messages": [{"role": "user", "content": "Hi"}]}
    answer = http.post("/v1/messages", json={"model": model, "max_tokens": 8, "temperature": 0, **thinking}).json()
    assert {block["type"] for block in answer["content"]} == {"text"}


@pytest.mark.parametrize("model", ["ours", "theirs"])
def test_an_effort_that_nobody_knows_is_refused(http: httpx.Client, model: str) -> None:
    assert chat(http, model, reasoning_effort="low").status_code == 200
    refused = chat(http, model, reasoning_effort="loads")
    assert refused.status_code == 400
    assert "unknown reasoning effort 'loads'; available: none, minimal, low" in refused.json()["error"]["message"]


def test_with_a_schema_too(http: httpx.Client) -> None:
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 7}}}}
    answer = chat(http, "ours", reasoning_budget_tokens=6, ignore_eos=False, **wanted)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert message["content"] == "7"
    assert 0 < len(message["reasoning_content"].split()) <= 6
    refused = chat(http, "theirs", reasoning_budget_tokens=6, **wanted)
    assert refused.status_code == 400
    assert "no reasoning budget together with" in refused.json()["error"]["message"]
