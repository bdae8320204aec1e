"""The /metrics page: counts by key and model, the engines' state, and aliases under llama-server's metric names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llamaherd_server.engine.base import Engine, EngineStatus
from llamaherd_server.serving.admission import Admission
from llamaherd_server.wire.protocol import Finished, Stats

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_INTER_TOKEN_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_OVERHEAD_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
_BY = ("key", "model")

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series and nothing reads them


class Metrics:
    """All metrics of the server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llamaherd_{name}", text, _BY, buckets=buckets, registry=registry)

        self.ttft = histogram("time_to_first_token_seconds", "Request's arrival to its first token", _LATENCY_S)
        self.inter_token = histogram("inter_token_seconds", "Time between two tokens of a request", _INTER_TOKEN_S)
        self.queue_wait = histogram("queue_wait_seconds", "Time in the admission queue", _LATENCY_S)
        self.e2e = histogram("request_seconds", "Request's arrival to its last token", _LATENCY_S)
        self.prompt_tokens = histogram("prompt_tokens", "Prompt length", _TOKENS)
        self.output_tokens = histogram("output_tokens", "Completion length", _TOKENS)
        self.cached_tokens = Counter(
            "llamaherd_cached_prompt_tokens", "Prompt tokens found in the KV cache", _BY, registry=registry
        )
        self.drafted_tokens = Counter(
            "llamaherd_drafted_tokens", "Tokens drafted by speculative decoding", _BY, registry=registry
        )
        self.accepted_tokens = Counter(
            "llamaherd_accepted_tokens", "Drafted tokens that were accepted", _BY, registry=registry
        )
        self.generations = Counter(
            "llamaherd_generations", "Ended generations by outcome", (*_BY, "outcome"), registry=registry
        )
        self.responses = Counter(
            "llamaherd_http_responses", "HTTP responses by status", ("method", "path", "status"), registry=registry
        )

        def step_histogram(part: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llamaherd_step_{part}_seconds", text, buckets=buckets, registry=registry)

        self._step_decode = step_histogram("decode", "A step's time in llama_decode", _INTER_TOKEN_S)
        self._step_sample = step_histogram("sample", "A step's time in native sampling", _OVERHEAD_S)
        self._step_overhead = step_histogram("overhead", "A step's time outside of both", _OVERHEAD_S)
        self.totals = Totals()
        self._engines = _EngineCollector(self.totals)
        registry.register(self._engines)
        ProcessCollector(registry=registry)

    def follow(self, model: str, engine: Engine, admission: Admission) -> None:
        """Add this model's engine and queue to the page."""
        self._engines.followed.append((model, engine.status, admission))
        engine.observe(self.step)

    def finished(self, by: tuple[str, str], event: Finished, took_s: float) -> None:
        """Count a successful generation of `by` (key and model); `took_s` is the time since its request arrived."""
        self.e2e.labels(*by).observe(took_s)
        self.prompt_tokens.labels(*by).observe(event.prompt_tokens)
        self.output_tokens.labels(*by).observe(event.completion_tokens)
        self.cached_tokens.labels(*by).inc(event.cached_tokens)
        self.drafted_tokens.labels(*by).inc(event.drafted_tokens)
        self.accepted_tokens.labels(*by).inc(event.accepted_tokens)
        self.totals.prompt_tokens += event.prompt_tokens - event.cached_tokens
        self.totals.cached_tokens += event.cached_tokens
        self.totals.output_tokens += event.completion_tokens
        self.totals.prompt_s += event.prompt_s
        self.totals.decode_s += event.decode_s
        self.totals.longest = max(self.totals.longest, event.prompt_tokens + event.completion_tokens)

    def step(self, stats: Stats) -> None:
        """Count a step of an engine; steps without tokens are heartbeats and do not count."""
        if stats.batch_tokens:
            self.totals.steps += 1
            self.totals.busy_slots += stats.slots_busy
            self._step_decode.observe(stats.decode_s)
            self._step_sample.observe(stats.sample_s)
            self._step_overhead.observe(stats.overhead_s)

    def page(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self.registry)


class Totals:
    """Sums over all successful generations, for llama-server's metric names. Times are seconds in the engine.

    `streamed` counts output tokens as they arrive, including those of running and failed generations.
    """

    def __init__(self) -> None:
        self.streamed = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.prompt_s = 0.0
        self.decode_s = 0.0
        self.steps = 0
        self.busy_slots = 0  # summed over the steps
        self.longest = 0  # tokens of the longest sequence


class _EngineCollector(Collector):
    """Collects the state of engines and queues at each scrape: by model, and the sum under llama-server's names."""

    def __init__(self, totals: Totals) -> None:
        self.followed: list[tuple[str, Callable[[], EngineStatus], Admission]] = []
        self._totals = totals

    def describe(self) -> list[Metric]:
        return []  # the names depend on the engine's state, so the registry cannot check them for duplicates

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        found = CounterMetricFamily(
            "llamaherd_prompt_cache_tokens", "Prompt tokens found in the cache, by tier", labels=("model", "tier")
        )
        kv_used = kv_size = 0
        for model, status, admission in self.followed:
            state = status()
            for family, value in _of_engine(state, admission):
                families.setdefault(family.name, family).add_metric([model], value)  # type: ignore[attr-defined]
            for tier, tokens in (_cached_tokens(state.stats) if state.stats else {}).items():
                found.add_metric([model, tier], tokens)
            kv_used += state.stats.kv_used if state.stats else 0
            kv_size += state.stats.kv_size if state.stats else 0
        yield from families.values()
        yield found
        yield from self._aliases()
        if kv_size:
            yield _gauge("llamacpp:kv_cache_usage_ratio", "KV cache use, 0 to 1", kv_used / kv_size)
            yield _gauge("llamacpp:kv_cache_tokens", "KV cache cells in use", kv_used)

    def _aliases(self) -> Iterator[Metric]:
        totals = self._totals
        queues = [admission for _, _, admission in self.followed]
        yield _counter("llamacpp:prompt_tokens", "Prompt tokens processed, without cached ones", totals.prompt_tokens)
        yield _counter("llamacpp:tokens_predicted", "Tokens generated", totals.output_tokens)
        yield _counter("llamacpp:prompt_tokens_cached", "Prompt tokens found in the cache", totals.cached_tokens)
        yield _counter("llamacpp:prompt_seconds", "Time spent on prompts", totals.prompt_s)
        yield _counter("llamacpp:tokens_predicted_seconds", "Time spent on generation", totals.decode_s)
        prompt_rate = totals.prompt_tokens / totals.prompt_s if totals.prompt_s else 0.0
        decode_rate = totals.output_tokens / totals.decode_s if totals.decode_s else 0.0
        yield _gauge("llamacpp:prompt_tokens_seconds", "Mean prompt tokens/s of a request", prompt_rate)
        yield _gauge("llamacpp:predicted_tokens_seconds", "Mean generated tokens/s of a request", decode_rate)
        yield _gauge(
            "llamacpp:requests_processing", "Requests passed to the engine", sum(one.running for one in queues)
        )
        yield _gauge("llamacpp:requests_deferred", "Requests waiting", sum(one.queued for one in queues))
        yield _counter("llamacpp:n_decode", "Steps with something to decode", totals.steps)
        busy = totals.busy_slots / max(1, totals.steps)
        yield _gauge("llamacpp:n_busy_slots_per_decode", "Mean busy slots of a step", busy)
        yield _gauge("llamacpp:n_tokens_max", "Longest sequence seen, prompt and completion", totals.longest)


def _of_engine(status: EngineStatus, admission: Admission) -> Iterator[tuple[Metric, float]]:
    """Yield one model's metrics, each as a family without samples and a value."""
    waits = status.state == "unloaded" and not status.last_error
    yield _by_model("up", "1 if the model answers requests or loads on demand"), status.state == "ready" or waits
    yield _by_model("loaded", "1 if the model is in memory"), status.state == "ready"
    yield _counted("loads", "Number of loads of the model"), status.loads
    yield _by_model("engine_heartbeat_age_seconds", "Time since the last step or heartbeat"), status.heartbeat_age_s
    yield _counted("engine_restarts", "Restarts of the engine's process"), status.restarts
    yield _by_model("slots", "Sequences that can run at once"), status.settings.parallel
    yield _by_model("queue_requests", "Requests in the admission queue"), admission.queued
    yield _by_model("queue_tokens", "Expected tokens of the requests in the admission queue"), admission.queued_tokens
    yield _by_model("running_requests", "Requests passed to the engine"), admission.running
    if (stats := status.stats) is None:
        return
    yield _by_model("slots_busy", "Slots with a request"), stats.slots_busy
    yield _by_model("parked_requests", "Preempted requests that wait to resume"), stats.parked
    yield _by_model("kv_cells", "KV cache size in tokens"), stats.kv_size
    yield _by_model("kv_cells_used", "KV cache cells in use"), stats.kv_used
    yield _counted("preemptions", "Preemptions for lack of KV cells"), stats.preemptions
    yield _counted("slots_taken", "Preemptions of preemptible requests in favor of others"), stats.slots_taken
    yield _by_model("prompt_cache_bytes", "Memory of computed prompts that have left their slots"), stats.prompt_bytes
    yield _by_model("prompt_cache_limit_bytes", "Limit of prompt_cache_bytes"), stats.prompt_limit_bytes
    yield _counted("prompt_cache_evictions", "Computed prompts evicted from the prompt cache"), stats.prompt_evictions


def _cached_tokens(stats: Stats) -> dict[str, int]:
    """Return the cached tokens by the tier in which they were found."""
    left = {"memory": stats.cached_memory_tokens, "disk": stats.cached_disk_tokens}
    return {"slot": stats.cached_tokens - sum(left.values()), **left}


def _by_model(name: str, text: str) -> Metric:
    return GaugeMetricFamily(f"llamaherd_{name}", text, labels=("model",))


def _counted(name: str, text: str) -> Metric:
    return CounterMetricFamily(f"llamaherd_{name}", text, labels=("model",))


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
