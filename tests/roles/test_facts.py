"""What the roles decide of hosts that are not at hand, and what they refuse there, from the facts of such hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.roles.conftest import HOSTS, ROOT, Render, run_roles
from tests.roles.test_render import model_file, tuning


@pytest.mark.parametrize(
    ("host", "accelerator", "service_manager", "flag", "python", "packages"),
    [
        ("debian12", "cpu", "systemd", "-DGGML_NATIVE=ON", "python3", {"ninja-build", "python3-venv", "nginx"}),
        ("ubuntu2204", "cpu", "systemd", "-DGGML_NATIVE=ON", "python3.11", {"build-essential", "python3.11-venv"}),
        ("ubuntu2404", "cpu", "systemd", "-DGGML_NATIVE=ON", "python3", {"ccache", "python3-venv"}),
        ("rocky9", "cpu", "systemd", "-DGGML_NATIVE=ON", "python3.12", {"gcc-c++", "python3.12", "python3.12-pip"}),
        ("alma9", "cpu", "systemd", "-DGGML_NATIVE=ON", "python3.12", {"ninja-build", "python3.12"}),
        ("cuda", "cuda", "systemd", "-DCMAKE_CUDA_ARCHITECTURES=90-real", "python3.11", {"cmake"}),
        ("rocm", "rocm", "systemd", "-DGGML_HIP=ON", "python3", {"cmake"}),
        (
            "vulkan",
            "vulkan",
            "systemd",
            "-DGGML_VULKAN=ON",
            "python3",
            {"glslc", "mesa-vulkan-drivers"},
        ),
        ("macos", "metal", "launchd", "-DGGML_METAL_EMBED_LIBRARY=ON", "python3", {"ninja", "nginx"}),
    ],
)
def test_what_is_decided_from_facts(
    render: Render, host: str, accelerator: str, service_manager: str, flag: str, python: str, packages: set[str]
) -> None:
    decided = render(host).decided
    assert (decided["accelerator"], decided["service_manager"]) == (accelerator, service_manager)
    assert decided["python"] == python
    assert flag in decided["flags"]
    assert packages <= set(decided["packages"])


@pytest.mark.parametrize(("layers", "gib"), [(-1, 80), (0, 16), (9, 96), ("auto", 96)])
def test_a_model_may_need_the_memory_of_where_its_layers_are(render: Render, layers: int | str, gib: int) -> None:
    decided = render("cuda", llamaherd_server_gpu_layers=layers, llamaherd_preflight_memory_reserve_mib=0).decided
    assert decided["memory"] == gib << 30


CARD = {"path": "/dev/dri/renderD128", "vendor": "0x1002", "memory_bytes": 24 << 30}
INTEL: dict[str, Any] = {"accelerator": "vulkan", "accelerator_reason": "an Intel GPU (/dev/dri/renderD128)"}
INTEL |= {"vulkan": {"nodes": [CARD | {"vendor": "0x8086", "memory_bytes": 0}], "headers": ""}}


@pytest.mark.parametrize(
    ("host", "own", "variables", "accelerator"),
    [
        ("debian13", INTEL, {}, "vulkan"),
        ("debian12", INTEL, {}, "cpu"),
        ("ubuntu2204", INTEL, {}, "cpu"),
        ("debian12", INTEL | {"vulkan": {"nodes": [CARD], "headers": "1.4.309"}}, {}, "vulkan"),
        ("debian12", INTEL, {"llamaherd_environment": {"VULKAN_SDK": "/opt/sdk"}}, "vulkan"),
        ("debian13", INTEL, {"llamaherd_server_runtime": "container"}, "cpu"),
    ],
)
def test_auto_takes_vulkan_only_where_it_can_be_built(
    render: Render, host: str, own: dict[str, Any], variables: dict[str, Any], accelerator: str
) -> None:
    assert render(host, **changed(host, **own), **variables).decided["accelerator"] == accelerator


@pytest.mark.parametrize(("own", "gib"), [({}, 24), ({"accelerator_memory_bytes": 0}, 16)])
def test_a_gpu_without_memory_of_its_own_has_the_hosts(render: Render, own: dict[str, Any], gib: int) -> None:
    decided = render("vulkan", **changed("vulkan", **own), llamaherd_preflight_memory_reserve_mib=0).decided
    assert decided["memory"] == gib << 30


def test_only_hosts_with_vulkan_install_its_packages(render: Render) -> None:
    assert "mesa-vulkan-drivers" not in render("debian13").decided["packages"]


@pytest.mark.parametrize(("host", "apart"), [("debian12", False), ("debian13", True)])
def test_promtool_is_installed_where_it_is_a_package_of_its_own(render: Render, host: str, apart: bool) -> None:
    packages = render(host, groups={"monitoring": {"hosts": {host: None}}}).decided["packages"]
    assert ("prometheus" in packages, "promtool" in packages) == (True, apart)


def test_rhel_needs_no_package_from_outside(render: Render) -> None:
    assert "ccache" not in render("rocky9").decided["packages"], "it is in EPEL alone"


def test_a_bundle_has_a_pack_for_each_kind(render: Render) -> None:
    kinds = {host: render(host).decided["bundle"] for host in ("debian12", "ubuntu2204", "alma9")}
    assert kinds == {"debian12": "debian-12-x86_64", "ubuntu2204": "ubuntu-22-x86_64", "alma9": "almalinux-9-aarch64"}


def changed(host: str, **own: Any) -> dict[str, Any]:
    """The facts of `host`, with others of host_facts'."""
    facts = HOSTS[host]
    return {"facts": facts | {"llamaherd": facts["llamaherd"] | own}}


