"""What tuning gains: what the tuner chose, beside our defaults and llama-server's own, as another client sees them.

The tuner searches one server by its Locust client; the figures are then taken by `bench.client`, in rounds that start
each server anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from bench import servers
from bench.servers import WORK, Flags, Running
from bench.serving import ROUNDS, Figures, distinct, measure, tell
from bench.table import Result, metric

USERS = 16
LIMIT = "ttft_p95=2s"
DEFAULTS = Flags(parallel=4, ctx_per_slot=2048, unified=True)
SPACE = ("parallel=1,2,4,8,16", "batch=512,2048", "ubatch=64,128,256,512", "kv_unified=true,false")
# As `distinct` asks.
WORKLOAD = "name: gain\ndescription: About 100 tokens in, 64 out.\nprompt: {median: 100}\noutput: {median: 64}\n"


def run() -> Result:
    scenario = distinct(USERS, requests_per_stream=3, apart_s=0.5)  # people do not come all at once
    products: dict[str, tuple[Callable[[Flags], AbstractContextManager[Running]], Flags]] = {
        "ours": (servers.ours, tuned()),
        "our_defaults": (servers.ours, DEFAULTS),
        "llama_server": (lambda _: servers.llama_server(None), DEFAULTS),
    }
    rounds: dict[str, list[Figures]] = {name: [] for name in products}
    for number in range(ROUNDS):
        for name, (start, flags) in products.items():
            rounds[name].append(measure(start, flags, scenario, seed=number))
            tell(f"round {number + 1}/{ROUNDS} {name:<14}", rounds[name][-1])
    figures = {
        key: metric({name: [one[key] for one in seen] for name, seen in rounds.items() if key in seen[0]})
        for key in rounds["ours"][0]
    }
    return {f"users_{USERS}": figures}


def tuned() -> Flags:
    """What the tuner finds for so many users within the limit, from our defaults on."""
    out, workload = WORK / "gain", WORK / "gain.yml"
    with servers.ours(DEFAULTS) as server:
        workload.write_text(WORKLOAD)
        options = [f"--url=http://127.0.0.1:{server.port}", "--model=bench", f"--load={USERS}", f"--limit={LIMIT}"]
        options += ["--budget=6m", f"--workload={workload}", f"--out={out}", *(f"--space={knob}" for knob in SPACE)]
        subprocess.run([sys.executable, "-m", "llamaherd_loadtest.tune", *options], check=True)
    verdict = json.loads((out / "verdict.json").read_text())
    if not verdict["provenance"]["measured"]:
        sys.exit(f"bench: nothing was found to compare: {verdict['sentence']}")
    print(verdict["sentence"], flush=True)
    chosen = verdict["chosen"]
    return Flags(chosen["parallel"], chosen["ctx_per_slot"], chosen["kv_unified"], chosen["batch"], chosen["ubatch"])
