"""The metrics page after some traffic."""

from __future__ import annotations

import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.debian import need

from .conftest import Serve
from .double import Double


async def test_counts_by_key_and_model_and_keeps_llama_servers_names(serve: Serve) -> None:
    async with serve(Double(tokens=4)) as served:
        await served.chat()
        await served.chat(stream=True)
        await served.http.get("/made/up/path")
        page = (await served.http.get("/metrics")).text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    by = (("key", "anonymous"), ("model", "double"))
    assert samples["llamaherd_time_to_first_token_seconds_count", *by] == 2
    assert samples["llamaherd_inter_token_seconds_count", *by] == 6
    assert samples["llamaherd_output_tokens_sum", *by] == 8
    assert samples["llamaherd_cached_prompt_tokens_total", *by] == 4
    assert samples["llamaherd_generations_total", *by, ("outcome", "stop")] == 2
    assert samples["llamacpp:prompt_tokens_total",] == 6
    assert samples["llamacpp:tokens_predicted_total",] == 8
    assert samples["llamacpp:predicted_tokens_seconds",] == 8 / 0.04
    assert samples["llamacpp:requests_processing",] == 0
    assert samples["llamacpp:prompt_tokens_cached_total",] == 4
    assert samples["llamacpp:n_tokens_max",] == 9
    assert "made/up" not in page


def checked(page: bytes) -> tuple[int, list[str]]:
    """promtool's exit code and lines."""
    done = subprocess.run([need("promtool"), "check", "metrics"], input=page, capture_output=True, check=False)
    return done.returncode, (done.stdout + done.stderr).decode().splitlines()


@pytest.mark.needs("promtool")
async def test_promtool_accepts_the_page(serve: Serve) -> None:
    async with serve(Double(tokens=4)) as served:
        await served.chat()
        page = (await served.http.get("/metrics")).content
    code, told = checked(page)
    # llama-server's own names have the colon that promtool's advice keeps for recording rules; dashboards use them.
    assert [line for line in told if not (line.startswith("llamacpp:") and line.endswith("not contain ':'"))] == []
    assert code in (0, 3)  # 3: advice only
    assert len(told) >= 8
