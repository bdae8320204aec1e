"""The server: its unit and sandbox, keys, a stream through the public address, and the settings in force."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from testinfra.host import Host

from tests.verify.client import Client

HARDENING = {
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "on-failure",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateUsers": "yes",
    "DevicePolicy": "closed",
    "ProtectProc": "invisible",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "RemoveIPC": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
    "LimitCORE": "0",
}
CPU_ONLY = {"PrivateDevices": "yes", "MemoryDenyWriteExecute": "yes"}
PROGRAMS = {"embedded": "llamaherd_server.worker", "llama-server": "/bin/llama-server"}
QUESTION = {"role": "user", "content": "Count from one to twenty in words."}


@pytest.fixture(autouse=True)
def _inference(promised: dict[str, Any]) -> None:
    if not promised["inference"]:
        pytest.skip("not an inference host")


def test_the_units_run_now_and_at_boot(host: Host, promised: dict[str, Any]) -> None:
    for unit in promised["units"]:
        assert host.service(unit).is_running, unit
        assert host.service(unit).is_enabled, unit


def test_the_containers_can_do_nothing_else(host: Host, promised: dict[str, Any]) -> None:
    if not promised["container"]:
        pytest.skip("no container")
    for unit in promised["units"]:
        [found] = json.loads(host.check_output("podman inspect %s", unit))
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["EffectiveCaps"] in (None, [])
        assert "no-new-privileges" in found["HostConfig"]["SecurityOpt"]
        assert [mount["Destination"] for mount in found["Mounts"] if mount["RW"]] == []


def test_the_units_are_hardened(host: Host, promised: dict[str, Any]) -> None:
    if promised["container"]:
        pytest.skip("the container is")
    for unit in promised["units"]:
        shown = host.check_output("systemctl show --all %s", unit)
        properties = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        wanted = HARDENING | (CPU_ONLY if promised["accelerator"] == "cpu" else {}) | {"User": promised["user"]}
        assert {name: properties[name] for name in wanted} == wanted
        assert int(properties["WatchdogUSec"].removesuffix("s").removesuffix("min")) > 0
        assert "ptrace" not in properties["SystemCallFilter"].split()


def test_what_systemd_thinks_of_the_sandboxes(host: Host, promised: dict[str, Any]) -> None:
    bounds = dict.fromkeys([] if promised["container"] else promised["units"], promised["exposure"]["llamaherd-server"])
    if promised["edge"] and not promised["site_ports"]:  # other sites may need what the sandbox takes away
        bounds["nginx"] = promised["exposure"]["nginx"]
    for unit, bound in bounds.items():
        verdict = host.check_output("systemd-analyze security --no-pager %s", unit).splitlines()[-1]
        [exposure] = re.findall(r": (\d+\.\d+) ", verdict)  # a face follows, which the locale draws
        assert float(exposure) <= bound, f"{unit}: {verdict}"


def test_processes_run_as_the_servers_user(host: Host, promised: dict[str, Any]) -> None:
    processes = host.process.filter(user=promised["user"])
    for engine in promised["engines"]:
        assert any(PROGRAMS[engine] in process.args for process in processes), engine


def test_a_key_is_required(client: Client) -> None:
    for key in (None, "wrong"):
        answer = client.request("POST", "/v1/chat/completions", {"messages": [QUESTION]}, key=key)
        assert answer.status == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_all_models_are_listed(client: Client, promised: dict[str, Any]) -> None:
    listed = client.request("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == promised["listed"]


def test_a_completion_streams(host: Host, client: Client, promised: dict[str, Any]) -> None:
    events = client.stream(
        "/v1/chat/completions",
        {"model": promised["model"], "messages": [QUESTION], "stream": True, "max_tokens": 32, "temperature": 0},
    )
    assert events[-1][1] == "[DONE]"
    choices = [(at, json.loads(data)["choices"]) for at, data in events[:-1]]
    tokens = [at for at, choice in choices if choice and choice[0]["delta"].get("content")]
    assert len(tokens) >= 8
    # Buffered anywhere on the way, they would arrive together.
    assert len({round(at, 3) for at in tokens}) >= 4


def test_the_settings_in_force_are_the_inventorys(host: Host, promised: dict[str, Any]) -> None:
    for engine, own in zip(promised["in_force"], promised["own_settings"], strict=True):
        assert engine["state"] == "ready"
        assert (engine["model"]["name"], engine["engine"]) == (promised["model"], promised["engine"])
        # no threads: decided on the host
        said = promised["settings"] | own
        open_ = {"threads", "threads_batch"} | (set() if said["ctx_per_slot"] else {"ctx_per_slot", "kv_cells"})
        wanted = {name: value for name, value in said.items() if value or name not in open_}
        assert {name: engine["settings"][name] for name in wanted} == wanted
