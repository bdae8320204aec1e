"""Bodies that nobody should send: each is refused as such, none breaks the code that reads it."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llamaherd_server.api.fields import GenerationFields
from llamaherd_server.api.openai.chat import ChatRequest
from llamaherd_server.api.openai.completions import CompletionRequest
from llamaherd_server.config.engine_settings import merge
from llamaherd_server.errors import ApiError
from llamaherd_server.grammar.schema import schema_grammar
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import Sampling

KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
    *("pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("$ref", "$defs", "anyOf", "oneOf", "allOf", "enum", "const", "title"),
)
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null", "other")
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from((*TYPES, "#", "#/$defs/a"))
)
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
schemas = st.recursive(
    anything, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from((*KEYWORDS, "a")), inner), max_leaves=12
)


@given(schemas)
@settings(max_examples=150, deadline=None)
def test_any_schema_is_a_grammar_or_a_400(schema: Any) -> None:
    with contextlib.suppress(ApiError):
        assert "root ::= " in schema_grammar(schema, "response_format")


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_any_field_of_any_type_is_taken_or_refused(model: type[GenerationFields]) -> None:
    @given(st.dictionaries(st.sampled_from([*model.model_fields, "other"]), anything, max_size=4))
    @settings(max_examples=150, deadline=None)
    @example({"logit_bias": {":": False}})
    def check(fields: dict[str, Any]) -> None:
        for required in ({"messages": [{"role": "user", "content": "x"}]}, {"prompt": "x"}):
            with contextlib.suppress(ValidationError):
                body = model.model_validate({**required, **fields})
                given = (body.logit_bias or {}).items()  # resolve_sampling replaces texts
                body.logit_bias = {token: bias for token, bias in given if not isinstance(token, str)}
                sampling = body.sampling()
                assert msgspec.convert(msgspec.to_builtins(sampling), Sampling) == sampling, (
                    "the worker would refuse it"
                )

    check()


@given(st.dictionaries(st.sampled_from([*EngineSettings.__struct_fields__, "other"]), anything, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_engine_setting_is_taken_or_refused(values: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        merged = merge(EngineSettings(), values)
        assert msgspec.convert(msgspec.to_builtins(merged), EngineSettings) == merged
        others = set(EngineSettings.__struct_fields__) - values.keys()
        assert [getattr(merged, name) for name in others] == [getattr(EngineSettings(), name) for name in others]
