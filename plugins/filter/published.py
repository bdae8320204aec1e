"""Filters for playbooks/models.yml: how a published model fits a host, and where to put its entry in an inventory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.llamaherd.llamaherd.plugins.module_utils import gguf

VARIABLE = "llamaherd_models"
NEW_FILE = "---\n# What may be served; playbooks/models.yml adds to it, and leaves the rest as it is.\n"


def model_fits(
    found: Mapping[str, Any], settings: Mapping[str, Any], memory_bytes: int, free_bytes: int
) -> list[list[str]]:
    """Return a row of headings and a row for each choice that published_model `found`."""
    model = gguf.Shape(**found["shape"])
    given = {**gguf.DEFAULTS, **settings}
    longest = {**given, "ctx_per_slot": model.n_ctx_train}
    rows = [["model", "size", "needs", "has", "ctx_per_slot", "in all slots", "fits"]]
    for one in found["choices"]:
        left = memory_bytes - one["bytes"]
        settings = gguf.with_context(model, given, left)
        context = gguf.kv_bytes(model, settings) + gguf.compute_bytes(model, settings)
        largest = gguf.largest("ctx_per_slot", gguf.PADDING, model, longest, left)
        why = f"lacks {', '.join(one['missing'])}" if one["missing"] else _verdict(context, left, largest)
        if one["bytes"] > free_bytes:
            why = f"{why}, but not on the disk, where {_gib(free_bytes)} are left"
        name = one["quantization"] if one["quantization"] and len(found["choices"]) > 1 else one["file"]
        sizes = [_gib(size) for size in (one["bytes"], one["bytes"] + context, memory_bytes)]
        rows.append([name, *sizes, str(settings["ctx_per_slot"]), str(largest), why])
    return rows


def _verdict(context: float, left: float, largest: int) -> str:
    if context <= left:
        return "yes"
    return "with less context" if largest else "no"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def model_listing(entry: Mapping[str, Any], inventory_dir: str, inventory_file: str) -> dict[str, Any]:
    """Return the `path` to write `entry` to and its new `content`, or the `reason` why not; and the entry's `lines`.

    That is the file with llamaherd_models. If there is none, it is a new file in group_vars/all, or group_vars/all.yml
    if that exists. Of an existing entry with the same name, only sha256 and source change.
    """
    lines = _item(entry)
    listing = {"path": "", "content": "", "reason": "", "lines": [f"{VARIABLE}:", *(f"  {line}" for line in lines)]}
    places = [path for path in _sources(Path(inventory_dir), Path(inventory_file)) if VARIABLE in path.read_text()]
    places = [path for path in places if _models(_composed(path))]
    if len(places) > 1:
        return listing | {"reason": f"{VARIABLE} is in {' and in '.join(map(str, places))}"}
    path = places[0] if places else _new_place(Path(inventory_dir) / "group_vars")
    try:
        text = path.read_text() if path.exists() else NEW_FILE
        content = listed(text, entry) if places else _appended(text, lines)
    except ListingError as error:
        return listing | {"reason": f"{path} {error}"}
    return listing | {"path": str(path), "content": content}


class ListingError(ValueError):
    """The entry cannot be added to the text without changing other parts of it."""


def _sources(folder: Path, inventory: Path) -> Iterator[Path]:
    found = [inventory, *sorted(folder.glob("group_vars/**/*")), *sorted(folder.glob("host_vars/**/*"))]
    for path in dict.fromkeys(found):
        if path.is_file() and path.suffix in (".yml", ".yaml") and not path.name.startswith("."):
            yield path


def _new_place(group_vars: Path) -> Path:
    """Return the file for a new llamaherd_models. Ansible ignores group_vars/all.yml beside a directory `all`."""
    for name in ("all.yml", "all.yaml"):
        if (group_vars / name).exists() and not (group_vars / "all").exists():
            return group_vars / name
    return group_vars / "all/models.yml"


def _composed(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(), yaml.SafeLoader)
    except yaml.YAMLError:
        return None  # encrypted, or a syntax error that Ansible itself reports


def _models(node: yaml.Node | None) -> list[yaml.Node]:
    """Return the values of all llamaherd_models keys at any depth, because an inventory has variables in its groups."""
    if not isinstance(node, yaml.MappingNode):
        return []
    own = [value for key, value in node.value if key.value == VARIABLE]
    return own + [one for _key, value in node.value for one in _models(value)]


def listed(text: str, entry: Mapping[str, Any]) -> str:
    """Return `text` with `entry` in its llamaherd_models. Raises ListingError if that is not possible."""
    nodes = _models(yaml.compose(text, yaml.SafeLoader))
    if len(nodes) != 1 or not isinstance(nodes[0], yaml.SequenceNode):
        raise ListingError(f"has {VARIABLE} more than once, or not as a list")
    models = nodes[0]
    same = [one for one in models.value if _keys(one).get("name", ("", None))[0] == entry["name"]]
    if len(same) > 1:
        raise ListingError(f"lists {entry['name']} twice")
    if same:
        changed = _replaced(text, _keys(same[0]), entry)
    elif not models.value:
        lines = "".join(f"\n{' ' * models.start_mark.column}{line}" for line in _item(entry))
        changed = text[: models.start_mark.index].rstrip(" ") + lines + text[models.end_mark.index :]
    elif models.flow_style:
        raise ListingError(f"has {VARIABLE} between brackets, to which nothing is added")
    else:
        at = text.find("\n", _end(models))
        head, tail = (text[: at + 1], text[at + 1 :]) if at >= 0 else (f"{text}\n", "")
        indent = " " * models.start_mark.column
        changed = head + "".join(f"{indent}{line}\n" for line in _item(entry)) + tail
    _verify(text, changed, entry)
    return changed


def _keys(node: yaml.Node) -> dict[str, tuple[Any, yaml.Node]]:
    """Return the keys of an entry, each with its value (None unless a scalar) and the node of its value."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: (value.value if isinstance(value, yaml.ScalarNode) else None, value) for key, value in pairs}


