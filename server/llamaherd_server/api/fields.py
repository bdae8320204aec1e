"""The request fields that chat and completions share. Each description states what the server does with the field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_before_validator_function

from llamaherd_server.api.llama_fields import renamed, with_samplers, without_off
from llamaherd_server.errors import unknown_field
from llamaherd_server.wire.protocol import Sampling

_STOPS = 64
_INT32 = 2**31 - 1
_TOKEN_ID = re.compile(r"-?[0-9]{1,10}")
# Far below any logit, but finite, because JSON has no infinity.
_FORBIDDEN = -1e6


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


def _stricter(schema: Any) -> Any:
    """Return `schema` with two changes: lists fail at their first error, because a client reads only that one and
    there may be thousands, and numbers reject booleans, which pydantic would convert to 1 and 0.
    """
    if isinstance(schema, list):
        return [_stricter(part) for part in schema]
    if isinstance(schema, tuple):
        return tuple(_stricter(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    strict = {name: _stricter(part) for name, part in schema.items()}
    if schema.get("type") == "list":
        return strict | {"fail_fast": True}
    return no_info_before_validator_function(_no_boolean, strict) if schema.get("type") in ("int", "float") else strict


class Lenient(BaseModel):
    """An object in a request. A null counts as absent; unknown fields are ignored.

    It suits objects that clients return as received (messages, items, blocks) or pass through (tools), where SDKs and
    servers add fields of their own. Ignoring a field there does not change how the answer is generated.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return cast(CoreSchema, _stricter(handler(source)))

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class Body(Lenient):
    """A request's body, or an options object in it. An unknown field is an error that suggests the closest one."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        if isinstance(body, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for name, value in body.items():
                if name not in known and value is not None:
                    raise unknown_field(name, known)
        return body


def _stop_list(stop: Any) -> Any:
    """Return the stop strings as a list, without empty ones, which would stop nothing."""
    stops = [stop] if isinstance(stop, str) else stop
    return [one for one in stops if one != ""] if isinstance(stops, list) else stops


def _as_biases(bias: Any) -> Any:
    """Convert llama-server's list of [token, bias] to a dict. A token may be text; the bias false forbids it."""
    if isinstance(bias, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in bias):
        try:
            bias = dict(bias)
        except TypeError:
            return bias
    elif isinstance(bias, dict):
        bias = {int(key) if _TOKEN_ID.fullmatch(str(key)) else key: value for key, value in bias.items()}
    if isinstance(bias, dict):
        return {key: _FORBIDDEN if value is False else value for key, value in bias.items()}
    return bias


def _without_nul(grammar: str) -> str:
    if "\0" in grammar:
        raise ValueError("must not contain a NUL character")
    return grammar


def _limit(tokens: int) -> int | None:
    if tokens == 0:
        raise ValueError("must be at least 1, or -1 for no limit")
    return None if tokens == -1 else tokens


# In tokens; None: no limit.
Limit = Annotated[int, Field(ge=-1, le=_INT32), AfterValidator(_limit)] | None
Text = Annotated[str, Field(min_length=1, max_length=1024)]
BiasedText = Annotated[str, Field(min_length=1, max_length=64)]
Ignored = Annotated[Any, Field(description="Accepted and ignored.")]


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="True: the last chunk, with no choices, carries `usage`.")
    include_obfuscation: Any = Field(None, description="Accepted and ignored: chunks are never padded.")
    continuous_usage_stats: Any = Field(None, description="Accepted and ignored: the usage comes at the end.")


