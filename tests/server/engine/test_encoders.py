"""Models that only encode: whole inputs at once, their own pooling, scores, and no generation."""

from __future__ import annotations

import math
from array import array
from pathlib import Path

import gguf
import httpx
import pytest

from bench import servers
from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.wire.errors import EngineError
from llamaherd_server.wire.protocol import Embed

from .asking import ask
from .conftest import running
from .tiny import N_CTX, write_encoder

TEXTS = ["a herd of llamas", "the hill", "b", "water is wet " * 4]


def theirs(path: Path, endpoint: str, body: dict[str, object], *flags: str) -> dict[str, list[dict[str, object]]]:
    shape = servers.Flags(parallel=1, ctx_per_slot=N_CTX, unified=True, threads=1)
    with servers.llama_server(shape, *flags, model=str(path)) as server:
        reply = httpx.post(f"http://127.0.0.1:{server.port}{endpoint}", json=body).raise_for_status()
    answer: dict[str, list[dict[str, object]]] = reply.json()
    return answer


async def vectors(engine: EmbeddedEngine, question: Embed) -> list[list[float]]:
    return [array("f", vector).tolist() for vector in (await engine.embed(question)).vectors]


@pytest.mark.parametrize("pooling", [gguf.PoolingType.CLS, gguf.PoolingType.MEAN, gguf.PoolingType.LAST])
async def test_an_encoders_embeddings_are_llama_servers(tmp_path: Path, pooling: gguf.PoolingType) -> None:
    path = write_encoder(tmp_path / "encoder.gguf", pooling, temp=0.25, top_k=3, top_p=9)
    data = theirs(path, "/v1/embeddings", {"input": TEXTS}, "--embedding")["data"]
    async with running(path=path) as engine:
        assert (info := engine.status().model)
        assert info.sampling == {"temperature": 0.25, "top_k": 3}  # a top_p of 9 is none
        ours = await vectors(engine, Embed(0, [*TEXTS]))
        for mine, one in zip(ours, data, strict=True):
            assert mine == pytest.approx(one["embedding"], abs=1e-3)
            assert math.hypot(*mine) == pytest.approx(1)
        with pytest.raises(EngineError, match=f"holds {N_CTX}"):
            await engine.embed(Embed(0, ["a " * 70]))
        with pytest.raises(EngineError, match="generates no text"):
            await ask(engine, "a herd")


async def test_a_rankers_scores_are_llama_servers(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "ranker.gguf", gguf.PoolingType.RANK)
    results = theirs(path, "/v1/rerank", {"query": "llama", "documents": TEXTS}, "--rerank")["results"]
    expected = {one["index"]: one["relevance_score"] for one in results}
    async with running(path=path) as engine:
        scores = await vectors(engine, Embed(0, [*TEXTS], "llama"))
        assert [one for [one] in scores] == pytest.approx([expected[index] for index in range(len(TEXTS))], abs=1e-3)
        assert len({round(one, 3) for [one] in scores}) == len(TEXTS)
        with pytest.raises(EngineError, match="use /v1/rerank"):
            await engine.embed(Embed(0, ["a"]))
