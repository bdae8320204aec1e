"""The options that the locustfiles add to Locust's own."""

from __future__ import annotations

from functools import partial
from typing import Any

from llamaherd_loadtest.arrivals import PROCESSES

FILES = ("ca", "key_file", "workload", "samples", "summary", "benchmark_report", "trace")
"""Options that name files. Only the command line sets them; a worker's own win over the master's."""
DEFAULT_WORKLOAD = "chat"


def add_options(parser: Any, *, open_loop: bool = False) -> None:
    """Add our options to Locust's parser; environment variables can also name the server.

    Locust's web page shows all but FILES, so that nobody who reaches it can write or send files of this host.
    """
    add, file = parser.add_argument, partial(parser.add_argument, include_in_web_ui=False, default="")
    add("--model", env_var="LLAMAHERD_MODEL", default="", help="model name from /v1/models (default: the first)")
    file("--ca", env_var="LLAMAHERD_CA", help="file with the certificate of the server's CA")
    file("--key-file", env_var="LLAMAHERD_KEY_FILE", help="file that holds the API key")
    add(
        "--workload",
        env_var="LLAMAHERD_WORKLOAD",
        default=DEFAULT_WORKLOAD,
        include_in_web_ui=False,
        help="workload name, .yml file, .jsonl file of request bodies, or .json file in ShareGPT's format",
    )
    add("--prompt-tokens", type=int, default=0, help="length of each prompt (0: from the workload)")
    add("--max-tokens", type=int, default=0, help="length of each answer (0: from the workload)")
    add("--seed", type=int, default=0, help="seed of prompts and arrivals (0: random)")
    add("--requests", type=int, default=0, help="end the test after this many conversations (0: at --run-time)")
    add("--request-timeout", type=float, default=600.0, help="seconds")
    add("--limits", default="", help="goodput limits: ttft_p95=2s,itl_p95=100ms or a name such as mlperf-llama2-70b")
    file("--samples", help="file for the raw samples, one JSON object per line")
    file("--summary", help="file for the summary (JSON; its schema is in the package)")
    file("--benchmark-report", help="file for the summary in llm-d's Benchmark Report format (YAML)")
    if open_loop:
        add("--rate", type=float, default=1.0, help="requests per second")
        add("--arrivals", choices=PROCESSES, default="poisson", help="how requests are spaced")
        add("--burst", type=int, default=8, help="requests per burst, with --arrivals bursts")
        file("--trace", help="replay a recorded trace: Mooncake's .jsonl, Azure's or BurstGPT's .csv")
        add("--trace-speed", type=float, default=1.0, help="2 replays the trace in half the time")
        add("--warm-up", type=float, default=0.0, help="seconds at the start that are not counted")
    else:
        add("--think", type=float, default=0.0, help="average seconds before each request")
