"""published_model: finds the files of a published GGUF model and reads its header before anything is downloaded."""

from __future__ import annotations

DOCUMENTATION = r"""
module: published_model
short_description: Finds the files of a published GGUF model and reads its header
version_added: 0.1.0
description:
  - Lists the GGUF models of a repository of the hub with their sizes, commit and sha256, or finds the one that is
    named, and reads the header by range requests. Nothing is downloaded and nothing is changed.
  - Projectors (mmproj) and importance matrices are not listed. The parts of a split model are listed as one model.
options:
  model:
    description:
      - C(hf:owner/repo), C(hf:owner/repo:Q4_K_M), C(hf:owner/repo@commit:Q4_K_M), C(hf:owner/repo/file.gguf), the
        URL of a GGUF file, or the path of one.
    type: str
    required: true
  name:
    description: The name of the entry. Defaults to the name of the repository or file.
    type: str
    default: ''
  sha256:
    description:
      - The sha256 of the file at a URL, or the comma-separated sums of its parts. Not needed for the hub, which states
        them.
    type: list
    elements: str
    default: []
  hub_url:
    description: The URL of the hub or of a mirror.
    type: str
    required: true
  hub_token:
    description: A token for gated repositories.
    type: str
    default: ''
  https_token:
    description: A bearer token for other URLs.
    type: str
    default: ''
author: ["The llamaherd authors (!UNKNOWN)"]
"""

EXAMPLES = r"""
- name: Find a quantization of a model
  llamaherd.llamaherd.published_model:
    model: hf:Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M
    hub_url: "{{ llamaherd_model_hf_url }}"
  delegate_to: localhost
  register: published
"""

RETURN = r"""
entry:
  description: The entry of C(llamaherd_models). Empty if the model names no quantization.
  returned: success
  type: dict
choices:
  description:
    - The models that were found, the smallest first, each with C(quantization), C(file) (the first part), C(parts),
      C(bytes), C(sha256) and C(source). If one is named, that one.
  returned: success
  type: list
  elements: dict
shape:
  description: The values of the header from which the needed memory is computed.
  returned: success
  type: dict
"""

import difflib
import hashlib
import re
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.gguf import (
    GgufError,
    check_parts,
    part_names,
    part_paths,
    read_header,
    read_keys,
    shape,
)
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.hub import Hub, HubError

_REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:/]+|refs/[^:]+))?(?::([\w.-]+)|/(.+))?")
_QUANTIZATION = re.compile(
    r"(?<![A-Z0-9])((?:UD-)?(?:I?Q|TQ)[0-9](?:_[A-Z0-9]+)*|BF16|F16|F32|FP16|MXFP4(?:_MOE)?)(?![A-Z0-9])"
)
_NO_MODEL = re.compile("mmproj|imatrix", re.IGNORECASE)
Choice = dict[str, Any]


def quantization(path: str) -> str:
    """Return the last word of a file name that is a quantization, or ""."""
    found = _QUANTIZATION.findall(PurePosixPath(path).name.upper())
    return found[-1] if found else ""


def choices(repo: str, commit: str, files: list[dict[str, Any]]) -> list[Choice]:
    """Return the models among the files of a repository, smallest first. `missing` lists parts that it lacks."""
    ggufs = {one["path"]: one for one in files if one["path"].endswith(".gguf") and not _NO_MODEL.search(one["path"])}
    found = []
    for first in dict.fromkeys(part_names(path)[0] for path in ggufs):
        parts = part_names(first)
        there = [ggufs[path] for path in parts if path in ggufs]
        sums = [one["sha256"] for one in there]
        found.append(
            {
                "quantization": quantization(first),
                "file": first,
                "parts": len(parts),
                "missing": [path for path in parts if path not in ggufs],
                "bytes": sum(one["size"] for one in there),
                "sha256": sums if len(parts) > 1 else sums[0],
                "source": {"kind": "hf", "repo": repo, "file": first, "revision": commit},
            }
        )
    return sorted(found, key=lambda one: (one["bytes"], one["file"]))


def chosen(repo: str, found: list[Choice], wanted: str, file: str) -> Choice:
    """Return the choice with this quantization or file. Raises HubError unless there is exactly one."""
    if file:
        if _NO_MODEL.search(file):
            raise HubError(f"{file} is a projector or an importance matrix, not a model")
        first = part_names(file)[0]
        fits = [one for one in found if one["file"] == first] or [
            one for one in found if PurePosixPath(one["file"]).name == PurePosixPath(first).name
        ]
    else:
        fits = [one for one in found if one["quantization"] == wanted.upper()]
    if len(fits) > 1:
        names = ", ".join(one["file"] for one in fits)
        raise HubError(f"{repo} has {len(fits)} models {wanted or file}: {names}; name one as hf:{repo}/FILE")
    if not fits:
        offered = list(dict.fromkeys(one["file" if file else "quantization"] or one["file"] for one in found))
        near = difflib.get_close_matches(file or wanted.upper(), offered, n=1, cutoff=0.3)
        nearest = f"; the nearest is {near[0]}" if near else ""
        raise HubError(f"{repo} has no {file or wanted}{nearest}; it has {', '.join(offered)}")
    if fits[0]["missing"]:
        raise HubError(f"{repo}: of the {fits[0]['parts']} parts {', '.join(fits[0]['missing'])} is missing")
    if not all(fits[0]["sha256"]):
        raise HubError(f"{repo}: the hub states no sha256 of {fits[0]['file']}: it is not a large file there")
    return fits[0]


