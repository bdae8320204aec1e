"""llama-server's own completion on the embedded engine: its fields, its answer.

Source of both: tools/server/README.md of the pinned llama.cpp.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from llamaherd_server.api.answer import Choice
from llamaherd_server.api.fields import GenerationFields, Ignored, Lenient, Limit
from llamaherd_server.api.llama_answer import native_answer
from llamaherd_server.api.llama_fields import renamed
from llamaherd_server.api.openai.completions import Prompts
from llamaherd_server.api.wire import encode
from llamaherd_server.engine.base import Event
from llamaherd_server.errors import ApiError, unsupported
from llamaherd_server.serving.meter import Usage
from llamaherd_server.wire.protocol import Finished, Generate, Logprob, ModelInfo, Started, TokenLogprob


class LlamaFields(GenerationFields):
    """What /completion and /infill have in common."""

    n_predict: Limit = Field(None, description="Most tokens of a completion; -1: up to the context's end.")
    n_probs: int = Field(0, ge=0, le=100, description="Log probabilities of so many tokens at each place.")
    return_tokens: bool = Field(False, description="True: the answer has the ids of its tokens; a stream always has.")
    response_fields: list[str] | None = Field(None, max_length=64, description="Only these fields; `a/b`: b of a.")
    json_schema: Any = Field(None, description="The answer follows it. Not together with `grammar`.")
    reasoning_format: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _probabilities(cls, body: Any) -> Any:
        return renamed(body, {"logprobs": "n_probs"})

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.grammar and self.json_schema is not None:
            raise unsupported("grammar", "grammar: not together with json_schema")
        return self

    @property
    def most(self) -> int | None:
        """Most tokens of a completion."""
        return self.n_predict or self.max_tokens

    @property
    def logprobs(self) -> int | None:
        """As Generate has it: ids of tokens come with their log probabilities."""
        return self.n_probs or (0 if self.return_tokens or self.stream else None)


class LlamaCompletionRequest(LlamaFields):
    """Prompts to continue, as they are."""

    prompt: Prompts


class Extra(Lenient):
    """Text of another file."""

    text: str
    filename: str | None = None


class InfillRequest(LlamaFields):
    """What stands before and after a gap."""

    input_prefix: str = Field(max_length=2**20)
    input_suffix: str = Field(max_length=2**20)
    input_extra: list[Extra] = Field([], max_length=256, description="What else the model should know.")
    prompt: str = Field("", max_length=2**20, description="What follows the prefix already.")

    def text(self, model: ModelInfo) -> str:
        """The prompt; raises ApiError where the model has no tokens for it."""
        if model.fim is None:
            message = "infill: this model does not fill in the middle: its vocabulary has no tokens for that"
            raise ApiError(400, message, code="unsupported")
        before, after, middle = model.fim
        extra = "".join(f"\n\n--- snippet ---\n\n{one.text}" for one in self.input_extra)
        return f"{extra}{before}{self.input_prefix}{after}{self.input_suffix}{middle}{self.prompt}"


class LlamaShape:
    """llama-server's answer. `requests`, and their prompts as text, are in the order of the choices."""

    def __init__(
        self, body: LlamaFields, model: str, requests: list[Generate], prompts: list[str], *, several: bool
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._model = model
        self._requests = requests
        self._several = several
        self._prompt_tokens = [0] * len(requests)
        self._texts = [""] * len(requests)
        self._counts = [0] * len(requests)

    def chunk(self, index: int, event: Event) -> bytes:
        """The events for what came of choice `index`."""
        if isinstance(event, Started):
            self._prompt_tokens[index] = event.prompt_tokens
            return b""
        if isinstance(event, Finished):
            return _event(self._asked_for(self._final(index, "", [], event, self._texts[index])))
        self._texts[index] += event.text
        self._counts[index] += event.n_tokens
        tokens = event.logprobs or []
        return _event(
            {
                "index": index,
                "content": event.text,
                "tokens": [token.token for token in tokens],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": self._counts[index],
                "tokens_evaluated": self._prompt_tokens[index],
                **self._probabilities(tokens),
            }
        )

    def end(self, usage: Usage) -> bytes:
        """Nothing: the last choice's end is the stream's."""
        del usage
        return b""

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which cannot go on."""
        return _event(error.body())

    def whole(self, choices: list[Choice], usage: Usage) -> Any:
        """One object, or a list of them where there were several prompts."""
        del usage
        answers = [self._whole(choice) for choice in choices]
        return answers if self._several else answers[0]

    def _whole(self, choice: Choice) -> dict[str, Any]:
        tokens = [token.token for token in choice.logprobs] if self._body.return_tokens else []
        answer = self._final(choice.index, choice.text, tokens, choice.end, choice.text)
        answer |= self._probabilities(choice.logprobs)
        return self._asked_for(answer)

    def _asked_for(self, answer: dict[str, Any]) -> dict[str, Any]:
        fields = self._body.response_fields
        return {path: found[0] for path in fields if (found := _found(answer, path))} if fields else answer

    def _final(self, index: int, content: str, tokens: list[int], end: Finished, said: str) -> dict[str, Any]:
        body, request = self._body, self._requests[index]
        shown = {"n_probs": body.n_probs, "stream": body.stream, "timings_per_token": body.timings_per_token}
        answer = native_answer(request, self._model, index, end, said, **shown)
        answer |= {"content": content, "tokens": tokens, "prompt": self._prompts[index]}
        return answer

    def _probabilities(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        if not self._body.n_probs or not tokens:
            return {}
        told = [{**_probability(token), "top_logprobs": [_probability(one) for one in token.top]} for token in tokens]
        return {"completion_probabilities": told}


def _probability(token: Logprob | TokenLogprob) -> dict[str, Any]:
    text = token.text.decode(errors="replace")
    return {"id": token.token, "token": text, "bytes": list(token.text), "logprob": token.logprob}


def _found(answer: Any, path: str) -> list[Any]:
    """What stands at `a/b/c`, in a list; an empty one where nothing does."""
    for name in path.split("/"):
        if not isinstance(answer, dict) or name not in answer:
            return []
        answer = answer[name]
    return [answer]


def _event(content: Any) -> bytes:
    return b"data: " + encode(content) + b"\n\n"
