"""Model upgrades of a fleet that serves: users notice none, and one that fails leaves the fleet as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab.conftest import BIN, ROOT, Herd
from tests.lab.fleet import EDGE, GATE, MODEL, asked, completion, digest, logged, served_by, serving
from tests.lab.load import streaming
from tests.server.engine.tiny import SMOLLM2_WIDTH, write_lora

pytestmark = [pytest.mark.lab, pytest.mark.fleet, pytest.mark.timeout(3600)]
NAMED = f"readlink {MODEL}"
# All that an upgrade changes, and where rollback.yml would go.
STATE = f"{NAMED} {MODEL}.previous /opt/llamaherd/*/current /opt/llamaherd/*/previous; cat /etc/llamaherd/server.toml"
STARTS = "systemctl show -P InvocationID llamaherd-server"
CRASHING_WORKER = Path(__file__).with_name("crashing_worker.py")
DOUBLED = ROOT / "tests/server/doubled/sitecustomize.py"
DOUBLE = "/opt/crashing"
DROP_IN = "/run/systemd/system/llamaherd-server.service.d"


def all_have(fleet: Herd, model: Path) -> None:
    """Both hosts serve it, in service, and nothing is kept of the upgrade."""
    for host in ("f1", "f2"):
        assert fleet.sh(host, NAMED) == f"{digest(model)}.gguf\n"
        fleet.sh(host, f"grep -q {digest(model)} /proc/[0-9]*/maps")
    assert all_in_service(fleet)
    assert [fleet.sh(host, "ls -d /var/lib/llamaherd/upgrade || true") for host in ("f1", "f2")] == ["", ""]


def all_in_service(fleet: Herd) -> bool:
    active = [fleet.sh(host, "systemctl is-active llamaherd-server") for host in ("f1", "f2")]
    return active == ["active\n"] * 2 and " down;" not in fleet.sh("e1", "cat /etc/nginx/nginx.conf")


def test_nobody_notices_a_rolling_upgrade_and_the_way_back(fleet: Herd, better: Path) -> None:
    before = [fleet.sh(host, NAMED) for host in ("f1", "f2")]
    with streaming(fleet, rate=0.5) as load:
        said = fleet.succeed("upgrade.yml", "-e", asked(better)).output
    assert all(f"was never tuned on {host}" in said for host in ("f1", "f2"))
    assert load.failures == []
    assert load.outcomes["ok"] >= 20
    all_have(fleet, better)
    with streaming(fleet, rate=0.5) as load:
        fleet.succeed("rollback.yml", "-e", "llamaherd_rollback=model")
    assert load.failures == []
    assert [fleet.sh(host, NAMED) for host in ("f1", "f2")] == before


@contextmanager
def crashing(fleet: Herd, model: Path) -> Iterator[None]:
    """While this lasts, f1's engine aborts when it is to send the first token of `model`."""
    environment = f"PYTHONPATH={DOUBLE} WORKER_DOUBLE={DOUBLE}/worker.py CRASHES_WITH={digest(model)}"
    files = {f"{DOUBLE}/worker.py": CRASHING_WORKER.read_text(), f"{DOUBLE}/sitecustomize.py": DOUBLED.read_text()}
    files[f"{DROP_IN}/crashing.conf"] = f"[Service]\nEnvironment={environment}\n"
    for path, text in files.items():
        fleet.sh("f1", f"mkdir -p {Path(path).parent} && cat >{path} <<'END'\n{text}\nEND")
    fleet.sh("f1", "systemctl daemon-reload")
    try:
        yield
    finally:
        fleet.sh("f1", f"rm -r {DROP_IN} {DOUBLE}; systemctl daemon-reload")