def _replaced(text: str, keys: Mapping[str, tuple[Any, yaml.Node]], entry: Mapping[str, Any]) -> str:
    spans = []
    for key in ("sha256", "source"):
        if key not in keys:
            raise ListingError(f"has an entry {entry['name']} without {key}")
        node = keys[key][1]
        if _plain(node) != _plain(yaml.compose(_flow(entry[key]), yaml.SafeLoader)):
            spans.append((node.start_mark.index, _end(node), _flow(entry[key])))
    for start, end, new in sorted(spans, reverse=True):
        if "#" in text[start:end] or "&" in text[start:end] or not start:
            raise ListingError(f"has comments or anchors within sha256 or source of {entry['name']}")
        text = text[:start] + new + text[end:]
    return text


def _end(node: yaml.Node) -> int:
    """Return the index where the node's text ends. The end mark of a block is only after the comments that follow."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _plain(node: Any) -> Any:
    """Return the content of a node, independent of its style. Tags such as !vault count."""
    if isinstance(node, yaml.MappingNode):
        return node.tag, {_plain(key): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return node.tag, [_plain(one) for one in node.value]
    return (node.tag, node.value) if node else None


def _verify(before: str, after: str, entry: Mapping[str, Any]) -> None:
    """Raise ListingError unless the two texts differ only in the entry."""
    old, new = (yaml.compose(text, yaml.SafeLoader) for text in (before, after))
    [models], [changed] = _models(old), _models(new)
    [wanted] = [one for one in changed.value if _keys(one).get("name", ("", None))[0] == entry["name"]]
    for key in ("sha256", "source"):
        if _plain(_keys(wanted)[key][1]) != _plain(yaml.compose(_flow(entry[key]), yaml.SafeLoader)):
            raise ListingError(f"is such that {key} of {entry['name']} cannot be changed in it")
    for node in (models, changed):
        node.value = [one for one in node.value if _keys(one).get("name", ("", None))[0] != entry["name"]]
    if _plain(old) != _plain(new):
        raise ListingError("is such that more than the entry would change")


def _appended(text: str, lines: Sequence[str]) -> str:
    gap = "" if text in ("", NEW_FILE) else "\n"
    return "\n".join([text.rstrip("\n") + gap, f"{VARIABLE}:", *(f"  {line}" for line in lines), ""])


def _item(entry: Mapping[str, Any]) -> list[str]:
    sums = entry["sha256"]
    several = ["  sha256:", *(f"    - {_flow(one)}" for one in sums)]
    return [
        f"- name: {_flow(entry['name'])}",
        *([f"  sha256: {_flow(sums)}"] if isinstance(sums, str) else several),
        f"  source: {_flow(entry['source'])}",
    ]


def _flow(value: Any) -> str:
    """Return a value as one line of YAML. The detour through JSON converts Ansible's string types to plain strings."""
    plain = [json.loads(json.dumps(value))]
    line = yaml.safe_dump(plain, default_flow_style=True, width=1 << 30, allow_unicode=True, sort_keys=False)
    return str(line).strip()[1:-1]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"model_fits": model_fits, "model_listing": model_listing}
