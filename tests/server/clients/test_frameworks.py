"""langchain-openai and autogen."""

from __future__ import annotations

from typing import Any, Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallSummaryMessage
from autogen_core.models import ModelFamily, ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from ..conftest import Server


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo"]
    sunny: bool


@tool
def get_weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def _langchain(served: Server) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{served.url}/v1", api_key=SecretStr("none"), model="smollm2", max_retries=0)


def test_langchain_calls_a_tool(served: Server) -> None:
    chat = _langchain(served).bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    answer = chat.invoke("What is the weather in Rome?")
    [call] = answer.tool_calls
    assert get_weather.invoke(call["args"]).startswith("sunny in ")


def test_langchain_gets_structured_output(served: Server) -> None:
    for method in ("json_schema", "function_calling"):
        chat = _langchain(served).with_structured_output(Weather, method=method)
        assert isinstance(chat.invoke("What is the weather in Rome?"), Weather)


async def test_autogens_agent_uses_its_tool(served: Server) -> None:
    async def weather_of(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    info = ModelInfo(
        vision=False, function_calling=True, json_output=True, family=ModelFamily.UNKNOWN, structured_output=True
    )
    client: Any = OpenAIChatCompletionClient(
        model="smollm2", base_url=f"{served.url}/v1", api_key="none", model_info=info
    )
    # an agent leaves the choice to the model, and one as small as this may not call
    create = client.create
    client.create = lambda *given, **fields: create(*given, **{**fields, "tool_choice": "required"})
    result = await AssistantAgent("helper", client, tools=[weather_of]).run(task="What is the weather in Rome?")
    await client.close()
    assert isinstance(result.messages[-1], ToolCallSummaryMessage)
    assert result.messages[-1].content.startswith("sunny in ")