def refused(fleet: Herd, variables: str) -> str:
    """Run an upgrade that must fail, under load that must not: afterwards all is as it was. Returns what was said."""
    before = {host: fleet.sh(host, STATE) for host in ("f1", "f2")}
    untouched = fleet.sh("f2", STARTS)
    with streaming(fleet, rate=0.5) as load:
        run = fleet.play("upgrade.yml", "-e", variables)
    assert run.rc != 0
    assert load.failures == []
    assert {host: fleet.sh(host, STATE) for host in ("f1", "f2")} == before
    assert fleet.sh("f2", STARTS) == untouched
    assert all_in_service(fleet)
    return run.output


@pytest.mark.parametrize("fault", ["another sha256", "no GGUF", "too big"])
def test_an_upgrade_that_cannot_work_touches_no_host(fleet: Herd, better: Path, tmp_path: Path, fault: str) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(better, model)
    if fault == "no GGUF":
        model.write_bytes(b"plain text")
    variables: dict[str, Any] = json.loads(asked(model))
    if fault == "another sha256":
        variables["llamaherd_models"][0]["sha256"] = "0" * 64
    if fault == "too big":
        variables["llamaherd_settings"] = {"parallel": 64, "ctx_per_slot": 400000}
    starts = fleet.sh("f1", STARTS)
    output = refused(fleet, json.dumps(variables))
    assert {"another sha256": "0" * 64, "no GGUF": "GGUF", "too big": "GiB"}[fault] in output
    assert fleet.sh("f1", STARTS) == starts


# The failing upgrade brings other settings too: they go back with the model.
SETTINGS = {"parallel": 3, "ctx_per_slot": 512, "threads": 1, "threads_batch": 1}


def test_a_canary_that_answers_otherwise_goes_back_by_itself(fleet: Herd, better: Path) -> None:
    coarse = {**SETTINGS, "kv_type_k": "q4_0", "kv_type_v": "q4_0"}
    more: dict[str, Any] = {"llamaherd_upgrade_limits": ["kld=0.0001"], "llamaherd_upgrade_least_speed": 0}
    output = refused(fleet, asked(better, llamaherd_settings=coarse, **more))
    assert "f1 serves what it served before, and the rollout stops: Verify answers after the upgrade" in output
    assert "limit kld=0.0001 misses: KL divergence" in output


@pytest.mark.parametrize("slower_than", ["before", "when it was tuned"])
def test_a_host_that_is_slow_after_the_switch_goes_back_by_itself(fleet: Herd, better: Path, slower_than: str) -> None:
    more: dict[str, Any] = {"llamaherd_upgrade_least_speed": 50, "llamaherd_settings": SETTINGS}
    if slower_than == "when it was tuned":
        version = yaml.safe_load((ROOT / "roles/common/defaults/main.yml").read_text())["llamaherd_llama_cpp_version"]
        measured_on = {"model": "chat", "file": f"{digest(better)}.gguf", "build": f"{version}-cpu"}
        found = {"workload": "chat", "measured": {"output_tokens_per_s": 1e6, "ttft_p95_ms": 0.1}}
        more = {"llamaherd_tuned": [{"measured_on": measured_on, "settings": SETTINGS, "provenance": found}]}
    output = refused(fleet, asked(better, **more))
    assert "f1 serves what it served before, and the rollout stops: Verify speed after the upgrade" in output
    assert f"{slower_than}, " in output