class Search:
    """One search with the module's parameters. Raises HubError, GgufError, OSError."""

    def __init__(self, params: dict[str, Any]) -> None:
        self._params = params
        self._hub = Hub(params["hub_url"], params["hub_token"])

    def run(self) -> dict[str, Any]:
        model = self._named()
        if model.startswith("hf:"):
            return self._on_hub(model)
        return self._address(model) if re.match("https?://", model) else self._local(model)

    def _named(self) -> str:
        """Return the model, with the URL of a page or file of the hub converted to hf:…."""
        model = str(self._params["model"])
        if not model.startswith(f"{self._hub.url}/"):
            return model
        rest = model[len(self._hub.url) + 1 :].partition("?")[0]
        found = re.fullmatch(r"([^/]+/[^/]+)(?:/(?:resolve|blob|tree)/([^/]+)(?:/(.+))?)?/?", rest)
        if not found:
            raise HubError(f"{model} is not the page of a model or file on the hub")
        return f"hf:{found[1]}{f'@{found[2]}' if found[2] else ''}{f'/{found[3]}' if found[3] else ''}"

    def _on_hub(self, model: str) -> dict[str, Any]:
        parsed = _REPOSITORY.fullmatch(model)
        if not parsed:
            raise HubError(f"{model} is not hf:owner/repo[@commit][:QUANTIZATION] or hf:owner/repo[@commit]/file.gguf")
        repo, revision, wanted, file = parsed[1], parsed[2] or "main", parsed[3] or "", parsed[4] or ""
        commit, files = self._hub.listing(repo, revision)
        found = choices(repo, commit, files)
        if not found:
            raise HubError(f"{repo} has no GGUF model: look for a repository of its GGUFs, often named {repo}-GGUF")
        if wanted or file:
            found = [chosen(repo, found, wanted, file)]
        # Quantizations of a model share one shape, so one header is enough; a model that is named is read itself.
        first = next((one for one in found if not one["missing"]), found[0])
        header = self._header(self._hub, self._hub.address(repo, commit, first["file"]), f"{repo}/{first['file']}")[0]
        _check_split(header, first["parts"])
        stem = re.sub("[-_.]gguf$", "", repo.rpartition("/")[2], flags=re.IGNORECASE)
        return self._result(found, header, stem, listed=not (wanted or file))

    def _address(self, url: str) -> dict[str, Any]:
        names = part_names(url.partition("?")[0])
        if len(names) > 1:
            raise HubError(f"{url} is one of {len(names)} parts: list their sha256 by hand, or name a repository")
        sums = self._params["sha256"]
        if len(sums) != 1:
            raise HubError(f"{url}: a server does not state a sha256; give it with -e model_sha256=…, as published")
        header, size = self._header(Hub(url, self._params["https_token"], "llamaherd_model_https_token"), url, url)
        source = {"kind": "https", "url": url}
        return self._result([_single(names[0], size, sums[0], source)], header, _stem(names[0]))

    def _local(self, name: str) -> dict[str, Any]:
        path = Path(name).absolute()
        files = part_paths(path)
        if missing := [str(file) for file in files if not file.is_file()]:
            raise HubError(f"{', '.join(missing)} is not there on this machine; a model of the hub is hf:owner/repo")
        headers = [read_header(file) for file in files]
        check_parts(headers)
        sums = [_digest(file) for file in files]
        source = {"kind": "file", "path": str(files[0])}
        size = sum(file.stat().st_size for file in files)
        one = _single(files[0].name, size, sums if len(sums) > 1 else sums[0], source) | {"parts": len(files)}
        return self._result([one], headers[0], _stem(files[0].name))

    def _header(self, hub: Hub, url: str, what: str) -> tuple[dict[str, Any], int]:
        with hub.file(url, what) as file:
            try:
                return dict(read_keys(cast(BinaryIO, file), file.size or 1 << 62)), file.size
            except GgufError as error:
                raise HubError(f"{what} is not a usable GGUF: {error}") from None

    def _result(
        self, found: list[Choice], header: dict[str, Any], stem: str, *, listed: bool = False
    ) -> dict[str, Any]:
        kind = header.get("general.type", "model")
        if kind != "model":
            raise HubError(f"{found[0]['file']} is of type {kind} by its header, not a model")
        name = self._params["name"] or re.sub(r"[^\w.-]+", "-", stem.lower())
        entry = {} if listed else {"name": name, "sha256": found[0]["sha256"], "source": found[0]["source"]}
        return {"entry": entry, "choices": found, "shape": asdict(shape(header))}


def _check_split(header: dict[str, Any], parts: int) -> None:
    if (count := header.get("split.count", 0) or 1) != parts:
        raise HubError(f"its header has split.count {count}, the repository has {parts} parts of that name")


def _single(file: str, size: int, sha256: Any, source: dict[str, str]) -> Choice:
    named = {"quantization": quantization(file), "file": PurePosixPath(file).name, "parts": 1, "missing": []}
    return {**named, "bytes": size, "sha256": sha256, "source": source}


def _stem(file: str) -> str:
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", PurePosixPath(file).name)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "model": {"type": "str", "required": True},
            "name": {"type": "str", "default": ""},
            "sha256": {"type": "list", "elements": "str", "default": []},
            "hub_url": {"type": "str", "required": True},
            "hub_token": {"type": "str", "default": "", "no_log": True},
            "https_token": {"type": "str", "default": "", "no_log": True},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, **Search(module.params).run())
    except (HubError, GgufError, OSError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
