"""What is one model's own: a LoRA on its weights, a chat template before the GGUF's."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Adapter

from ..conftest import required
from .asking import ask
from .conftest import SETTINGS, running
from .tiny import SMOLLM2_WIDTH, write_lora

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        write_lora(tmp_path_factory.mktemp("lora") / "lora.gguf", "blk.0.attn_q.weight", SMOLLM2_WIDTH, SMOLLM2_WIDTH)
    )


async def test_a_lora_changes_what_is_generated_and_goes_with_its_scale(lora: str) -> None:
    texts = []
    for adapters in ([], [Adapter(lora, 0.0)], [Adapter(lora, 5.0)]):
        async with running(lora=adapters) as engine:
            texts.append((await ask(engine, PROMPT)).text)
    without, none, much = texts
    assert without == none
    assert without != much


async def test_a_lora_stays_when_the_context_is_built_anew(lora: str) -> None:
    async with running(lora=[Adapter(lora, 5.0)]) as engine:
        before = await ask(engine, PROMPT)
        await engine.retune(msgspec.structs.replace(SETTINGS, parallel=2))
        assert (await ask(engine, PROMPT)).text == before.text


async def test_what_is_no_lora_is_one_clear_error() -> None:
    with pytest.raises(EngineError, match=r"\.gguf is not a LoRA for this model"):
        async with running(lora=[Adapter(required("LLAMAHERD_TEST_MODEL"), 1.0)]):
            pass


async def test_a_template_goes_before_the_ggufs(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    async with running(chat_template=tmp_path / "chat.jinja") as engine:
        model = engine.status().model
        assert model is not None
        assert model.chat_template == "{{ messages[0].content }}"