def test_a_host_that_does_not_load_the_model_goes_back_by_itself(fleet: Herd, better: Path, tmp_path: Path) -> None:
    """Its header is whole, so only the engine notices that half of the weights are missing."""
    model = tmp_path / "model.gguf"
    model.write_bytes(better.read_bytes()[: better.stat().st_size // 2])
    output = refused(fleet, asked(model, llamaherd_settings=SETTINGS))
    assert "f1 serves what it served before, and the rollout stops: Report why the server is not ready" in output


def test_a_host_whose_engine_crashes_at_the_first_token_goes_back_by_itself(
    fleet: Herd, better: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(better.read_bytes() + bytes(32))
    with crashing(fleet, model):
        output = refused(fleet, asked(model, llamaherd_settings=SETTINGS))
    assert "f1 serves what it served before, and the rollout stops: Verify that the completion is not empty" in output
    assert "SIGABRT" in output  # the journal


@pytest.mark.parametrize("moment", ["the mark at the edge", "the switch"])
def test_the_next_run_takes_up_what_a_dead_controller_left(fleet: Herd, better: Path, moment: str) -> None:
    command = [str(BIN / "ansible-playbook"), "-i", str(fleet.inventory), "playbooks/upgrade.yml", "-e", asked(better)]
    controller = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    with streaming(fleet, rate=0.5) as load:
        while not has_come(fleet, better, moment):
            assert controller.poll() is None
            time.sleep(0.2)
        os.killpg(controller.pid, signal.SIGKILL)
        controller.wait()
        fleet.succeed("upgrade.yml", "-e", asked(better))
    assert load.failures == []
    all_have(fleet, better)
    fleet.succeed("rollback.yml", "-e", "llamaherd_rollback=model")


def has_come(fleet: Herd, model: Path, moment: str) -> bool:
    if moment == "the switch":
        return fleet.sh("f1", NAMED) == f"{digest(model)}.gguf\n"
    return " down;" in fleet.sh("e1", "cat /etc/nginx/nginx.conf")


@pytest.fixture
def as_before(fleet: Herd) -> Iterator[None]:
    """Afterwards the hosts are upgraded to what the inventory says."""
    settings = "cat /etc/llamaherd/server.toml"
    before = [fleet.sh(host, f"{NAMED}; {settings}") for host in ("f1", "f2")]
    yield
    fleet.succeed("upgrade.yml", "-e", json.dumps(GATE))
    assert [fleet.sh(host, f"{NAMED}; {settings}") for host in ("f1", "f2")] == before
    assert all_in_service(fleet)


def rolled_out(fleet: Herd, models: list[dict[str, Any]], **more: object) -> None:
    with streaming(fleet, rate=0.5) as load:
        fleet.succeed("upgrade.yml", "-e", json.dumps({"llamaherd_models": models} | GATE | more))
    assert load.failures == []
    assert load.outcomes["ok"] >= 10
    assert all_in_service(fleet)


def of_inventory(fleet: Herd) -> dict[str, Any]:
    [model] = yaml.safe_load((fleet.inventory / "hosts.yml").read_text())["all"]["vars"]["llamaherd_models"]
    return dict(model)


def of_both_hosts(fleet: Herd, **ask: Any) -> list[Any]:
    before = logged(fleet)
    answers = [completion(fleet, **ask) for _ in range(4)]
    counts = served_by(fleet, before)
    assert min(counts["f1"], counts["f2"]) >= 1
    return answers


@pytest.mark.usefixtures("as_before")
def test_a_chat_template_alone_is_an_upgrade(fleet: Herd, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("One, two,")  # whatever a client says
    before = {answer["usage"]["prompt_tokens"] for answer in of_both_hosts(fleet)}
    rolled_out(fleet, [of_inventory(fleet) | {"chat_template": str(template)}])
    after = {answer["usage"]["prompt_tokens"] for answer in of_both_hosts(fleet)}
    assert len(after) == 1
    assert max(after) < 6 < min(before)


@pytest.mark.usefixtures("as_before")
def test_a_lora_alone_is_an_upgrade_of_a_fleet_balanced_by_prefix(fleet: Herd, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", "blk.0.attn_q.weight", SMOLLM2_WIDTH, SMOLLM2_WIDTH)
    adapter = {"name": "lora", "sha256": digest(lora), "source": {"kind": "file", "path": str(lora)}, "scale": 5}
    before = completion(fleet, max_tokens=16)["choices"][0]["message"]["content"]
    balance = {"llamaherd_nginx_balance": "prefix"}
    try:
        fleet.succeed(*EDGE, "-e", json.dumps(balance))
        rolled_out(fleet, [of_inventory(fleet) | {"lora": [adapter]}], **balance)
    finally:
        fleet.succeed(*EDGE)
    after = {answer["choices"][0]["message"]["content"] for answer in of_both_hosts(fleet, max_tokens=16)}
    assert len(after) == 1
    assert before not in after


@pytest.mark.usefixtures("as_before")
def test_a_host_that_answers_otherwise_goes_back_and_the_canary_stays_upgraded(fleet: Herd, tmp_path: Path) -> None:
    of_hosts = {"f1": "One, two,", "f2": "The capital of France is"}  # whatever a client says
    files = [fleet.inventory / f"host_vars/{host}/template.yml" for host in of_hosts]
    for file, (host, template) in zip(files, of_hosts.items(), strict=True):
        (path := tmp_path / f"{host}.jinja").write_text(template)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump({"llamaherd_models": [of_inventory(fleet) | {"chat_template": str(path)}]}))
    before = {host: fleet.sh(host, STATE) for host in of_hosts}
    try:
        with streaming(fleet, rate=0.5) as load:
            run = fleet.play("upgrade.yml", "-e", json.dumps(GATE))
    finally:
        for file in files:
            file.unlink()
    assert run.rc != 0
    assert load.failures == []
    assert (
        "f2 serves what it served before, and the rollout stops: Verify equal completions of all upgraded hosts"
        in run.output
    )
    assert all_in_service(fleet)
    assert {host: fleet.sh(host, STATE) == before[host] for host in of_hosts} == {"f1": False, "f2": True}


@pytest.mark.usefixtures("as_before")
def test_a_second_model_is_an_upgrade(fleet: Herd, better: Path) -> None:
    second = {"name": "second", "sha256": digest(better), "source": {"kind": "file", "path": str(better)}}
    second |= {"settings": {"parallel": 1, "ctx_per_slot": 512}}
    rolled_out(fleet, [of_inventory(fleet), second], llamaherd_more_models=["second"])
    for name in ("chat", "second"):
        assert {answer["model"] for answer in of_both_hosts(fleet, model=name)} == {name}


@pytest.mark.parametrize(
    ("part", "variables"),
    [
        # Releases of their own, with the same in them.
        ("server", {"llamaherd_python": "/usr/bin/python3"}),
        ("llama.cpp", {"llamaherd_llama_cpp_cmake_flags": ["-DCMAKE_VERBOSE_MAKEFILE=OFF"]}),
    ],
)
def test_server_and_llama_cpp_are_upgraded_and_go_back_each_by_itself(
    fleet: Herd, part: str, variables: dict[str, object]
) -> None:
    def releases() -> list[dict[str, str]]:
        of = {name: f"readlink /opt/llamaherd/{name}/current" for name in ("server", "llama.cpp")}
        return [{name: fleet.sh(host, command) for name, command in of.items()} for host in ("f1", "f2")]

    before = releases()
    with streaming(fleet, rate=0.5) as load:
        fleet.succeed("upgrade.yml", "-e", json.dumps(GATE | variables))
    assert load.failures == []
    after = releases()
    for old, new in zip(before, after, strict=True):
        assert {name for name in old if old[name] != new[name]} == {part}
    with streaming(fleet, rate=0.5) as load:
        fleet.succeed("rollback.yml", "-e", f"llamaherd_rollback={part}")
    assert load.failures == []
    assert releases() == before


def test_a_host_alone_behind_an_edge_of_its_own_holds_its_requests(fleet: Herd, better: Path) -> None:
    two = serving(fleet, ["f1"])
    try:
        fleet.succeed(*EDGE)
        with streaming(fleet, rate=0.3, patience_s=280) as load:
            fleet.succeed("upgrade.yml", "-e", asked(better, llamaherd_upgrade_blue_green=False))
            time.sleep(20)  # for those that waited to be answered
        assert fleet.sh("f1", NAMED) == f"{digest(better)}.gguf\n"
    finally:
        (fleet.inventory / "hosts.yml").write_text(two)
        fleet.succeed("deploy.yml")
    assert load.failures == []
    assert max(sample.ttft or 0 for sample in load.samples) > 5
