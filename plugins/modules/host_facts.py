"""host_facts: reads memory, accelerators, ports and free space of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_facts
short_description: Reads memory, accelerators, ports and free space of a host
version_added: 0.1.0
description:
  - Sets C(ansible_facts.llamaherd), the facts that the roles need beyond those of M(ansible.builtin.setup), in one
    call.
  - Changes nothing.
options:
  paths:
    description: Paths whose free space is read, each from its nearest existing parent directory.
    type: list
    elements: path
    default: []
  links:
    description: Paths whose link targets are read.
    type: list
    elements: str
    default: []
  packages:
    description: Debian packages that are looked up.
    type: list
    elements: str
    default: []
  programs:
    description: Programs that are looked up in PATH.
    type: list
    elements: str
    default: []
  python:
    description: The Python interpreter whose version is read.
    type: str
    required: true
author: ["The llamaherd authors (!UNKNOWN)"]
"""

EXAMPLES = r"""
- name: Read memory, accelerators and ports of the host
  llamaherd.llamaherd.host_facts:
    python: python3
    paths: [/opt]

- name: Print the accelerator of the host
  ansible.builtin.debug:
    msg: "{{ ansible_facts['llamaherd']['accelerator'] }}"
"""

RETURN = r"""
ansible_facts:
  description: The facts, below the key C(llamaherd).
  returned: success
  type: dict
  contains:
    llamaherd:
      description: All facts of this module.
      returned: success
      type: dict
      contains:
        memory_bytes:
          description: Physical memory, or the limit of the control group where that is lower.
          type: int
        libc:
          description: Name and version of the C library.
          type: str
          sample: glibc 2.36
        accelerator:
          description: The best accelerator of the host. One of V(cpu), V(cuda), V(metal), V(rocm), V(vulkan).
          type: str
        accelerator_reason:
          description: Why that accelerator was chosen.
          type: str
        accelerator_memory_bytes:
          description: Memory of the accelerator. 0 for V(cpu), and where it has none of its own or does not report it.
          type: int
        gpus:
          description: NVIDIA GPUs, each with name, architecture, memory_bytes and driver.
          type: list
          elements: dict
        cuda:
          description:
            - C(driver) is the newest CUDA version that the driver supports, C(toolkit) the version of the
              installed toolkit, C(nvcc) its compiler and C(complaint) the error of nvidia-smi. Missing ones are
              empty strings.
          type: dict
        rocm:
          description: C(root) and C(compiler) of ROCm. Missing ones are empty strings.
          type: dict
        vulkan:
          description:
            - C(nodes), the render nodes of GPUs, each with path, PCI vendor and memory_bytes, and C(headers), the
              version of the installed Vulkan headers. Missing ones are empty.
          type: dict
        python:
          description: The version of O(python) as C(major.minor), or an empty string.
          type: str
        listeners:
          description: Listening TCP sockets, each with port, address, pid, command and unit.
          type: list
          elements: dict
        nginx:
          description:
            - C(sites) of the host that llamaherd does not own, each with path and listens, and C(complaint), the
              first error of nginx -t.
          type: dict
        links:
          description: The target of each of O(links) that is a link.
          type: dict
        installed:
          description: Those of O(packages) that are installed.
          type: list
          elements: str
        programs:
          description: Those of O(programs) that are in PATH.
          type: list
          elements: str
        free_bytes:
          description: The free space of each of O(paths).
          type: dict
"""

import os
import platform
import re
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.nginx import nginx

_LISTEN = "0A"
_LOCAL = Path("/usr/local")
_DRM = Path("/sys/class/drm")
_DRI = Path("/dev/dri")
_VULKAN_HEADER = Path("/usr/include/vulkan/vulkan_core.h")
_VULKAN_VENDORS = {"0x1002": "an AMD GPU", "0x8086": "an Intel GPU"}  # NVIDIA (0x10de) has CUDA
_PATIENCE_S = 60  # nvidia-smi can hang forever on a broken card


