"""Adapts conversations to what a chat template can print, which test renderings find out before the first request."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import msgspec

from llamaherd_server.chat.conversations import KINDS
from llamaherd_server.chat.jinja import Rendering, render
from llamaherd_server.chat.plain import plain_tool
from llamaherd_server.toolcalls.calls import Calls
from llamaherd_server.toolcalls.derived import Shape, shape_of
from llamaherd_server.toolcalls.formats import HARMONY, format_of, thinking_of
from llamaherd_server.toolcalls.turns import Turn, turn_of

Messages = list[dict[str, Any]]

# The system prompt for models whose template does not support tools: Qwen2.5's wording, Hermes' format.
_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
# A template that prints these conversations supports tools.
_TOOL_KINDS = ("tools", "tools and a system message", "a call", "a call with text")
_ALL_KINDS = tuple(kind.name for kind in KINDS)
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_ERROR_WEIGHT = 100  # an error weighs more than any number of missing texts


class Traits(msgspec.Struct, frozen=True):
    """The adaptations that a template needs."""

    functions_text: bool = False  # expects the tools as text in `functions`, and the date as `datetime`
    plain_parameters: bool = False  # expects exactly one type and a description for each parameter
    listed_tools: bool = False  # expects a list of tools even if there are none
    text_arguments: bool = False  # expects the arguments of calls as text
    lone_thoughts: bool = False  # drops text in a message with reasoning and a call
    mapped_arguments: bool = False  # expects the arguments of calls as a mapping, even if they are not JSON
    single_calls: bool = False  # prints only one call per turn
    one_system: bool = False  # prints only one system message, at the beginning
    some_user: bool = False  # requires a user message
    no_system: bool = False  # prints no system message
    called_results: bool = False  # prints a result only if it has printed the call
    alternating: bool = False  # requires user and assistant to alternate
    user_first: bool = False  # requires the first turn to be the user's
    parts: bool = False  # expects each content as a list of parts
    written_calls: bool = False  # prints no calls, so the format writes them as content
    foreign_tools: bool = False  # prints no tools, or no calls and results


class TemplateProfile(msgspec.Struct):
    """The traits of a template. `failures`: what it omits despite them, or the error, by kind of conversation.

    `shape`: the format of its calls, if no known family has it. `turn`: the markers around its texts.
    """

    traits: Traits
    failures: dict[str, str]
    shape: Shape | None = None
    turn: Turn = Turn()


class Prompting(msgspec.Struct):
    """The input of a prompt. `variables`: those of the request and the model, and the BOS and EOS tokens."""

    template: str
    messages: Messages
    tools: list[dict[str, Any]]
    traits: Traits
    variables: dict[str, Any]


def prompt_of(prompting: Prompting) -> str:
    """Render the prompt. Runs in a sandboxed child."""
    context = context_of(prompting.template, prompting.messages, prompting.tools, prompting.traits, prompting.variables)
    return render(Rendering(prompting.template, context))


def traits_of(template: str) -> TemplateProfile:
    """Return the traits that make the template print the most conversations completely. Runs in a sandboxed child."""
    traits, failures = Traits(), _failures(template, Traits())
    for name in Traits.__struct_fields__ * 2:  # twice: a trait may help only together with a later one
        other = msgspec.structs.replace(traits, **{name: True})
        if failures and other != traits:
            fewer = _failures(template, other)
            kinds = _TOOL_KINDS if name == "foreign_tools" else _ALL_KINDS
            if _weight(fewer, kinds) < _weight(failures, kinds):
                traits, failures = other, fewer
    for name in Traits.__struct_fields__:  # a later trait may have made an earlier one redundant
        other = msgspec.structs.replace(traits, **{name: False})
        if other != traits and _weight(same := _failures(template, other), _ALL_KINDS) <= _weight(failures, _ALL_KINDS):
            traits, failures = other, same
    lacks = {
        kind: text if isinstance(text, str) else f"leaves out {', '.join(text)}" for kind, text in failures.items()
    }
    form, shape, turn = format_of(template), None, Turn(thinking_of(template))
    printed = partial(_printed, template, traits)
    if form is not HARMONY:
        turn = turn_of(printed, turn.thinking)
    if "tools" in template and not traits.foreign_tools and form is None and (shape := shape_of(printed, turn)):
        turn = msgspec.structs.replace(turn, skipped=tuple(dict.fromkeys((*turn.skipped, *shape.skipped))))
    return TemplateProfile(traits, lacks, shape, turn)


def _printed(template: str, traits: Traits, messages: Messages, tools: list[dict[str, Any]], **variables: Any) -> str:
    """Render a test conversation. Raises ValueError for any exception of the template."""
    try:
        return render(Rendering(template, context_of(template, messages, tools, traits, {**_TOKENS, **variables})))
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _failures(template: str, traits: Traits) -> dict[str, str | list[str]]:
    """Return, for each kind of conversation that is not printed completely, the error or the missing texts."""
    failures: dict[str, str | list[str]] = {}
    for kind in KINDS:
        try:
            prompt = _printed(template, traits, kind.messages, [*kind.tools], **dict(kind.variables))
        except ValueError as error:
            failures[kind.name] = str(error)
            continue
        if missing := [text for text in kind.texts if text not in prompt]:
            failures[kind.name] = missing
    return failures


def _weight(failures: dict[str, str | list[str]], kinds: Iterable[str]) -> int:
    problems = (failures[kind] for kind in kinds if kind in failures)
    return sum(_ERROR_WEIGHT if isinstance(problem, str) else len(problem) for problem in problems)


def context_of(
    template: str, messages: Messages, tools: list[dict[str, Any]], traits: Traits, variables: dict[str, Any]
) -> dict[str, Any]:
    """Return a template's variables: `variables`, and the conversation adapted to its traits."""
    now = datetime.datetime.now().astimezone()
    messages = [{**one, "role": "system"} if one["role"] == "developer" else dict(one) for one in messages]
    messages = _named_results(messages)
    if traits.foreign_tools:
        messages, tools = with_tools_as_text(messages, tools), []
    elif traits.written_calls and (form := format_of(template)) and form.written:
        messages = [_with_calls(one, form.written) for one in messages]
    if name := _thought_name(template):
        messages = [{**one, name: one["reasoning_content"]} if "reasoning_content" in one else one for one in messages]
    if traits.plain_parameters:
        tools = [plain_tool(tool) for tool in tools]
    if traits.functions_text:
        functions = [tool["function"] for tool in tools]
        variables = {"functions": json.dumps(functions, indent=4, ensure_ascii=False), **variables}
    if isinstance(thinks := variables.get("enable_thinking"), bool):  # other templates use other names
        mode = {"thinking": thinks, "thinking_mode": "enabled" if thinks else "disabled"}
        variables = {**mode, **({} if thinks else {"thinking_budget": 0}), **variables}
    steps: tuple[tuple[bool, Callable[[Messages], Messages]], ...] = (
        (traits.lone_thoughts, lambda given: [_with_lone_thought(one, name) for one in given]),
        (traits.text_arguments, lambda given: _with_arguments(given, _as_text)),
        (traits.mapped_arguments, lambda given: _with_arguments(given, _as_mapping)),
        (traits.single_calls, _single_calls),
        (traits.called_results, _called_results),
        (traits.one_system or traits.no_system, _one_system),
        (traits.some_user, _some_user),
        (traits.no_system, _no_system),
        (traits.user_first, _user_first),
        (traits.alternating, _alternating),
        (traits.parts, _in_parts),
    )
    for wanted, step in steps:
        messages = step(messages) if wanted else messages
    return {
        "enable_thinking": True,  # llama-server's default
        "date_string": now.strftime("%d %b %Y"),
        **({"datetime": now.strftime("%b %d %Y")} if traits.functions_text else {}),
        **variables,
        "messages": messages,
        "tools": tools or ([] if traits.listed_tools else None),
        "add_generation_prompt": True,
    }


