"""How model families write reasoning and tool calls: read bit by bit as well as whole, and held to by grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from llamaherd_server.errors import ApiError
from llamaherd_server.grammar.gbnf import literal, without
from llamaherd_server.grammar.schema import grammar_of
from llamaherd_server.toolcalls import formats
from llamaherd_server.toolcalls.formats import Format, thinking_of
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.reply import CallBegin, Message
from llamaherd_server.toolcalls.tools import Choice, Reply, Tool, grammar_of_reply

THINK = ("<think>", "</think>")
WEATHER = Tool(
    "get_weather",
    "The weather now",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    strict=False,
)
CLOCK = Tool("clock", None, None, strict=False)
ASKED = {"city": 'Zürich "West"', "days": 2}
JSON = json.dumps(ASKED, ensure_ascii=False)


@dataclass(frozen=True)
class Case:
    """One family: a call as its models write it, a second one behind it, and, if not in JSON, one without arguments."""

    form: Format
    one: str
    two: str | None = None
    empty: str | None = None


CASES = [
    Case(
        formats.HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
        '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    ),
    Case(
        formats.QWEN_CODER,
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich "West"\n</parameter>\n'
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        "\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
        "<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    ),
    Case(
        formats.GEMMA,
        '<|tool_call>call:get_weather{city:<|"|>Zürich "West"<|"|>,days:2}<tool_call|>',
        "<|tool_call>call:clock{}<tool_call|>",
        "<|tool_call>call:clock{}<tool_call|>",
    ),
    Case(
        formats.DEEPSEEK_V3_2,
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Zürich "West"</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        empty='<｜DSML｜function_calls>\n<｜DSML｜invoke name="clock">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    ),
    Case(
        formats.KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    Case(
        formats.MINIMAX,
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Zürich "West"</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
        empty='<minimax:tool_call>\n<invoke name="clock">\n</invoke>\n</minimax:tool_call>',
    ),
    Case(
        formats.LFM2,
        '<|tool_call_start|>[get_weather(city="Zürich \\"West\\"", days=2)]<|tool_call_end|>',
        empty="<|tool_call_start|>[clock()]<|tool_call_end|>",
    ),
    Case(
        formats.GLM,
        '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich "West"</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "\n<tool_call>clock\n</tool_call>",
        "<tool_call>clock\n</tool_call>",
    ),
    Case(
        formats.GLM_4_7,
        '<tool_call>get_weather<arg_key>city</arg_key><arg_value>Zürich "West"</arg_value>'
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
        "<tool_call>clock</tool_call>",
        "<tool_call>clock</tool_call>",
    ),
    Case(formats.GRANITE, f'<|tool_call|>[{{"name": "get_weather", "arguments": {JSON}}}]'),
    Case(formats.NEMOTRON, f'<TOOLCALL>[{{"name": "get_weather", "arguments": {JSON}}}]</TOOLCALL>'),
    Case(formats.APRIEL, f'<tool_calls>[{{"name": "get_weather", "arguments": {JSON}}}]</tool_calls>'),
    Case(
        formats.COHERE,
        f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {JSON}}}]<|END_ACTION|>',
    ),
    Case(formats.LLAMA, f'{{"name": "get_weather", "parameters": {JSON}}}'),
    Case(
        formats.MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}}}]',
        None,
    ),
    Case(formats.MISTRAL_NAMED, f"[TOOL_CALLS]get_weather[ARGS]{JSON}", "[TOOL_CALLS]clock[ARGS]{}"),
    Case(
        formats.DEEPSEEK_FENCED,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    Case(
        formats.DEEPSEEK,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    Case(
        formats.HARMONY,
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON}",
    ),
]
IDS = [case.form.name for case in CASES]


def reader(form: Format | None, *, thinks: bool = False, parallel: bool = True, thinking: bool = False) -> Reader:
    schemas = {tool.name: tool.schema for tool in (WEATHER, CLOCK)}
    return Reader(form, THINK if thinking or thinks else None, thinks, schemas, parallel)


def said(message: Message) -> tuple[str, str, list[tuple[str, object]]]:
    return message.content, message.reasoning, [(call.name, json.loads(call.arguments)) for call in message.calls]


def every_way(reading: Reader, text: str) -> tuple[str, str, list[tuple[str, object]]]:
    """What was said, the same wherever the text is split in two, and letter by letter."""
    whole = said(reading.whole(text))
    for split in [[text[:at], text[at:]] for at in range(1, len(text))] + [list(text)]:
        parser, message = reading.parser(), Message()
        pieces = [piece for part in split for piece in parser.feed(part)]
        for piece in (*pieces, *parser.finish()):
            message.add(piece)
        assert said(message) == whole, split
    return whole


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_call_is_read_however_it_is_split(case: Case) -> None:
    assert every_way(reader(case.form), case.one) == ("", "", [("get_weather", ASKED)])


@pytest.mark.parametrize("case", [case for case in CASES if case.two], ids=lambda case: str(case.form.name))
def test_two_calls_and_only_the_first_without_parallel_calls(case: Case) -> None:
    text = case.one + (case.two or "")
    assert every_way(reader(case.form), text)[2] == [("get_weather", ASKED), ("clock", {})]
    assert every_way(reader(case.form, parallel=False), text)[2] == [("get_weather", ASKED)]


@pytest.mark.parametrize("case", [case for case in CASES if not case.form.bare], ids=lambda case: str(case.form.name))
def test_text_before_a_call_is_content(case: Case) -> None:
    before = (
        "Let me look.\n\n"
        if case.form is not formats.HARMONY
        else "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
    )
    content, _, calls = every_way(reader(case.form), before + case.one)
    assert (content, calls) == ("Let me look.", [("get_weather", ASKED)])


@pytest.mark.parametrize(
    "text", ["Plain text.", "a < b and [TOOL", "  two\n\nlines \n", "{", '{"a": 1} is JSON', "<tool_call", "é"]
)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nothing_of_a_text_without_calls_is_lost(case: Case, text: str) -> None:
    content, _, calls = every_way(reader(case.form), text)
    assert content.strip() == text.strip()
    assert calls == []


@pytest.mark.parametrize(
    "broken", ["<tool_call>\nnot JSON</tool_call>", '<tool_call>{"name": 3}</tool_call>', "<tool_call>{}"]
)
def test_what_is_no_call_after_all_is_content(broken: str) -> None:
    content, _, calls = every_way(reader(formats.HERMES), f"Look: {broken}")
    assert (content, calls) == (f"Look: {broken}", [])


def test_arguments_come_as_they_are_written() -> None:
    parser = reader(formats.HERMES).parser()
    parser.feed('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zü')
    begin, *_ = pieces = parser.feed("rich")
    assert [type(piece) for piece in pieces] != [CallBegin]
    assert begin.text == "rich"  # type: ignore[union-attr]


def test_call_ids_are_the_familys() -> None:
    assert reader(formats.HERMES).whole(CASES[0].one).calls[0].id.startswith("call_")
    [case] = [case for case in CASES if case.form is formats.MISTRAL]
    mistral = reader(formats.MISTRAL).whole(case.one).calls[0].id
    assert len(mistral) == 9
    assert mistral.isalnum()


@pytest.mark.parametrize("form", [None, formats.HERMES])
def test_reasoning_is_split_off(form: Format | None) -> None:
    text = "<think>\nHmm, 2 < 3.\n</think>\n\nIt is."
    assert every_way(reader(form, thinking=True), text)[:2] == ("It is.", "\nHmm, 2 < 3.\n")
    assert every_way(reader(form, thinks=True), text.removeprefix("<think>"))[:2] == ("It is.", "\nHmm, 2 < 3.\n")


def test_gemmas_reasoning_is_split_off() -> None:
    gemma = Reader(formats.GEMMA, thinking_of("<channel|>"), False, {})
    assert every_way(gemma, "<|channel>thought\nHmm.<channel|>It is.")[:2] == ("It is.", "Hmm.")
    assert {"<|channel>", "<channel|>", "<|tool_call>", '<|"|>'} <= set(gemma.preserved)


def test_harmonys_channels() -> None:
    text = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Said."
    assert every_way(reader(formats.HARMONY), text) == ("Said.", "Think.", [])


Lets = Callable[[str, str], bool]


def reply_grammar(reading: Reader, choice: Choice) -> str | None:
    """The grammar of what a reader is going to read."""
    name = reading.form.name if reading.form else None
    return grammar_of_reply(Reply(name, reading.thinking, reading.thinks, choice, None))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_required_call_is_enforced(case: Case, lets: Lets) -> None:
    grammar = reply_grammar(reader(case.form), Choice((WEATHER, CLOCK), must=True))
    assert grammar
    assert lets(grammar, case.one)
    assert not lets(grammar, "No.")
    assert not lets(grammar, case.one.replace("city", "town"))
    assert not lets(grammar, case.one.replace("get_weather", "get_money"))
    if case.two and case.form.joined is not None:
        assert lets(grammar, case.one + case.two)
        only = reply_grammar(reader(case.form), Choice((WEATHER, CLOCK), must=True, parallel=False))
        assert only
        assert not lets(only, case.one + case.two)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_strict_tool_may_be_left_but_not_miscalled(case: Case, lets: Lets) -> None:
    strict = Tool(WEATHER.name, WEATHER.description, WEATHER.parameters, strict=True)
    grammar = reply_grammar(reader(case.form), Choice((strict,)))
    assert grammar
    final = "<|channel|>final<|message|>" if case.form is formats.HARMONY else ""
    assert lets(grammar, case.one)
    assert lets(grammar, final + "No need, 1 < 2 [and so on].")
    assert not lets(grammar, case.one.replace("city", "town"))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.form in (formats.HERMES, formats.DEEPSEEK)], ids=["hermes", "deepseek"]
)
def test_a_model_that_thinks_thinks_before_a_required_call(case: Case, lets: Lets) -> None:
    grammar = reply_grammar(reader(case.form, thinks=True), Choice((WEATHER,), must=True))
    assert grammar
    assert lets(grammar, "Hm </thin no.\n</think>\n\n" + case.one)
    assert not lets(grammar, "Hm.</think>No.")
    optional = reply_grammar(reader(case.form, thinking=True), Choice((WEATHER,), must=True))
    assert optional
    assert lets(optional, case.one)
    assert lets(optional, "<think>Hm.</think>\n" + case.one)


@pytest.mark.parametrize("form", [formats.HERMES, formats.QWEN_CODER])
def test_what_cannot_be_enforced_is_refused_where_the_tool_is_strict(form: Format, lets: Lets) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "format": "star-date"}}}
    odd = Tool("odd", None, parameters, strict=False)
    assert reply_grammar(reader(form), Choice((odd,))) is None
    assert reply_grammar(reader(form), Choice((odd,), must=True))
    with pytest.raises(ApiError, match="at /properties/x has the format 'star-date'"):
        reply_grammar(reader(form), Choice((Tool("odd", None, parameters, strict=True),)))


@pytest.mark.parametrize("parameters", [{}, {"type": "object"}, {"type": "object", "properties": {}}, None])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_arguments_are_always_an_object(case: Case, parameters: dict[str, object] | None, lets: Lets) -> None:
    grammar = reply_grammar(reader(case.form), Choice((Tool("clock", None, parameters, strict=False),), must=True))
    assert grammar
    call = case.one.replace("get_weather", "clock")
    if case.empty:
        assert lets(grammar, case.empty)
    else:
        assert lets(grammar, call.replace(JSON, "{}"))
        assert not lets(grammar, call.replace(JSON, "[]"))


BLOCKS = [
    (
        formats.DEEPSEEK_V4,
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">7'
        '</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="clock">\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>",
    ),
    (
        formats.MINIMAX,
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">7</parameter>\n</invoke>\n'
        '<invoke name="clock">\n</invoke>\n</minimax:tool_call>',
    ),
    (formats.LFM2, '<|tool_call_start|>[get_weather(city="7"), clock()]<|tool_call_end|>'),
    (formats.LFM2, "<|tool_call_start|>[get_weather(city='7'), clock()]<|tool_call_end|>"),
    (
        formats.KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "7"}<|tool_call_end|><|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        formats.GRANITE,
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "7"}}, {"name": "clock", "arguments": {}}]',
    ),
]


@pytest.mark.parametrize(("form", "text"), BLOCKS)
def test_several_calls_in_one_block(form: Format, text: str, lets: Lets) -> None:
    assert every_way(reader(form), text) == ("", "", [("get_weather", {"city": "7"}), ("clock", {})])
    grammar = reply_grammar(reader(form), Choice((WEATHER, CLOCK), must=True))
    assert grammar
    assert lets(grammar, text) is ("city='" not in text)


def test_gemmas_values_are_read_however_deep() -> None:
    text = '<|tool_call>call:get_weather{a:[<|"|>x, {y}<|"|>,true,None,{b:-1.5}],c:{},<|"|>d e<|"|>:"f"}<tool_call|>'
    [call] = reader(formats.GEMMA).whole(text).calls
    assert json.loads(call.arguments) == {"a": ["x, {y}", True, None, {"b": -1.5}], "c": {}, "d e": "f"}


ORDER = Tool(
    "order",
    None,
    {
        "$ref": "#/$defs/Order",
        "$defs": {
            "Order": {
                "type": "object",
                "properties": {
                    "size": {"$ref": "#/$defs/Size"},
                    "code": {"type": "string", "pattern": "^[0-9]+$", "maxLength": 3},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "items": {"type": "array", "items": {"$ref": "#/$defs/Size"}},
                },
                "required": ["size"],
            },
            "Size": {"enum": ["1", "large"], "type": "string"},
        },
    },
    strict=True,
)


def test_parameters_as_text_follow_references_and_keep_to_their_types(lets: Lets) -> None:
    def written(**values: str) -> str:
        elements = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function=order>\n{elements}</function>\n</tool_call>"

    grammar = reply_grammar(reader(formats.QWEN_CODER), Choice((ORDER,), must=True))
    assert grammar
    text = written(size="1", code="42", note='a <b>\n"c"', items='["1", "large"]')
    assert lets(grammar, text)
    for wrong in ({"size": "2"}, {"size": '"1"'}, {"size": "1", "code": "x"}, {"size": "1", "items": '["2"]'}, {}):
        assert not lets(grammar, written(**wrong)), wrong
    [call] = Reader(formats.QWEN_CODER, None, False, {"order": ORDER.schema}).whole(text).calls
    assert json.loads(call.arguments) == {"size": "1", "code": "42", "note": 'a <b>\n"c"', "items": ["1", "large"]}
    in_python = text.replace('["1", "large"]', "['1', 'large']")
    [same] = Reader(formats.QWEN_CODER, None, False, {"order": ORDER.schema}).whole(in_python).calls
    assert json.loads(same.arguments) == json.loads(call.arguments)


@pytest.mark.parametrize("marker", ["</think>", "<|END_THINKING|>", "[/THINK]", "aab"])
def test_text_without_a_marker_has_few_ways_on(marker: str, lets: Lets) -> None:
    """Each alternative of a rule costs as much for every token as the rest of the grammar: ten made it 25 times."""
    rules = without("text", (marker,))
    assert max(rule.count(" | ") for rule in rules.values()) <= 3
    grammar = grammar_of({**rules, "root": f"text {literal(marker)}"})
    for text in ("", "a", marker[:-1], marker[:-1] + marker[:-1], marker[0] + marker[:-1] + "b<", "aaaa</</thi"):
        assert lets(grammar, text + marker) == (marker not in (text + marker)[:-1])
    assert not lets(grammar, f"x{marker}y{marker}")
