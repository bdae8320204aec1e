"""Whether an answer has the required form."""

from __future__ import annotations

import json
import re
from typing import Any

from llamaherd_loadtest.quality.suite import Chat

_FENCED = re.compile(r"```(?:json)?\n(.*?)\n?```", re.DOTALL)


def is_valid(check: Chat, message: dict[str, Any]) -> bool:
    """Check an assistant `message` of /v1/chat/completions. With tools, it must call some of them with all required
    arguments; without, its text must be JSON, in a code fence or not."""
    if check.tools:
        calls = message.get("tool_calls") or []
        return bool(calls) and all(_is_call(check.tools, call["function"]) for call in calls)
    text = (message.get("content") or "").strip()
    fenced = _FENCED.fullmatch(text)
    return _decoded(fenced[1] if fenced else text) is not None


def _is_call(tools: list[dict[str, Any]], call: dict[str, Any]) -> bool:
    named = [one["function"] for one in tools if one["function"]["name"] == call["name"]]
    arguments = _decoded(call["arguments"])
    if not named or not isinstance(arguments, dict):
        return False
    schema = named[0].get("parameters", {})
    known = schema.get("properties", {})
    return {*schema.get("required", [])} <= arguments.keys() and (not known or arguments.keys() <= known.keys())


def _decoded(text: str) -> Any:
    """Return None if `text` is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None