def memory_bytes() -> int:
    """Return the physical memory in bytes, or the limit of the control group if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path).strip()
        if text.isdigit():
            total = min(total, int(text))
    return total


def accelerator(nvidia: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the host's best accelerator, the reason, and its memory in bytes. `nvidia` is the result of `gpus`."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return {
            "accelerator": "metal",
            "accelerator_reason": "Apple silicon",
            "accelerator_memory_bytes": memory_bytes(),
        }
    devices = [str(path) for path in (*Path("/proc/driver/nvidia/gpus").glob("*"), *Path("/dev").glob("nvidia[0-9]*"))]
    if devices:
        return {
            "accelerator": "cuda",
            "accelerator_reason": f"an NVIDIA device ({sorted(devices)[0]})",
            "accelerator_memory_bytes": sum(gpu["memory_bytes"] for gpu in nvidia),
        }
    if Path("/dev/kfd").exists() and rocm()["root"]:
        memory = map(_read, map(str, Path("/sys/class/drm").glob("card*/device/mem_info_vram_total")))
        return {
            "accelerator": "rocm",
            "accelerator_reason": "an AMD device (/dev/kfd) and ROCm",
            "accelerator_memory_bytes": sum(map(int, memory)),
        }
    if nodes := [node for node in render_nodes() if node["vendor"] in _VULKAN_VENDORS]:
        return {
            "accelerator": "vulkan",
            "accelerator_reason": f"{_VULKAN_VENDORS[nodes[0]['vendor']]} ({nodes[0]['path']})",
            "accelerator_memory_bytes": sum(node["memory_bytes"] for node in nodes),
        }
    reason = "no NVIDIA device in /proc/driver/nvidia or /dev, no AMD or Intel GPU in /dev/dri, and no Apple silicon"
    return {"accelerator": "cpu", "accelerator_reason": reason, "accelerator_memory_bytes": 0}


def gpus() -> list[dict[str, Any]]:
    """Return NVIDIA's GPUs according to nvidia-smi, with CMake's `architecture`: 90 for compute capability 9.0.

    GPUs that share the host's memory (Grace, Jetson, DGX Spark) report [N/A] for their own.
    """
    answer = _output(
        "nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"
    )
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines()]
    return [
        {
            "name": name,
            "architecture": capability.replace(".", ""),
            "memory_bytes": int(mib) << 20 if mib.isdigit() else memory_bytes(),
            "driver": driver,
        }
        for name, capability, mib, driver in (row for row in rows if len(row) == 4)
        if re.fullmatch(r"\d+\.\d+", capability)
    ]


def cuda() -> dict[str, str]:
    """Return versions of driver and toolkit as `major.minor`.

    Prefers toolkits that the driver supports, then the one in PATH, then the newest.
    """
    said = _output("nvidia-smi").strip()
    driver = _version(r"CUDA(?: \w+)? Version *: *(\d+\.\d+)", said)
    missing = "its driver has no libcuda" if "Driver Version" in said else said.partition("\n")[0]
    on_path = shutil.which("nvcc") or ""
    places = sorted({on_path, *map(str, _LOCAL.glob("cuda*/bin/nvcc"))})
    toolkits = {nvcc: _version(r"release (\d+\.\d+)", _output(nvcc, "--version")) for nvcc in places}

    def rank(nvcc: str) -> tuple[bool, bool, tuple[int, ...]]:
        version = _number(toolkits[nvcc])
        return version[:1] <= _number(driver)[:1], nvcc == on_path, version

    nvcc = max(filter(toolkits.get, toolkits), key=rank, default="")
    return {
        "driver": driver,
        "toolkit": toolkits.get(nvcc, ""),
        "nvcc": nvcc,
        "complaint": "" if driver else missing,
    }


def rocm() -> dict[str, str]:
    """Return the root of ROCm and its C++ compiler according to hipconfig; empty strings without ROCm."""
    hipconfig = shutil.which("hipconfig") or "/opt/rocm/bin/hipconfig"
    root, programs = _output(hipconfig, "--rocmpath").strip(), _output(hipconfig, "--hipclangpath").strip()
    return {"root": root, "compiler": f"{programs}/clang++" if programs else ""}


def render_nodes() -> list[dict[str, Any]]:
    """Return the render nodes of GPUs: path, PCI vendor, and memory in bytes (0 if shared or not reported).

    amdgpu reports a memory vendor only for a card's own chips, not for host memory that the firmware reserves for it.
    Mesa's software device has no render node.
    """
    found = []
    for path in sorted(_DRI.glob("renderD*")):
        device = _DRM / path.name / "device"
        own = _read(f"{device}/mem_info_vram_vendor").strip() not in ("", "unknown")
        memory = int(_read(f"{device}/mem_info_vram_total") or 0) if own else 0
        if vendor := _read(f"{device}/vendor").strip():
            found.append({"path": str(path), "vendor": vendor, "memory_bytes": memory})
    return found


def vulkan_headers() -> str:
    """Return the version of the Vulkan headers, such as 1.4.309, or "" without headers."""
    text = _read(str(_VULKAN_HEADER))
    complete = _version(r"VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+, \d+), VK_HEADER_VERSION\)", text)
    patch = _version(r"#define VK_HEADER_VERSION (\d+)", text)
    return f"{complete.replace(', ', '.')}.{patch}" if complete and patch else ""


def _version(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _output(*command: str) -> str:
    """Return what `command` prints, "" if the program does not exist, or a complaint after a timeout."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        # AnsibleModule's run_command has no timeout. pylint: disable-next=ansible-bad-function
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S).stdout
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not answer"


