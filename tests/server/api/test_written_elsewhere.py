"""What other SDKs, servers and clients write into requests and histories: taken where it changes no answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from .conftest import Serve, Served
from .double import MODEL, Double

pytestmark = pytest.mark.asyncio

USER: Any = {"role": "user", "content": "The weather?"}
NAMES = ("weather", "news", "mail")
PARAMETERS: Any = {"type": "object", "properties": {}}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in NAMES]
FLAT_TOOLS: Any = [{"type": "function", "name": name, "parameters": PARAMETERS} for name in NAMES]
CALL: Any = {"id": "c" * 3000, "type": "function", "function": {"name": "weather", "arguments": "{}"}}
RESULT: Any = {"role": "tool", "tool_call_id": "c" * 3000, "content": "Rain."}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TEMPLATE = "{% for message in messages %}{{ message.role }}:{{ message.content }}|{% endfor %}{{ tools | tojson }}"


def said(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": [*parts], **more}, RESULT if more else USER]}


def of_block(block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block, {"type": "text", "text": "So?"}]}], "max_tokens": 9}


TEXT = {"type": "text", "text": "Wait."}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "It rains."}}
TAKEN = {
    "encrypted thoughts in a chat": (CHAT, said({"type": "redacted_thinking", "data": "x"}, TEXT), "Wait."),
    "thoughts of the Responses API": (CHAT, said({"type": "reasoning_text", "text": "x"}, TEXT), "assistant:Wait."),
    "calls told twice": (CHAT, said(TEXT, {"type": "tool_use", "id": "a", "name": "weather"}, tool_calls=[CALL]), ""),
    "calls told twice, LangChain": (CHAT, said({"type": "tool_call", "args": {}}, tool_calls=[CALL]), "Rain."),
    "texts in a list": (CHAT, {"messages": [{"role": "user", "content": ["One", TEXT]}]}, "user:One\nWait."),
    "no functions": (CHAT, {"messages": [USER], "functions": [], "function_call": "none"}, "user:"),
    "a reference without a type": (RESPONSES, {"input": [USER, {"id": "msg_1", "type": None}]}, "user:"),
    "no log probabilities": (RESPONSES, {"input": "Hi", "top_logprobs": 0}, "user:Hi"),
    "a document": (MESSAGES, of_block({**DOCUMENT, "title": "Report"}), "user:Report\nIt rains.\nSo?"),
    "a document of parts": (
        MESSAGES,
        of_block({"type": "document", "source": {"type": "content", "content": [TEXT]}, "context": "Of today"}),
        "user:Of today\nWait.\nSo?",
    ),
    "a search result": (
        MESSAGES,
        of_block({"type": "search_result", "source": "wiki", "title": "Rain", "content": [TEXT]}),
        "user:Rain\nwiki\nWait.\nSo?",
    ),
    "what Anthropic's servers have": (
        MESSAGES,
        {"messages": [USER], "max_tokens": 9, "container": {"id": "x"}, "mcp_servers": []},
        "user:",
    ),
}
REFUSED = {
    "functions": (CHAT, {"messages": [USER], "functions": [{"name": "f"}]}, "send tools"),
    "calls told in parts alone": (CHAT, said({"type": "tool_use", "id": "a", "name": "weather"}), "'tool_use'"),
    "thoughts of a user": (CHAT, {"messages": [{"role": "user", "content": [{"type": "reasoning_text"}]}]}, "text'"),
    "log probabilities": (RESPONSES, {"input": "Hi", "top_logprobs": 3}, "top_logprobs"),
    "a PDF": (MESSAGES, of_block({"type": "document", "source": {"type": "base64", "data": "AAAA"}}), "its text"),
    "an image in a document": (
        MESSAGES,
        of_block({"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}}),
        "other content than text",
    ),
    "citations": (MESSAGES, of_block({**DOCUMENT, "citations": {"enabled": True}}), "citations are not made"),
}


async def told(serve: Serve, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
    """Status, answer and the prompt that was computed."""
    double = Double(model=msgspec.structs.replace(MODEL, chat_template=TEMPLATE))
    async with serve(double) as served:
        reply = await served.http.post(path, json=body)
    return reply.status_code, reply.text, str(double.seen[-1].prompt) if double.seen else ""


@pytest.mark.parametrize("case", TAKEN)
async def test_what_changes_no_answer_is_taken(serve: Serve, case: str) -> None:
    path, body, shown = TAKEN[case]
    status, answer, prompt = await told(serve, path, body)
    assert status == 200, answer
    assert shown in prompt


@pytest.mark.parametrize("case", REFUSED)
async def test_what_would_change_it_is_one_clear_error(serve: Serve, case: str) -> None:
    path, body, message = REFUSED[case]
    status, answer, _ = await told(serve, path, body)
    assert (status, message in answer) == (400, True), answer


async def test_a_schema_in_the_betas_field_is_kept_to(serve: Serve) -> None:
    schema = {"enum": ["Bern", "Basel"]}
    double = Double()
    async with serve(double) as served:
        wanted = {"type": "json_schema", "schema": schema}
        for field in ({"output_format": wanted}, {"output_config": {"format": wanted}}):
            body = {"messages": [USER], "max_tokens": 9, **field}
            assert (await served.http.post(MESSAGES, json=body)).status_code == 200
    older, newer = (request.sampling.grammar for request in double.seen)
    assert older == newer is not None


async def choose(served: Served, double: Double, path: str, wanted: Any) -> tuple[Any, ...]:
    """The tools that the prompt shows, and whether one must be called."""
    tools, said = (
        (TOOLS, {"messages": [{"role": "user", "content": "Hi"}]}) if path == CHAT else (FLAT_TOOLS, {"input": "Hi"})
    )
    reply = await served.http.post(path, json={**said, "tools": tools, "tool_choice": wanted})
    assert reply.status_code == 200, reply.text
    request = double.seen[-1]
    return tuple(name for name in NAMES if name in str(request.prompt)), request.sampling.grammar is not None


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> Any:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*map(named, names)]}}


async def test_a_choice_of_tools_has_many_forms(serve: Serve) -> None:
    double = Double(model=msgspec.structs.replace(MODEL, chat_template=TEMPLATE))
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "news"}]}
    async with serve(double) as served:
        for path in (CHAT, RESPONSES):
            for free in ("auto", {"type": "auto"}, None):
                assert await choose(served, double, path, free) == (NAMES, False)
            for must in ("required", "any", {"type": "required"}):
                assert await choose(served, double, path, must) == (NAMES, True)
            for one in (named("mail"), {"type": "function", "name": "mail"}):
                assert await choose(served, double, path, one) == (("mail",), True)
            assert await choose(served, double, path, allowed("auto", "news", "mail")) == (("news", "mail"), False)
            for some in (allowed("required", "news"), flat):
                assert await choose(served, double, path, some) == (("news",), True)
        for wrong in ("never", {"type": "custom", "custom": {"name": "x"}}, named("f"), allowed("auto", "f"), 5):
            reply = await served.chat(tools=TOOLS, tool_choice=wrong)
            assert (reply.status_code, reply.json()["error"]["message"][:11]) == (400, "tool_choice"), reply.text