RPC = {
    "groups": {"rpc": {"hosts": {"debian12": None}}},
    "llamaherd_rpc_workers": ["debian12"],
    "llamaherd_rpc_address": "10.0.0.2",
    "llamaherd_engine": "llama-server",
}

LAVAPIPE = {"llamaherd_accelerator": "vulkan", "llamaherd_server_devices": "0"}
CUDA = {"driver": "", "toolkit": "", "nvcc": "", "complaint": ""}
BROKEN = "Failed to initialize NVML: Driver/library version mismatch"
RELEASE = {"llamaherd_llama_cpp_method": "release", "llamaherd_engine": "llama-server"}
EMBEDDED = [tuning(model_file("smollm2-135m-instruct"), {"engine": "embedded"})]


@pytest.mark.parametrize(
    ("host", "variables", "expected"),
    [
        ("rocky9", {"llamaherd_install_packages": False}, "no python3.12; install Python 3.11 or newer"),
        ("rocky9", {"llamaherd_python": "/opt/python3.13"}, "set llamaherd_python to where it is"),
        ("macos", changed("macos", python="3.9"), "python3 is Python 3.9, older than 3.11"),
        ("debian12", {"llamaherd_models": []}, "llamaherd_models is empty"),
        ("debian12", {"llamaherd_nginx_port": 8080}, "8080 is wanted twice on debian12: llamaherd_server_port and"),
        ("debian12", {"llamaherd_settings": {"parallel": 0}}, "parallel 0 is out of range"),
        ("debian12", {"llamaherd_accelerator": "cuda"}, "set llamaherd_accelerator to auto or cpu"),
        ("debian13", {"llamaherd_accelerator": "vulkan"}, 'llamaherd_server_devices to "0" for a Vulkan driver'),
        ("debian12", LAVAPIPE, "needs Vulkan headers 1.3.275 or newer, and Debian 12.11 has 1.3.239; use Debian 13"),
        ("macos", LAVAPIPE, "set llamaherd_accelerator to auto or cpu"),
        ("cuda", changed("cuda", cuda=CUDA), "no driver"),
        ("cuda", changed("cuda", cuda=CUDA | {"complaint": BROKEN}), f"nvidia-smi says: {BROKEN}; fix the driver"),
        ("cuda", changed("cuda", gpus=[]), "install driver 510 or newer"),
        ("cuda", changed("cuda", cuda=CUDA | {"driver": "12.8", "toolkit": "13.0"}), "runs CUDA 12.8 at most"),
        ("debian12", {"llamaherd_bundle": "/nonexistent"}, "SHA256SUMS is missing"),
        ("debian12", RPC | {"llamaherd_rpc_address": "8.8.8.8"}, "'8.8.8.8', not an IPv4 address of a private network"),
        ("debian12", RPC | {"llamaherd_engine": "embedded"}, "set llamaherd_engine"),
        ("debian12", RPC | {"llamaherd_tuned": EMBEDDED}, "set llamaherd_engine"),
        ("debian12", RELEASE | {"llamaherd_tuned": EMBEDDED}, "an engine in tuned.yml takes precedence"),
        ("debian12", RPC | {"llamaherd_rpc_workers": ["other"]}, "has other, not in the group rpc"),
        (
            "debian12",
            {"llamaherd_server_otlp_headers_file": "/nowhere"},
            "('/nowhere') must be a file on the controller",
        ),
        ("debian12", {"llamaherd_server_otlp_headers_file": str(ROOT / "LICENSE")}, "whose lines are headers such as"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, host: str, variables: dict[str, Any], expected: str
) -> None:
    run = run_roles(tmp_path, host, variables)
    errors = [line for line in run.stdout.splitlines() if line.startswith("[ERROR]")]
    assert run.returncode != 0
    assert len(errors) == 1
    assert expected in errors[0]