def free_bytes(path: str) -> int:
    """Return the free space in bytes at `path` or at its nearest existing parent."""
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def installed(packages: list[str]) -> list[str]:
    """Return those of `packages` that dpkg has installed. Reads its status file, because apt takes seconds."""
    found = re.findall(r"^Package: (\S+)\nStatus: \S+ ok installed$", _read("/var/lib/dpkg/status"), re.MULTILINE)
    return sorted(set(packages).intersection(found))


def listeners() -> list[dict[str, Any]]:
    """Return listening TCP sockets (Linux), each with its process and systemd unit if this user may see them."""
    found: dict[str, dict[str, Any]] = {}
    for path, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in _read(path).splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, port = fields[1].split(":")
                found[fields[9]] = {"port": int(port, 16), "address": _address(address, family)}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            inode = str(link.readlink()).removeprefix("socket:[").removesuffix("]")
        except OSError:
            continue
        if inode in found and "pid" not in found[inode]:
            pid = int(link.parts[2])
            found[inode] |= {"pid": pid, "command": _read(f"/proc/{pid}/comm").strip(), "unit": _unit(pid)}
    return [{"pid": 0, "command": "", "unit": ""} | entry for entry in found.values()]


def _address(text: str, family: int) -> str:
    raw = bytes.fromhex(text)
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    return socket.inet_ntop(family, struct.pack(f">{len(words)}I", *words))


def _unit(pid: int) -> str:
    found = re.search(r"/([^/]+\.service)(?:/|$)", _read(f"/proc/{pid}/cgroup"), re.MULTILINE)
    return found.group(1) if found else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "default": []},
            "links": {"type": "list", "elements": "str", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "programs": {"type": "list", "elements": "str", "default": []},
            "python": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    nvidia = gpus()
    facts = {
        "memory_bytes": memory_bytes(),
        "libc": " ".join(platform.libc_ver()),
        **accelerator(nvidia),
        "gpus": nvidia,
        "cuda": cuda(),
        "rocm": rocm(),
        "vulkan": {"nodes": render_nodes(), "headers": vulkan_headers()},
        "python": _version(r"Python (\d+\.\d+)", _output(module.params["python"], "--version")),
        "listeners": listeners(),
        "nginx": nginx(),
    }
    facts["links"] = {path: str(Path(path).readlink()) for path in module.params["links"] if Path(path).is_symlink()}
    facts["installed"] = installed(module.params["packages"])
    facts["programs"] = [name for name in module.params["programs"] if shutil.which(name)]
    facts["free_bytes"] = {path: free_bytes(path) for path in module.params["paths"]}
    module.exit_json(changed=False, ansible_facts={"llamaherd": facts})


if __name__ == "__main__":
    main()