class SamplingFields(Body):
    """How the next token is chosen. A missing field takes llama-server's default."""

    temperature: float | None = Field(None, ge=0, le=100, description="0: the most likely token. Default 0.8.")
    top_k: int | None = Field(None, ge=-1, le=_INT32, description="Keep the k most likely tokens; 0: all. Default 40.")
    top_p: float | None = Field(None, ge=0, le=1, description="Keep the top tokens up to this total. Default 0.95.")
    min_p: float | None = Field(None, ge=0, le=1, description="Minimum, relative to the top token. Default 0.05.")
    typical_p: float | None = Field(None, ge=0, le=1, description="Locally typical sampling; 1: off (default).")
    xtc_probability: float | None = Field(None, ge=0, le=1, description="Chance of XTC per token; 0: off (default).")
    xtc_threshold: float | None = Field(None, ge=0, le=1, description="XTC's threshold. Default 0.1.")
    repeat_penalty: float | None = Field(None, gt=0, le=100, description="Penalty on repeats; 1: off (default).")
    repeat_last_n: int | None = Field(
        None, ge=-1, le=_INT32, description="Last tokens checked for repeats; -1: all. Default 64."
    )
    presence_penalty: float | None = Field(None, ge=-100, le=100, description="Per token already seen. Default 0.")
    frequency_penalty: float | None = Field(None, ge=-100, le=100, description="Per occurrence. Default 0.")
    dry_multiplier: float | None = Field(None, ge=0, le=1e6, description="Strength of DRY; 0: off (default).")
    dry_base: float | None = Field(None, ge=1, le=1e6, description="DRY's base. Default 1.75.")
    dry_allowed_length: int | None = Field(None, ge=0, le=_INT32, description="Length not penalized. Default 2.")
    dry_penalty_last_n: int | None = Field(
        None, ge=-1, le=_INT32, description="Last tokens that DRY checks; -1: all. Default 64."
    )
    dry_sequence_breakers: list[Text] | None = Field(None, max_length=64, description="Strings that end a repeat.")
    mirostat: int | None = Field(None, ge=0, le=2, description="Mirostat version; 0: off (default).")
    mirostat_tau: float | None = Field(None, ge=0, le=1e6, description="Mirostat's target entropy. Default 5.")
    mirostat_eta: float | None = Field(None, ge=0, le=1e6, description="Mirostat's learning rate. Default 0.1.")
    seed: int | None = Field(
        None, description="Equal seeds and fields give equal samples; choice i uses seed + i. -1 or null: random."
    )
    logit_bias: Annotated[
        dict[int | BiasedText, float] | None,
        BeforeValidator(_as_biases, json_schema_input_type=dict[str, float | Literal[False]] | list[Any] | None),
    ] = Field(
        None,
        max_length=4096,
        description="Bias by token id or text; false forbids it. Also as a list of [token, bias].",
    )
    ignore_eos: bool | None = Field(None, description="True: never stop at the end-of-sequence token.")
    grammar: Annotated[str, AfterValidator(_without_nul)] | None = Field(
        None, max_length=2**20, description="GBNF grammar with the root rule `root`; an invalid one is a 400."
    )

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, body: Any) -> Any:
        """Drop llama-server's fields whose value has no effect, and convert `samplers` to sampling fields."""
        if not isinstance(body, dict):
            return body
        return with_samplers(without_off(body, cls.model_fields.keys() | {"samplers"}))

    def sampling(self, index: int = 0) -> Sampling:
        """Return the sampling parameters of choice `index`."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            given["seed"] = None if self.seed == -1 else (self.seed + index) % 2**32
        return msgspec.structs.replace(Sampling(), **given)


_SAMPLING = Sampling.__struct_fields__


class AccountFields(Body):
    """Fields that OpenAI and Anthropic use for their own accounts."""

    metadata: Ignored = None
    service_tier: Ignored = None


class OpenAiFields(AccountFields):
    """Fields of every OpenAI route for its own accounts and caches."""

    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Any = Field(None, description="Accepted and ignored: a key's requests share prefixes.")
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None


class GenerationFields(SamplingFields, OpenAiFields):
    """Fields that chat and completions share besides sampling."""

    model: str | None = Field(None, description="A name from /v1/models. Default: the first model.")
    stream: bool = Field(False, description="True: server-sent events, ended by `data: [DONE]`.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: int = Field(1, ge=1, le=128, description="Independent completions of each prompt, generated in parallel.")
    max_tokens: Limit = Field(None, description="Token limit per completion; -1 or null: the context's end.")
    stop: Annotated[list[Text] | None, BeforeValidator(_stop_list, json_schema_input_type=str | list[str] | None)] = (
        Field(None, max_length=_STOPS, description="Strings that end the completion; they are not part of it.")
    )
    cache_prompt: bool = Field(True, description="False: compute the whole prompt, without cached prefixes.")
    timings_per_token: bool = Field(False, description="Accepted and ignored: `timings` end every answer.")
    verbose: bool = Field(False, description="True: `__verbose` is llama-server's object, with the prompt.")
    store: Ignored = None
    id_slot: Any = Field(None, description="Accepted and ignored: the scheduler chooses the slot.")
    return_progress: Any = Field(None, description="Accepted and ignored.")

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, body: Any) -> Any:
        return renamed(body, {"n_cmpl": "n"})
