"""The metrics page after some traffic."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

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
    assert "made/up" not in page
