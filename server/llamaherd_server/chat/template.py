"""The prompt of a chat: the model's own template, rendered in the sandbox."""

from __future__ import annotations

from typing import Any

from llamaherd_server.chat import jinja
from llamaherd_server.chat.sandbox import Sandbox, SandboxError
from llamaherd_server.errors import ApiError
from llamaherd_server.protocol import ModelInfo

# For a model whose GGUF has no template: ChatML, which most instruction-tuned models understand.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


async def render(
    sandbox: Sandbox,
    model: ModelInfo,
    messages: list[dict[str, Any]],
    extra: dict[str, Any] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The prompt for `messages`; `extra` are the request's own template variables. Raises ApiError.

    Where the last message is the assistant's, the answer continues it, as llama-server does.
    """
    last = messages[-1]
    prefill = last["content"] if last["role"] == "assistant" and "tool_calls" not in last else None
    context = {
        **(extra or {}),
        "messages": messages if prefill is None else messages[:-1],
        "tools": tools,
        "add_generation_prompt": True,
        "bos_token": model.bos_token,
        "eos_token": model.eos_token,
    }
    try:
        rendering = jinja.Rendering(model.chat_template or CHATML, context)
        prompt = await sandbox.in_child(jinja.render, rendering)
    except SandboxError as error:
        raise ApiError(400, f"the model's chat template: {error}", param="messages", code="template_error") from None
    return prompt + (prefill or "")


def adds_special(model: ModelInfo, prompt: str) -> bool:
    """Whether tokenising a rendered `prompt` should add the BOS token: only where the template wrote none itself."""
    return model.add_bos and not (model.bos_token and prompt.startswith(model.bos_token))