@lru_cache(maxsize=4)
def _thought_name(template: str) -> str:
    """Return the template's name for reasoning, or "" if it is `reasoning_content` or none is found."""
    names = () if "reasoning_content" in template else ("reasoning", "thinking", "thought")
    of = r"""\b(?:message|msg|m)(?:\.|\[['"]|\.get\(['"])"""
    return next((name for name in names if re.search(rf"{of}{name}\b", template)), "")


def _with_lone_thought(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Move the text of a message with reasoning and calls into its reasoning."""
    thought = message.get("reasoning_content")
    if not thought or not message.get("tool_calls") or not message["content"]:
        return message
    thought = f"{thought}\n\n{message['content']}"
    return {**message, "content": "", "reasoning_content": thought, **({name: thought} if name else {})}


def _with_calls(message: dict[str, Any], written: Callable[[Calls], str]) -> dict[str, Any]:
    """Move the calls of a message into its content."""
    if not message.get("tool_calls"):
        return message
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": message["content"] + written(calls)}


def _with_arguments(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    def converted(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": {**call["function"], "arguments": convert(call["function"]["arguments"])}}

    return [
        {**one, "tool_calls": [converted(call) for call in one["tool_calls"]]} if one.get("tool_calls") else one
        for one in messages
    ]


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else _json(arguments)


def _as_mapping(arguments: Any) -> dict[str, Any]:
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def _single_calls(messages: Messages) -> Messages:
    """Split parallel calls into consecutive turns of one call, each followed by its result."""
    result: Messages = []
    taken: list[int] = []
    for at, one in enumerate(messages):
        if at in taken:
            continue
        calls = one.get("tool_calls") or []
        if len(calls) < 2:
            result.append(one)
            continue
        for number, call in enumerate(calls):
            found = [
                later
                for later in range(at + 1, len(messages))
                if messages[later].get("tool_call_id") == call["id"] and later not in taken
            ]
            taken += found
            result.append({**(one if number == 0 else {"role": one["role"], "content": ""}), "tool_calls": [call]})
            result += [messages[later] for later in found]
    return result


def _one_system(messages: Messages) -> Messages:
    """Merge the leading system messages into one and turn later ones into user messages."""
    count = next((at for at, one in enumerate(messages) if one["role"] != "system"), len(messages))
    rest = [{**one, "role": "user"} if one["role"] == "system" else one for one in messages[count:]]
    return [*_joined(messages[:count]), *rest]


def _no_system(messages: Messages) -> Messages:
    """Prepend the system message to the first user message."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    return _joined([{"role": "user", "content": system["content"]}, *rest[:1]]) + rest[1:]


def _named_results(messages: Messages) -> Messages:
    """Add the tool's name to each result. OpenAI's API has it only in the calls."""
    names = {call["id"]: call["function"]["name"] for one in messages for call in one.get("tool_calls", ())}
    return [
        {**one, "name": name}
        if one["role"] == "tool" and "name" not in one and (name := names.get(one["tool_call_id"]))
        else one
        for one in messages
    ]


def _some_user(messages: Messages) -> Messages:
    return messages if any(one["role"] == "user" for one in messages) else _user_first(messages)


def _user_first(messages: Messages) -> Messages:
    at = 1 if messages and messages[0]["role"] == "system" else 0
    if not messages[at:] or messages[at]["role"] != "user":
        return [*messages[:at], {"role": "user", "content": ""}, *messages[at:]]
    return messages


def _alternating(messages: Messages) -> Messages:
    """Merge messages of the same role, and put an empty answer between a call or its result and a user message."""
    result: Messages = []
    for one in messages:
        if one["role"] == "user" and result and (result[-1]["role"] == "tool" or "tool_calls" in result[-1]):
            result.append({"role": "assistant", "content": ""})
        result.append(one)
    return _joined(result)


def _called_results(messages: Messages) -> Messages:
    """Turn results without a preceding call, which the client may have truncated, into user messages."""
    called: set[str] = set()
    result: Messages = []
    for one in messages:
        called |= {call["id"] for call in one.get("tool_calls", ())}
        lost = one["role"] == "tool" and one["tool_call_id"] not in called
        result.append({"role": "user", "content": _response(one)} if lost else one)
    return result


def _joined(messages: Messages) -> Messages:
    """Merge adjacent messages of the same role, except calls and their results."""
    result: Messages = []
    for one in messages:
        last = result[-1] if result else {}
        if one["role"] != last.get("role") or one["role"] == "tool" or "tool_calls" in last or "tool_calls" in one:
            result.append(one)
        else:
            result[-1] = {**last, "content": "\n\n".join(filter(None, (last["content"], one["content"])))}
    return result


def _in_parts(messages: Messages) -> Messages:
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


def with_tools_as_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a template without tool support: tools in the system message, calls and results as text."""
    introduction = _INTRODUCTION.format(tools="\n".join(_json(tool) for tool in tools)) if tools else ""
    result: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = _response(message)
            if result and result[-1].get("tool_results"):
                result[-1]["content"] += f"\n{text}"
            else:
                result.append({"role": "user", "content": text, "tool_results": True})
        elif calls := message.get("tool_calls"):
            written = "\n".join(f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in calls)
            result.append({"role": "assistant", "content": "\n".join(filter(None, (message["content"], written)))})
        else:
            result.append(message)
    for message in result:
        message.pop("tool_results", None)
    if not introduction:
        return result
    if result[0]["role"] == "system":
        first = {**result[0], "content": f"{result[0]['content']}\n\n{introduction}".lstrip()}
        return [first, *result[1:]]
    return [{"role": "system", "content": introduction}, *result]


def _response(result: dict[str, Any]) -> str:
    return f"<tool_response>\n{result['content']}\n</tool_response>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
