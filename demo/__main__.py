"""`python -m demo up|down`. Top-down: boot → deploy → tune → verify → show, each stage timed into build/demo.json."""

from __future__ import annotations

import signal
import sys

from demo import claims, process, show
from demo.jobs import end_jobs
from demo.load import engine_variables
from demo.stages import ROOT, Stage, StageFailed, Timer, forget_tuning, playbook, ssh_connections
from demo.tuning import tune

LAB = "inventories/lab"
LOOPBACK = "inventories/loopback"
REAL_HOSTS = ".venv/bin/ansible-playbook -K -i inventories/local playbooks/deploy.yml"


def up() -> None:
    with claims.checkout():
        try:
            with ssh_connections():
                run()
        except KeyboardInterrupt:
            ignore_signals()
            print("\n━━━ interrupted: ending what runs ━━━", flush=True)
            remove()
            sys.exit("demo: interrupted; nothing is left running, and `make demo` goes on with what was built so far")


def run() -> None:
    timer = Timer()
    engine = engine_variables()
    if not (obstacle := claims.lab_obstacle()):
        try:
            timer.run(Stage("boot a lab host", lambda: playbook(LAB, "lab.yml")))
        except StageFailed as failure:
            obstacle = str(failure)
            claims.release_lab()
    if obstacle:
        reason = obstacle.splitlines()[0]
        print(f"\nLeft out: systemd, nginx and TLS, because {reason}; on real hosts: {REAL_HOSTS}\n", flush=True)
        run_process(timer, reason, engine)
        return
    forget_tuning(LAB, "herd1")
    timer.run(Stage("deploy: build, model, server, nginx", lambda: playbook(LAB, "deploy.yml", *engine)))
    timer.run(Stage("tune: Locust through https", lambda: tune(LAB, "herd1", *engine)))
    timer.run(Stage("verify: testinfra", lambda: playbook(LAB, "verify.yml", *engine)))
    show.lab(timer.stages, ROOT / LAB)


def run_process(timer: Timer, reason: str, engine: list[str]) -> None:
    forget_tuning(LOOPBACK, "localhost")
    process.stop()
    with process.held_port() as port:
        variables = ["-e", process.variables(port), *engine]
        with claims.shared_build():
            timer.run(Stage("deploy: build, model, server", lambda: playbook(LOOPBACK, "deploy.yml", *variables)))
    timer.run(Stage("start the server as a process", lambda: process.start(port)))
    timer.run(Stage("tune: Locust on loopback", lambda: tune(LOOPBACK, "localhost", *variables)))
    show.loopback(timer.stages, port, reason)


def down() -> None:
    claims.end_running_demo()
    with claims.checkout():
        remove()
    print("demo: nothing is left running; the caches stay in ~/.cache/llamaherd")


def remove() -> None:
    """End what this checkout's demo runs: processes first, then the lab host."""
    end_jobs(ROOT / "build")
    process.stop()
    if claims.lab_is_ours():
        playbook(LAB, "lab.yml", "-e", "llamaherd_lab_state=absent")
        claims.release_lab()


def ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    verbs = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        sys.exit("usage: python -m demo up|down")
    # A shell starts background commands with SIGINT ignored; `make demo-down` and a closed terminal end the demo too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        verbs[sys.argv[1]]()
    except StageFailed as failure:
        sys.exit(f"demo: {failure}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; `make demo-down` removes what there is")
