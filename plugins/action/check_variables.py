"""check_variables: checks every llamaherd_* variable of a host against the argument_specs of all roles.

Before anything changes, fails with one line for each mistake: an unknown name with the nearest known one, a wrong
type, a value outside its choices or in a wrong format (module_utils/value_formats.py), a missing or unknown key. Runs
on the controller and never connects to a host.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError, AnsibleUndefinedVariable
from ansible.plugins.action import ActionBase
from ansible_collections.llamaherd.llamaherd.plugins.module_utils.value_formats import format_mistakes

PREFIX = "llamaherd_"
ROLES = Path(__file__).resolve().parents[2] / "roles"
Spec = Mapping[str, Any]
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "path": ((str,), "a path"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "dict": ((Mapping,), "a mapping"),
    "list": ((list, tuple), "a list"),
}


@lru_cache(maxsize=1)
def known_variables() -> dict[str, Spec]:
    """Return the specs of all documented variables of all roles, by name."""
    known: dict[str, Spec] = {}
    for path in sorted(ROLES.glob("*/meta/argument_specs.yml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"].values():
            known |= entry.get("options", {})
    return known


def unknown_variable(name: str, known: Mapping[str, Spec]) -> str:
    """Return the message for an unknown name. Suggests keys of mappings too, as for llamaherd_parallel."""
    candidates = {key.removeprefix(PREFIX): key for key in known}
    for variable, spec in known.items():
        if spec.get("type") == "dict":
            candidates = {key: f"{variable}.{key}" for key in spec.get("options", {})} | candidates
    return f"{name} is not a llamaherd variable{nearest(name.removeprefix(PREFIX), candidates)}"


def nearest(name: str, candidates: Mapping[str, str]) -> str:
    found = difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean {candidates[found[0]]}?" if found else f"; known: {', '.join(sorted(candidates.values()))}"


def mistakes(name: str, value: Any, spec: Spec) -> Iterator[str]:
    """Yield a message for each way in which `value` breaks the rules of an argument_specs entry."""
    if value is None:
        yield f"{name} is null: give it a value, or remove it, which leaves it at its default"
        return
    types, words = _TYPES.get(spec.get("type", "str"), ((object,), "anything"))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
        yield f"{name} must be {words}, not {_shown(value)}{_hint(name, value, spec)}"
    elif "choices" in spec and value not in spec["choices"]:
        yield f"{name} must be one of {', '.join(map(str, spec['choices']))}, not {_shown(value)}"
    elif isinstance(value, Mapping) and "options" in spec:
        yield from _mapping_mistakes(name, value, spec["options"])
    elif isinstance(value, (list, tuple)):
        element = {"type": spec.get("elements", "raw"), "options": spec.get("options")}
        element = {key: entry for key, entry in element.items() if entry is not None}
        for index, item in enumerate(value):
            yield from mistakes(f"{name}[{index}]", item, element)
    else:
        yield from format_mistakes(name, value, spec)


def _mapping_mistakes(name: str, value: Mapping[str, Any], options: Mapping[str, Spec]) -> Iterator[str]:
    for key, item in value.items():
        if item is None and options.get(key, {}).get("required"):
            continue  # reported below as missing
        if key in options:
            yield from mistakes(f"{name}.{key}", item, options[key])
        else:
            yield f"{key} is not a key of {name}{nearest(str(key), {option: option for option in options})}"
    for key, option in options.items():
        if option.get("required") and value.get(key) in (None, ""):
            called = f" ({value['name']})" if "name" in value else ""
            yield f"{name}{called} has no {key}: {option['description'].rstrip('.')}"


def _shown(value: Any) -> str:
    return f"the string '{value}'" if isinstance(value, str) else repr(value)


def _hint(name: str, value: Any, spec: Spec) -> str:
    if isinstance(value, str) and spec.get("type") in ("bool", "int", "float", "list", "dict"):
        return f" (on the command line write JSON: -e '{{\"{name}\": …}}')"
    return ""


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible is untyped
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        known = known_variables()
        found = []
        for name in sorted(filter(lambda name: name.startswith(PREFIX), task_vars or {})):
            if name not in known:
                found.append(unknown_variable(name, known))
                continue
            try:
                value = self._templar.template((task_vars or {})[name])
            except AnsibleUndefinedVariable:
                continue  # depends on facts that are not read yet; the task that uses it reports the error
            except AnsibleError as error:
                found.append(f"{name} cannot be computed: {error.message}")
                continue
            found.extend(mistakes(name, value, known[name]))
        if found:
            result |= {"failed": True, "msg": "; ".join(found) if len(found) < 3 else "\n".join(found)}
        return result
