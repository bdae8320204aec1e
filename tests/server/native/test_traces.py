"""Traces of requests to the real engines, with the real model."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from ..collector import collecting, values
from ..conftest import running
from .conftest import native

PHASES = ["llamaherd.queue_s", "llamaherd.prefill_s", "llamaherd.decode_s"]


@pytest.mark.parametrize("kind", ["embedded", "llama-server"])
def test_phases_are_those_that_the_engine_reports(tmp_path: Path, kind: str) -> None:
    chat = {"messages": [{"role": "user", "content": "a private matter"}], "max_tokens": 24, "stream": True}
    with collecting() as collector:
        telemetry = {"otlp_endpoint": collector.url}
        with running(tmp_path, engine=native() if kind == "llama-server" else {}, telemetry=telemetry) as server:
            with httpx.Client(base_url=server.url, timeout=120) as http:
                streamed = http.post("/v1/chat/completions", json=chat).text
                whole = http.post("/completion", json={"prompt": "Once upon a time", "n_predict": 8}).json()
            assert server.terminate() == 0
    assert '"timings":{' in streamed
    found = {span.name: span for span in collector.spans if not span.parent_span_id}
    usage = values(found["chat smollm2"].attributes)
    assert 0 < usage["gen_ai.usage.output_tokens"] <= 24
    assert usage["gen_ai.response.finish_reasons"][0] in ("stop", "length")
    assert [name for name in usage if name in PHASES] == PHASES
    passed_on = values(found["text_completion smollm2"].attributes)
    assert [name for name in passed_on if name in PHASES] == PHASES
    assert passed_on["llamaherd.decode_s"] == pytest.approx(whole["timings"]["predicted_ms"] / 1000, rel=0.5, abs=0.05)
    assert not [body for _, _, body in collector.requests if b"private" in body or b"upon" in body]
