"""What tuning gains on a host: the tuner's choice compared with our defaults and with llama-server's.

The host is the demo's lab host, deployed and tuned through its https address like any host. A client other than the
tuner's, `bench.client`, then measures the servers at their own ports, in rounds that restart each server.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from bench.client import complete
from bench.lab_host import HOST, INVENTORY, MODEL, deployed, key, llama_server
from bench.servers import WORK, Flags, Running
from bench.serving import ROUNDS, Figures, distinct, measure, print_figures
from bench.table import Result, metric
from demo.stages import ROOT, StageFailed, forget_tuning, playbook

USERS = 16
TUNING = {
    "llamaherd_loadgen_load": str(USERS),
    "llamaherd_loadgen_limits": ["ttft_p95=2s"],
    "llamaherd_loadgen_budget": "8m",
    "llamaherd_loadgen_space": [
        *("parallel=1,2,4,8,16", "batch=512,2048", "ubatch=64,128,256,512", "kv_unified=true,false"),
    ],
}
# The same lengths as `distinct`.
WORKLOAD = "name: gain\ndescription: About 100 tokens in, 64 out.\nprompt: {median: 100}\noutput: {median: 64}\n"


def run() -> Result:
    try:
        tune()
    except StageFailed as failure:
        sys.exit(f"bench: {failure}")
    ask = partial(complete, model=MODEL, key=key(INVENTORY))
    scenario = distinct(USERS, requests_per_stream=3, apart_s=0.5, ask=ask)  # users do not arrive all at once
    products: dict[str, Callable[[Flags], AbstractContextManager[Running]]] = {
        "ours": lambda _: deployed(),
        "our_defaults": lambda _: deployed("-e", json.dumps({"llamaherd_tuned": []})),
        "llama_server": lambda _: llama_server(),
    }
    rounds: dict[str, list[Figures]] = {name: [] for name in products}
    for number in range(ROUNDS):
        for name, start in products.items():
            rounds[name].append(measure(start, scenario.flags, scenario, seed=number))
            print_figures(f"round {number + 1}/{ROUNDS} {name:<14}", rounds[name][-1])
    figures = {
        key: metric({name: [one[key] for one in seen] for name, seen in rounds.items()}) for key in rounds["ours"][0]
    }
    return {f"users_{USERS}": figures}


def tune() -> None:
    """Boot and deploy the host and tune it for USERS users, starting from our defaults."""
    playbook(str(INVENTORY), "lab.yml")
    forget_tuning(str(INVENTORY), HOST)
    playbook(str(INVENTORY), "deploy.yml")
    workload = WORK / "gain.yml"
    WORK.mkdir(parents=True, exist_ok=True)
    workload.write_text(WORKLOAD)
    playbook(str(INVENTORY), "tune.yml", "-e", json.dumps(TUNING | {"llamaherd_loadgen_workload": str(workload)}))
    verdict = json.loads((ROOT / "build/tune" / HOST / "verdict.json").read_text())
    print(verdict["sentence"], flush=True)
    if verdict["verdict"] != "change":
        sys.exit("bench: there is nothing to compare")
