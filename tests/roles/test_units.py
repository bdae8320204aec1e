"""Units as systemd and launchd get them: what they may open, see and take on each kind of host."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llamaherd_server.config import settings
from tests.roles.conftest import Render, Rendered

DEVICES = {
    "cuda": ["/dev/nvidiactl", "char-nvidia", "char-nvidia-frontend", "char-nvidia-uvm", "char-nvidia-caps"],
    "rocm": ["char-kfd", "char-drm"],
    "vulkan": ["char-drm"],
}
OWNERS = {"cuda": ["video"], "rocm": ["render"], "vulkan": ["render"]}


def test_the_units_sandbox_opens_for_the_accelerator_only(rendered: Rendered) -> None:
    unit = rendered.text("llamaherd-server.service")
    devices = DEVICES.get(rendered.decided["accelerator"], [])
    assert re.findall(r"^DeviceAllow=(\S+) rw$", unit, re.MULTILINE) == devices
    owners = OWNERS.get(rendered.decided["accelerator"], [])
    assert re.findall(r"^SupplementaryGroups=(\S+)$", unit, re.MULTILINE) == owners
    for setting in ("PrivateDevices=yes\n", "MemoryDenyWriteExecute=yes\n"):
        assert (setting in unit) == (not devices)


def test_vulkan_on_an_nvidia_card_opens_its_drivers_devices(render: Render) -> None:
    sdk = {"llamaherd_environment": {"VULKAN_SDK": "/opt/sdk"}}  # for Ubuntu 22.04's headers are too old
    unit = render("cuda", llamaherd_accelerator="vulkan", **sdk).text("llamaherd-server.service")
    assert re.findall(r"^DeviceAllow=(\S+) rw$", unit, re.MULTILINE) == [*DEVICES["cuda"], *DEVICES["vulkan"]]
    assert "Wants=llamaherd-nvidia.service\n" in unit


def test_a_software_device_needs_no_group_that_only_hosts_with_gpus_have(render: Render) -> None:
    unit = render("debian13", llamaherd_accelerator="vulkan", llamaherd_server_devices="0")
    text = unit.text("llamaherd-server.service")
    assert "Environment=GGML_VK_VISIBLE_DEVICES=0\n" in text
    assert "SupplementaryGroups" not in text


def test_every_card_gets_its_device(render: Render, tmp_path: Path) -> None:
    [script] = re.findall(
        r'^ExecStart=/bin/sh -c "(.*)"$', render("cuda").text("llamaherd-nvidia.service"), re.MULTILINE
    )
    for minor in (0, 1):
        card = tmp_path / f"gpus/0000:0{minor}:00.0/information"
        card.parent.mkdir(parents=True)
        card.write_text(f"Model: \t\t NVIDIA L4\nDevice Minor: \t {minor}\n")
    for there, here in (("\\\\", "\\"), ("/proc/driver/nvidia", str(tmp_path)), ("/usr/bin/nvidia-modprobe", "echo")):
        script = script.replace(there, here)
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == "-c 0\n-c 1\n"


def test_a_server_on_loopback_reaches_nothing_else(debian: Rendered) -> None:
    unit = debian.text("llamaherd-server.service").splitlines()
    assert {"SystemCallErrorNumber=EPERM", "IPAddressDeny=any", "IPAddressAllow=localhost"} <= set(unit)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd itself judges")
@pytest.mark.parametrize(
    ("host", "name", "most"),
    [
        ("debian12", "llamaherd-server", 1.5),
        ("cuda", "llamaherd-server", 2.5),
        ("rocm", "llamaherd-server", 2.5),
        ("vulkan", "llamaherd-server", 2.5),
        ("debian12", "llamaherd-rpc", 1.5),
        ("cuda", "llamaherd-rpc", 2.5),
        ("rocm", "llamaherd-rpc", 2.5),
        ("debian12", "llamaherd-open-webui", 1.5),
    ],
)
def test_what_systemd_thinks_of_the_sandbox(render: Render, host: str, name: str, most: float) -> None:
    unit = render(host).folder / f"{name}.service"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    verdict = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    exposure = re.search(rf"exposure level for {name}\.service: (\d+\.\d+)", verdict)
    assert exposure, verdict
    assert 0 < float(exposure[1]) <= most


def test_limits_reach_the_unit(render: Render) -> None:
    limits = {"memory_max": "20G", "cpu_quota": "400%", "nice": 5}
    unit = render("debian12", **{f"llamaherd_server_{name}": value for name, value in limits.items()})
    text = unit.text("llamaherd-server.service")
    assert all(line in text for line in ("MemoryMax=20G\n", "CPUQuota=400%\n", "Nice=5\n"))


def test_a_unit_has_the_hosts_memory_at_most_and_is_started_again_for_ever(debian: Rendered) -> None:
    text = debian.text("llamaherd-server.service")
    most = re.search(r"^MemoryMax=(\d+)$", text, re.MULTILINE)
    assert most
    assert int(most[1]) > 0
    assert "StartLimitIntervalSec=0\n" in text


def test_stopping_waits_longer_than_draining(render: Render) -> None:
    unit = render("debian12", llamaherd_server_drain_timeout_s=90)
    assert "TimeoutStopSec=120\n" in unit.text("llamaherd-server.service")
    assert settings.load(unit.folder / "server.toml").limits.drain_timeout_s == 90


def test_computed_prompts_have_a_folder_unless_there_is_to_be_none(render: Render, debian: Rendered) -> None:
    folder = str(debian.state_dir / "prompts/server")
    assert f"ReadWritePaths={folder}\n" in debian.text("llamaherd-server.service")
    assert str(settings.load(debian.folder / "server.toml").limits.prompt_cache_dir) == folder
    without = render("debian12", llamaherd_server_prompt_cache_dir="")
    assert "/prompts" not in without.text("llamaherd-server.service")
    assert settings.load(without.folder / "server.toml").limits.prompt_cache_dir is None


def test_usage_is_counted_into_a_folder_of_the_state_directory(debian: Rendered) -> None:
    folder = debian.state_dir / "usage"
    assert f"ReadWritePaths=-{folder}\n" in debian.text("llamaherd-server.service")
    assert settings.load(debian.folder / "server.toml").limits.usage_dir == folder


# launchd.plist(5): what a daemon has, and no key that launchd does not know or takes as another type.
LAUNCHD = {
    **dict.fromkeys(["Label", "UserName", "GroupName", "StandardOutPath", "StandardErrorPath"], str),
    **dict.fromkeys(["ThrottleInterval", "ExitTimeOut", "Umask"], int),
    **{"ProgramArguments": list, "EnvironmentVariables": dict, "RunAtLoad": bool, "KeepAlive": dict},
}


def test_the_launchd_daemon(rendered: Rendered) -> None:
    daemon = plistlib.loads(rendered.text("org.llamaherd.server.plist").encode())
    assert {key: type(value) for key, value in daemon.items()} == LAUNCHD
    assert {type(one) for one in [*daemon["ProgramArguments"], *daemon["EnvironmentVariables"].values()]} == {str}
    assert daemon["Label"] == "org.llamaherd.server"
    assert daemon["ProgramArguments"][1:4] == ["-m", "llamaherd_server", "--config"]
    assert daemon["UserName"] == "llamaherd"
    assert daemon["RunAtLoad"] is True
    assert daemon["KeepAlive"] == {"SuccessfulExit": False}
    assert daemon["EnvironmentVariables"]["MTMD_CPP_LIB"].endswith("/llama.cpp/current/lib")


@pytest.mark.parametrize(
    ("host", "name"),
    [("cuda", "CUDA_VISIBLE_DEVICES"), ("rocm", "HIP_VISIBLE_DEVICES"), ("vulkan", "GGML_VK_VISIBLE_DEVICES")],
)
def test_a_server_sees_its_gpus_only(render: Render, host: str, name: str) -> None:
    assert f"Environment={name}=0,1\n" in render(host, llamaherd_server_devices="0,1").text("llamaherd-server.service")
