"""`python -m demo up|down`. Top-down: boot → deploy → tune → verify → show, each stage timed into build/demo.json."""

from __future__ import annotations

import os
import sys

from demo import process, show
from demo.stages import ROOT, Stage, StageFailed, Timer, forget_tuning, playbook

LAB = "inventories/lab"
LOOPBACK = "inventories/loopback"
REAL_HOSTS = "ansible-playbook -i inventories/local playbooks/deploy.yml"


def up() -> None:
    timer = Timer()
    try:
        timer.run(Stage("boot a lab host", lambda: playbook(LAB, "lab.yml")))
    except StageFailed as failure:
        print(f"\nLeft out: systemd, nginx and TLS, because {failure}; on real hosts: {REAL_HOSTS}\n", flush=True)
        up_as_process(timer, str(failure))
        return
    forget_tuning(LAB, "herd1")
    timer.run(Stage("deploy: build, model, server, nginx", lambda: playbook(LAB, "deploy.yml")))
    timer.run(Stage("tune: Locust through https", lambda: tune(LAB)))
    timer.run(Stage("verify: testinfra", lambda: playbook(LAB, "verify.yml")))
    show.lab(timer.stages, ROOT / LAB)


def up_as_process(timer: Timer, reason: str) -> None:
    forget_tuning(LOOPBACK, "localhost")
    process.stop()
    timer.run(Stage("deploy: build, model, server", lambda: playbook(LOOPBACK, "deploy.yml")))
    timer.run(Stage("start the server as a process", process.start))
    timer.run(Stage("tune: Locust on loopback", lambda: tune(LOOPBACK)))
    show.loopback(timer.stages, reason)


def down() -> None:
    process.stop()
    try:
        playbook(LAB, "lab.yml", "-e", "llamaherd_lab_state=absent")
    except StageFailed as failure:
        print(f"no lab host to remove: {failure}")


def tune(inventory: str) -> None:
    """For as long as BUDGET says, as in `make demo BUDGET=10m`, or else the inventory."""
    budget = os.environ.get("BUDGET")
    playbook(inventory, "tune.yml", *(["-e", f"llamaherd_loadgen_budget={budget}"] if budget else []))


if __name__ == "__main__":
    verbs = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        sys.exit("usage: python -m demo up|down")
    try:
        verbs[sys.argv[1]]()
    except StageFailed as failure:
        sys.exit(f"demo: {failure}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; `make demo` starts afresh, `make demo-down` removes what there is")
