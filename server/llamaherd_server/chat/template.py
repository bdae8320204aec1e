"""Renders a chat's prompt from the model's own template, in the sandbox."""

from __future__ import annotations

from typing import Any

import structlog

from llamaherd_server.chat.adapt import Prompting, TemplateProfile, Traits, prompt_of, traits_of
from llamaherd_server.errors import ApiError
from llamaherd_server.sandbox.pool import Sandbox, SandboxError, Slow
from llamaherd_server.wire.protocol import ModelInfo

log = structlog.get_logger()

# For models whose GGUF has no template. Most instruction-tuned models understand ChatML.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_PROFILE_CPU_S = 10.0
_profiles: dict[str, TemplateProfile] = {}  # by template; bounded, because there is one per model


async def profile_of(sandbox: Sandbox, model: ModelInfo) -> TemplateProfile:
    """Return the traits of the model's template, found out once. Raises ApiError if no process is available."""
    source = model.chat_template or CHATML
    if source not in _profiles:
        try:
            _profiles[source] = await sandbox.in_child(traits_of, source, _PROFILE_CPU_S)
        except Slow as error:
            raise ApiError(503, f"the model's chat template {error}", code="sandbox_lost", retry_after=1) from None
        except SandboxError as error:
            _profiles[source] = TemplateProfile(Traits(), {"every conversation": str(error)})
    return _profiles[source]


async def check(sandbox: Sandbox, model: ModelInfo, name: str) -> None:
    """Log the kinds of conversations that the template of the model `name` does not print completely."""
    if failures := (await profile_of(sandbox, model)).failures:
        log.warning("the chat template omits parts of these conversations", model=name, **{"not": failures})


async def render(
    sandbox: Sandbox,
    model: ModelInfo,
    messages: list[dict[str, Any]],
    variables: dict[str, Any] | None = None,
    *,
    tools: list[dict[str, Any]] | None = None,
    traits: Traits | None = None,
) -> str:
    """Render the prompt for `messages` with the template `variables` of the request and the model. Raises ApiError.

    If the last message is the assistant's, the answer continues it, as in llama-server.
    """
    last = messages[-1]
    prefill = last["content"] if last["role"] == "assistant" and "tool_calls" not in last else None
    prompting = Prompting(
        template=model.chat_template or CHATML,
        messages=messages if prefill is None else messages[:-1],
        tools=tools or [],
        traits=traits or (await profile_of(sandbox, model)).traits,
        variables={**(variables or {}), "bos_token": model.bos_token, "eos_token": model.eos_token},
    )
    try:
        prompt = await sandbox.in_child(prompt_of, prompting)
    except SandboxError as error:
        raise ApiError(400, f"the model's chat template: {error}", param="messages", code="template_error") from None
    return prompt + (prefill or "")


def adds_special(model: ModelInfo, prompt: str) -> bool:
    """Return whether tokenizing `prompt` should add the BOS token: only if the template has not written it."""
    return model.add_bos and not (model.bos_token and prompt.startswith(model.bos_token))
