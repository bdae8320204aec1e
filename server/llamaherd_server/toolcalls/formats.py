"""How model families write reasoning and tool calls, and how a chat template reveals its family.

Sources: the templates in llama.cpp's models/templates, the model cards, OpenAI's harmony format
(https://github.com/openai/harmony).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from llamaherd_server.grammar.gbnf import literal
from llamaherd_server.toolcalls import calls
from llamaherd_server.toolcalls.calls import CallReader
from llamaherd_server.toolcalls.elements import Elements, glm_call

THINKING = (
    *(("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>")),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
HARMONY_THINKING = ("<|channel|>analysis<|message|>", "<|end|>")
# Returns the rule for a tool's call from the tool's name and the name of its arguments' rule.
CallRule: TypeAlias = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Keywords:
    """Arguments as keys and values: the text between the two, between pairs, and around strings that are not JSON."""

    between: str
    separator: str
    quote: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """A family, whose templates contain all of `signs` and none of `unlike`. `opens`, `closes`: around a call's body.

    `preserved`: control tokens that the engine must output; `skipped`: markers that are dropped; `bare`: a reply may
    begin with a call without `opens`; `joined`: the rule between two calls, None: only one. `elements`, `keywords`: how
    arguments are written if not as a JSON object; `tokens`: further control tokens; `written`: writes calls as
    content, for templates that print no calls.
    """

    name: str
    signs: tuple[str, ...]
    opens: str
    closes: str
    body: CallReader
    call_rule: CallRule
    joined: str | None = ""
    before: str = ""
    after: str = ""
    skipped: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    bare: bool = False
    id_length: int | None = None
    elements: Elements | None = None
    keywords: Keywords | None = None
    tokens: tuple[str, ...] = ()
    written: Callable[[calls.Calls], str] | None = None

    @property
    def preserved(self) -> list[str]:
        marks = (self.opens, self.closes.strip(), *self.skipped, *self.tokens, "[ARGS]", "[CALL_ID]", "<｜tool▁sep｜>")
        return [mark for mark in marks if mark]


def _json_rule(key: str, name: str, arguments: str) -> str:
    name_text = literal(f'{{"name": "{name}", "{key}": ')
    return f'{name_text} {arguments} "}}"'


def _cohere_rule(name: str, arguments: str) -> str:
    begin, names = literal('{"tool_call_id": "'), literal(f'", "tool_name": "{name}", "parameters": ')
    return f'{begin} [0-9]{{1,3}} {names} {arguments} "}}"'


def _element_rule(elements: Elements, name: str, arguments: str) -> str:
    """Return the rule for a call. `arguments`: the rule for its parameters, each an element."""
    return f"{literal(name.join(elements.call))} {arguments} {literal(elements.call_end)}"


_QWEN = Elements(("<function=", ">\n"), "</function>", ("<parameter=", ">\n"), "\n</parameter>\n", padding="\n")
_MINIMAX = Elements(('<invoke name="', '">\n'), "</invoke>\n", ('<parameter name="', '">'), "</parameter>\n")
_DSML = Elements(
    ('<｜DSML｜invoke name="', '">\n'),
    "</｜DSML｜invoke>\n",
    ('<｜DSML｜parameter name="', '" string="'),
    "</｜DSML｜parameter>\n",
    types=(("string", "true"), ("", "false")),
    typed='">',
)


HERMES = Format(
    name="hermes",
    signs=("<tool_call>", "arguments"),
    unlike=("<arg_key>", "<function=", "<parameter", "<tool_calls>", "<invoke"),
    opens="<tool_call>",
    closes="</tool_call>",
    body=calls.json_call,
    call_rule=lambda name, arguments: rf'"<tool_call>\n" {_json_rule("arguments", name, arguments)} "\n</tool_call>"',
    joined=r'"\n"',
)
QWEN_CODER = Format(
    name="qwen3-coder",
    signs=("<tool_call>", "<function=", "<parameter="),
    opens="<tool_call>",
    closes="</tool_call>",
    body=_QWEN.body,
    call_rule=lambda name, arguments: rf'"<tool_call>\n" {_element_rule(_QWEN, name, arguments)} "\n</tool_call>"',
    joined=r'"\n"',
    elements=_QWEN,
)
MINIMAX = Format(
    name="minimax-m2",
    signs=("<minimax:tool_call>", "<invoke name="),
    opens="<minimax:tool_call>",
    closes="</minimax:tool_call>",
    body=_MINIMAX.body,
    call_rule=partial(_element_rule, _MINIMAX),
    before=r'"<minimax:tool_call>\n"',
    after='"</minimax:tool_call>"',
    elements=_MINIMAX,
)


def _dsml(name: str, block: str, *signs: str) -> Format:
    return Format(
        name=name,
        signs=("｜DSML｜", *signs),
        opens=f"<｜DSML｜{block}>",
        closes=f"</｜DSML｜{block}>",
        body=_DSML.body,
        call_rule=partial(_element_rule, _DSML),
        before=literal(f"<｜DSML｜{block}>\n"),
        after=literal(f"</｜DSML｜{block}>"),
        elements=_DSML,
        tokens=("｜DSML｜",),
    )


DEEPSEEK_V3_2 = _dsml("deepseek-v3.2", "function_calls", "function_calls>")
DEEPSEEK_V4 = _dsml("deepseek-v4", "tool_calls")


def _glm(name: str, gap: str, *signs: str) -> Format:
    elements = Elements(("", gap), "", ("<arg_key>", f"</arg_key>{gap}<arg_value>"), f"</arg_value>{gap}")
    return Format(
        name=name,
        signs=("<tool_call>", "<arg_key>", *signs),
        opens="<tool_call>",
        closes="</tool_call>",
        body=glm_call,
        call_rule=lambda name, arguments: f'"<tool_call>" {_element_rule(elements, name, arguments)} "</tool_call>"',
        joined=literal(gap),
        elements=elements,
    )


GLM = _glm("glm-4", "\n")
GLM_4_7 = _glm("glm-4.7", "", "{function-name}<arg_key>")
KIMI = Format(
    name="kimi-k2",
    signs=("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
    opens="<|tool_call_begin|>",
    closes="<|tool_call_end|>",
    body=calls.kimi_call,
    call_rule=lambda name, arguments: (
        f'{literal(f"<|tool_call_begin|>functions.{name}:")} [0-9]{{1,3}} "<|tool_call_argument_begin|>" {arguments} '
        '"<|tool_call_end|>"'
    ),
    before='"<|tool_calls_section_begin|>"',
    after='"<|tool_calls_section_end|>"',
    skipped=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    tokens=("<|tool_call_argument_begin|>",),
)
LFM2 = Format(
    name="lfm2",
    signs=("List of tools: ", "<|im_start|>"),
    opens="<|tool_call_start|>",
    closes="<|tool_call_end|>",
    body=calls.keyword_calls,
    call_rule=lambda name, arguments: f'{literal(f"{name}(")} {arguments} ")"',
    joined='", "',
    before='"<|tool_call_start|>["',
    after='"]<|tool_call_end|>"',
    keywords=Keywords("=", ", "),
    written=calls.written_keywords,
)
GEMMA = Format(
    name="gemma-4",
    signs=("<|tool_call>call:",),
    opens="<|tool_call>",
    closes="<tool_call|>",
    body=calls.gemma_call,
    call_rule=lambda name, arguments: f'{literal(f"<|tool_call>call:{name}{{")} {arguments} "}}<tool_call|>"',
    keywords=Keywords(":", ",", '<|"|>'),
    tokens=('<|"|>',),
)
GRANITE = Format(
    name="granite-3",
    signs=("<|tool_call|>", "available_tools"),
    opens="<|tool_call|>",
    closes="",
    body=calls.json_calls,
    call_rule=partial(_json_rule, "arguments"),
    before='"<|tool_call|>["',
    joined='", "',
    after='"]"',
    written=calls.written_list,
)


def _listed(name: str, opens: str, closes: str, call_rule: CallRule, skipped: tuple[str, ...] = ()) -> Format:
    """Return the format of a list of JSON objects between two markers."""
    return Format(
        name=name,
        signs=(f"{opens}[", closes),
        opens=opens,
        closes=closes,
        body=calls.json_calls,
        call_rule=call_rule,
        before=literal(f"{opens}["),
        joined='", "',
        after=literal(f"]{closes}"),
        skipped=skipped,
    )


NEMOTRON = _listed("nemotron-nano-v2", "<TOOLCALL>", "</TOOLCALL>", partial(_json_rule, "arguments"))
APRIEL = _listed("apriel-1.5", "<tool_calls>", "</tool_calls>", partial(_json_rule, "arguments"))
COHERE = _listed(
    "command-r7b",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    _cohere_rule,
    skipped=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
LLAMA = Format(
    name="llama-3",
    signs=("dictionary of argument name",),
    opens="<|python_tag|>",
    closes="",
    body=calls.json_call,
    call_rule=partial(_json_rule, "parameters"),
    joined=None,
    bare=True,
)
MISTRAL = Format(
    name="mistral",
    signs=("[TOOL_CALLS]",),
    opens="[TOOL_CALLS]",
    closes="",
    body=calls.json_calls,
    call_rule=partial(_json_rule, "arguments"),
    before='"[TOOL_CALLS]["',
    joined='", "',
    after='"]"',
    id_length=9,
)
MISTRAL_NAMED = Format(
    name="mistral-named",
    signs=("[TOOL_CALLS]", "[ARGS]"),
    opens="[TOOL_CALLS]",
    closes="",
    body=calls.named_call,
    call_rule=lambda name, arguments: f'"[TOOL_CALLS]" {literal(name)} "[ARGS]" {arguments}',
    id_length=9,
)
DEEPSEEK_FENCED = Format(
    name="deepseek-r1",
    signs=("<｜tool▁call▁begin｜>", "```json"),
    opens="<｜tool▁call▁begin｜>",
    closes="<｜tool▁call▁end｜>",
    body=calls.deepseek_call,
    call_rule=lambda name, arguments: (
        f"{literal(f'<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}' + chr(10) + '```json' + chr(10))} {arguments} "
        + literal("\n```<｜tool▁call▁end｜>")
    ),
    before='"<｜tool▁calls▁begin｜>"',
    joined=r'"\n"',
    after='"<｜tool▁calls▁end｜>"',
    skipped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
DEEPSEEK = Format(
    name="deepseek-v3.1",
    signs=("<｜tool▁call▁begin｜>",),
    opens="<｜tool▁call▁begin｜>",
    closes="<｜tool▁call▁end｜>",
    body=calls.deepseek_call,
    call_rule=lambda name, arguments: (
        f'{literal(f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>")} {arguments} "<｜tool▁call▁end｜>"'
    ),
    before='"<｜tool▁calls▁begin｜>"',
    after='"<｜tool▁calls▁end｜>"',
    skipped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
HARMONY = Format(
    name="harmony",
    signs=("<|channel|>",),
    opens="<|channel|>",
    closes="",
    body=calls.json_call,  # unused: the reader has its own code for harmony
    call_rule=lambda name, arguments: (
        f"{literal(f'<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>')} {arguments}"
    ),
    joined=None,
    skipped=("<|message|>", "<|start|>", "<|end|>", "<|constrain|>"),
)
# The first match applies. HERMES is also used for models whose template does not support tools.
FORMATS = (
    *(HARMONY, QWEN_CODER, GEMMA, DEEPSEEK_V3_2, DEEPSEEK_V4, KIMI, MINIMAX, LFM2, GRANITE, GLM_4_7, GLM),
    *(MISTRAL_NAMED, MISTRAL, DEEPSEEK_FENCED, DEEPSEEK, NEMOTRON, APRIEL, COHERE, HERMES, LLAMA),
)


def format_of(template: str) -> Format | None:
    """Return the family of a chat template; None: it does not support tools, or has a format of its own."""
    if "tools" not in template:
        return None
    return next(
        (
            form
            for form in FORMATS
            if all(sign in template for sign in form.signs) and not any(sign in template for sign in form.unlike)
        ),
        None,
    )


def thinking_of(template: str) -> tuple[str, str] | None:
    """Return the markers around reasoning in the template; None: it has none that are known."""
    return next((pair for pair in THINKING if pair[1] in template), None)
