"""Turns a conversation into a prompt and the reader of its reply. All chat routes share this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import Response

from llamaherd_server.api.answer import json_response
from llamaherd_server.api.media import Collected
from llamaherd_server.api.state import AppState
from llamaherd_server.chat import template
from llamaherd_server.errors import ApiError
from llamaherd_server.toolcalls.derived import form_of
from llamaherd_server.toolcalls.formats import HARMONY, HARMONY_THINKING, HERMES, format_of
from llamaherd_server.toolcalls.reader import Reader
from llamaherd_server.toolcalls.tools import AnswerSchema, Choice, reply_grammar, with_ids_of
from llamaherd_server.wire.protocol import Generate, Media, ReasoningBudget, Sampling

# Limits on reasoning tokens for templates without a variable for the effort; None: unlimited.
EFFORTS = {"minimal": 512, "low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat request. `messages` are as templates expect them.

    `answer_schema`: None for any text; `answer_field` names its field in the request. `answer_strict`: parts of the
    schema that cannot be enforced are an error. `effort` and `reasoning_tokens` limit the reasoning; None: unlimited.
    """

    messages: list[dict[str, Any]]
    choice: Choice = field(default_factory=lambda: Choice(()))
    answer_schema: Any | None = None
    answer_field: str = "response_format"
    answer_strict: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    split_reasoning: bool = True
    effort: str | None = None
    reasoning_tokens: int | None = None
    media: Collected = field(default_factory=Collected)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversation ready for generation. `grammar`: None if neither tools nor an answer schema need one."""

    prompt: str
    add_special: bool
    grammar: str | None
    reader: Reader
    media: Media | None = None
    reasoning: ReasoningBudget | None = None

    def generate(self, sampling: Sampling, **fields: Any) -> Generate:
        """Return the engine's request for one reply, with further `fields` of Generate. Raises ApiError."""
        if self.grammar and sampling.grammar:
            message = "grammar: cannot be combined with required or strict tools"
            raise ApiError(400, message, param="grammar", code="unsupported")
        return Generate(
            id=0,
            prompt=self.prompt,
            add_special=self.add_special,
            sampling=msgspec.structs.replace(sampling, grammar=self.grammar or sampling.grammar),
            preserved=self.reader.preserved,
            media=self.media,
            reasoning=self.reasoning,
            **fields,
        )


async def prepare(state: AppState, conversation: Conversation) -> Prepared:
    """Render the conversation and build its grammar and reader. Raises ApiError."""
    if conversation.media.parts and not state.takes_media:
        message = conversation.media.parts[0].refusal()
        raise ApiError(400, message, param="messages", code="unsupported")
    model = state.model_info()
    source = model.chat_template or template.CHATML
    choice, messages = conversation.choice, conversation.messages
    found = await template.profile_of(state.sandbox, model)
    traits, shape, turn = found.traits, found.shape, found.turn
    known = form_of(shape) if shape else None if traits.foreign_tools else format_of(source)
    form = known or HERMES if choice.tools or known is HARMONY else None
    if known is None:
        traits = msgspec.structs.replace(traits, foreign_tools=True)
    elif known.id_length:
        messages = list(with_ids_of(known.id_length, messages))
    effort, tokens = _reasoning_limit(conversation, source)
    variables = {**state.settings.model.chat_template_kwargs, **effort, **conversation.variables}
    if not isinstance(thinks := variables.get("enable_thinking", True), bool):  # to a template, "false" is true
        message = f"enable_thinking {thinks!r} must be true or false"
        raise ApiError(400, message, param="chat_template_kwargs", code="invalid_value")
    tools = [tool.for_template() for tool in choice.tools]
    prompt = await template.render(state.sandbox, model, messages, variables, tools=tools, traits=traits)
    markers = HARMONY_THINKING if form is HARMONY else turn.thinking
    begun = markers is not None and prompt.rstrip().endswith(markers[0])
    thinking = markers if conversation.split_reasoning and form is not HARMONY else None
    reader = Reader(
        form=form,
        thinking=thinking,
        thinks=thinking is not None and begun,
        schemas={tool.name: tool.schema for tool in choice.tools},
        parallel=choice.parallel,
        skipped=tuple(mark for mark in turn.skipped if thinking or mark not in (turn.thinking or ())),
        prompted=turn.prompted,
        resumed=turn.resumed,
    )
    schema, field_ = conversation.answer_schema, conversation.answer_field
    answer = None if schema is None else AnswerSchema(schema, field_, conversation.answer_strict)
    grammar = await reply_grammar(state.sandbox, reader, choice, answer, shape if choice.tools else None)
    reasoning = None
    if markers and tokens is not None:
        reasoning = ReasoningBudget(begin=markers[0], end=markers[1], tokens=tokens, begun=begun)
    return Prepared(
        prompt, template.adds_special(model, prompt), grammar, reader, conversation.media.media(), reasoning
    )


def _reasoning_limit(conversation: Conversation, source: str) -> tuple[dict[str, Any], int | None]:
    """Return template variables that limit reasoning, or a token limit if the template has none. Raises ApiError."""
    effort, tokens = conversation.effort, conversation.reasoning_tokens
    if tokens is not None and tokens < 0:
        tokens = None
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if tokens == 0 or effort == "none":
        return {**variables, "enable_thinking": False}, 0
    if effort is None or "reasoning_effort" in source:
        return variables, tokens
    if effort not in EFFORTS:
        message = f"unknown reasoning effort {effort!r}; available: none, {', '.join(EFFORTS)}"
        raise ApiError(400, message, param="reasoning_effort", code="invalid_value")
    return variables, EFFORTS[effort] if tokens is None else tokens


async def token_count_response(state: AppState, chat: Prepared) -> Response:
    """Return the response with the conversation's token count, in the format of OpenAI and llama-server."""
    count = await state.engine.count_tokens(chat.prompt, add_special=chat.add_special)
    return json_response({"object": "response.input_tokens", "input_tokens": count})
