"""Filters for edges and rollouts: which hosts of a fleet serve which model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import yaml

ANY_NAME = "*"
# A JSON string, and what comes between strings and brackets. Possessive throughout, so that no byte is examined twice
# and a long body uses no stack.
_TEXT = r'"(?:[^"\\]++|\\.)*+"'
_PLAIN = r'[^"\[\]{}]++'
_DEPTH = 24
_MESSAGE_DEPTH = 6
# nginx limits a parameter to 4096 bytes.
_HEADER_BYTES = 3000


def model_routes(hosts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return to which `hosts` an edge sends a request for each model; empty if all hosts serve the same models.

    `hosts` has the variables of each host that the edge balances over. The result has `sets` of hosts, each with the
    name of its upstream, its hosts, and the model names that requests use for it (`names`, and `patterns` as regular
    expressions); the model of requests without a name (`first`); the upstream for unknown names (`unknown`); a regular
    expression that finds the model in a body (`in_body`); and all models, also as header values (`listed`).
    """
    names = [host["inventory_hostname"] for host in hosts]
    by_hosts: dict[tuple[str, ...], list[str]] = {}
    for name, serving in _serving(hosts).items():
        by_hosts.setdefault(tuple(serving), []).append(name)
    if list(by_hosts) in ([], [tuple(names)]):
        return {}
    sets, unknown = [], "inference"
    for number, (those, called) in enumerate(by_hosts.items(), 1):
        upstream = "inference" if those == tuple(names) else f"inference_{number}"
        unknown = upstream if ANY_NAME in called else unknown
        own = [name for name in called if name != ANY_NAME]
        patterns = [_pattern(spelling) for name in own for spelling in _spellings(name)]
        sets.append({"upstream": upstream, "hosts": list(those), "names": own, "patterns": patterns})
    models = list(dict.fromkeys(name for host in hosts for name in _own_models(host)))
    return {
        "sets": sets,
        "models": models,
        "first": models[0],
        "unknown": unknown,
        "in_body": _quoted(_named_in_body()),
        "listed": _listed(models),
    }


def route_mistakes(balanced: Sequence[Mapping[str, Any]], inference: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why edges cannot route by model, one line each.

    `balanced` has the variables of the hosts that an edge balances over, `inference` those of all inference hosts.
    """
    found = []
    meanings: dict[str, dict[str, list[str]]] = {}
    aliases = set()
    for host in balanced:
        for model in _served(host):
            aliases.update(model.get("aliases", ()))
            for name in (model["name"], *model.get("aliases", ())):
                where = f"{model['name']} on {host['inventory_hostname']}"
                meanings.setdefault(name, {}).setdefault(_sums(model), []).append(where)
    for name in sorted(aliases):
        if len(meanings[name]) > 1:
            those = "; ".join(f"{', '.join(where)} (sha256 {sums[:12]})" for sums, where in meanings[name].items())
            found.append(f"the alias {name!r} means different models: {those}; rename one")
    serving = _serving(balanced)
    drained = {host["inventory_hostname"] for host in balanced if host.get("llamaherd_drained")}
    models = [name for name in serving if name not in aliases]
    if any(set(serving[name]) - drained for name in models):  # draining the whole fleet is intended
        found += [
            f"model {name} would have no host: llamaherd_drained is true on {' and '.join(serving[name])}, and no "
            "other host serves it; return one to service, or list the model on another"
            for name in models
            if not set(serving[name]) - drained
        ]
    found += [
        f"model {name} is served by {' and '.join(on)}, which no edge balances over; put a host of it into the group "
        "that llamaherd_nginx_group names"
        for name, on in _serving(inference).items()
        if name not in serving and name not in aliases and serving
    ]
    return found


def upstreams(hosts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return nginx's upstreams for model_routes of the same `hosts`: first `inference` with all hosts, then other sets.

    Each has its name (upstream), its hosts, and the number of their servers.
    """
    running = {host["inventory_hostname"]: _n_servers(host) for host in hosts}
    sets = [{"upstream": "inference", "hosts": list(running)}]
    sets += [one for one in model_routes(hosts).get("sets", ()) if one["upstream"] != "inference"]
    return [
        {"upstream": one["upstream"], "hosts": one["hosts"], "servers": sum(running[host] for host in one["hosts"])}
        for one in sets
    ]


def key_share(balanced: Sequence[Mapping[str, Any]], host: str, instances: int) -> dict[str, int]:
    """Return the position of the servers of `host` among those that share keys' limits: servers, first and here.

    Hosts that serve a model in common share limits, directly or through others, because a request can go to any of
    them. `first` is the number of servers before those of `host`; `instances` is how many `host` has.
    """
    together = {host}
    serving = [set(hosts) for hosts in _serving(balanced).values()]
    while any(hosts & together and not hosts <= together for hosts in serving):
        together = together.union(*(hosts for hosts in serving if hosts & together))
    before = servers = 0
    for one in balanced:
        if one["inventory_hostname"] == host:
            before = servers
            servers += instances
        elif one["inventory_hostname"] in together:
            servers += _n_servers(one)
    return {"servers": max(servers, instances), "first": before, "here": instances}


def _n_servers(host: Mapping[str, Any]) -> int:
    return 1 + len(host.get("llamaherd_instances") or [])


@cache
def _default_models() -> list[Mapping[str, Any]]:
    """Return llamaherd_models of the roles' defaults, which hostvars of other hosts do not include."""
    defaults = Path(__file__).resolve().parents[2] / "roles/common/defaults/main.yml"
    models: list[Mapping[str, Any]] = yaml.safe_load(defaults.read_text())["llamaherd_models"]
    return models


def _served(host: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of llamaherd_models that a host with these variables serves, llamaherd_model first."""
    listed = {model["name"]: model for model in host.get("llamaherd_models") or _default_models()}
    first = host.get("llamaherd_model", next(iter(listed), ""))
    return [listed[name] for name in (first, *host.get("llamaherd_more_models", ())) if name in listed]


def _serving(hosts: Sequence[Mapping[str, Any]], *, aliases: bool = True) -> dict[str, list[str]]:
    """Return the hosts that serve each name and, with `aliases`, each alias."""
    found: dict[str, list[str]] = {}
    for host in hosts:
        for model in _served(host):
            for name in (model["name"], *(model.get("aliases", ()) if aliases else ())):
                found.setdefault(name, []).append(host["inventory_hostname"])
    return found


def rollout_batches(
    hosts: Sequence[Mapping[str, Any]], inference: Sequence[Mapping[str, Any]], serial: int | str | Sequence[int | str]
) -> list[list[str]]:
    """Return the names of `hosts` in rollout batches. A model on several hosts always keeps one of them in service.

    `inference` has the variables of all inference hosts. `serial` is as in Ansible, but applies to each group of hosts
    that serve the same models, so that the first batch has a canary of each kind.
    """
    serving = _in_service(inference)
    models = {host["inventory_hostname"]: tuple(sorted(_own_models(host))) for host in hosts}
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, own in models.items():
        kinds.setdefault(own, []).append(name)
    waves: dict[int, list[str]] = {}
    for kind in kinds.values():
        for number, some in enumerate(_split(kind, serial)):
            waves.setdefault(number, []).extend(some)
    batches = []
    for number in sorted(waves):
        left = [name for name in models if name in waves[number]]
        while left:
            batch: list[str] = []
            for name in left:
                having = [serving.get(model, set()) for model in models[name]]
                if all(on <= {name} or on - {*batch, name} for on in having):
                    batch.append(name)
            batches.append(batch)
            left = [name for name in left if name not in batch]
    return batches


def irreplaceable_models(hosts: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return the models that only the host `name` has in service."""
    return [model for model, on in _in_service(hosts).items() if on == {name}]


def model_status(hosts: Sequence[Mapping[str, Any]], samples: Mapping[str, Sequence[Sequence[str]]]) -> list[list[str]]:
    """Return a row for each model of `hosts`: name, hosts, hosts where it is up, busy and total slots, queued requests.

    `samples` has the samples (metric, model, value) of each host's server; a host without samples is down.
    """
    rows = []
    for model, names in _serving(hosts, aliases=False).items():
        found = [(metric, float(value)) for name in names for metric, of, value in samples.get(name, ()) if of == model]
        up, slots, busy, queued = (
            int(sum(value for metric, value in found if metric == wanted))
            for wanted in ("up", "slots", "slots_busy", "queue_requests")
        )
        rows.append([model, ", ".join(sorted(names)), f"{up}/{len(names)}", f"{busy}/{slots}", str(queued)])
    return rows


def _split(names: Sequence[str], serial: int | str | Sequence[int | str]) -> list[list[str]]:
    """Split names as Ansible's `serial` does: the last size repeats; a percentage is of all names, and at least one."""
    sizes = [serial] if isinstance(serial, int | str) else list(serial)
    batches: list[list[str]] = []
    done = 0
    while done < len(names):
        size = str(sizes[min(len(batches), len(sizes) - 1)])
        count = int(float(size[:-1]) / 100 * len(names)) if size.endswith("%") else int(size)
        batches.append(list(names[done : done + max(1, count)]))
        done += max(1, count)
    return batches


def _own_models(host: Mapping[str, Any]) -> list[str]:
    return [model["name"] for model in _served(host)]


def _in_service(hosts: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Return the hosts of each model that are not drained."""
    found: dict[str, set[str]] = {}
    for host in hosts:
        for model in _own_models(host):
            found.setdefault(model, set()).update([] if host.get("llamaherd_drained") else [host["inventory_hostname"]])
    return found


def _sums(model: Mapping[str, Any]) -> str:
    sums = model["sha256"]
    return str(sums) if isinstance(sums, str) else "+".join(map(str, sums))


def _spellings(name: str) -> list[str]:
    """Return the ways in which a request can spell the name: in a path, in JSON, in a query."""
    json_forms = [name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]]
    json_forms += [form.replace("/", r"\/") for form in json_forms]
    encoded = [quote(name), quote(name, safe=""), quote_plus(name)]
    encoded += [re.sub("%..", lambda hexadecimal: hexadecimal[0].lower(), form) for form in encoded]
    return list(dict.fromkeys([*json_forms, *encoded]))


def _pattern(text: str) -> str:
    """Return a case-sensitive regular expression for an nginx parameter that matches only this text."""
    plain = re.compile(r"[A-Za-z0-9_/:@=,~ -]")
    return "".join(chr(b) if plain.match(chr(b)) else f"\\x{b:02x}" for b in text.encode())


def _named_in_body() -> str:
    """Return a regular expression that finds the value of "model" in a JSON object, but not in nested objects."""
    return rf'^[^{{"]*+{{{_before("model", _DEPTH)}"(?<llamaherd_named>(?:[^"\\]++|\\.)*+)"'


def message_pattern(role: str) -> str:
    """Return a regular expression for nginx.conf that finds the first message of this role in a body.

    Its depth is smaller, because messages nest less than tools and every object of a body is tried.
    """
    whole = rf"(?:{_PLAIN}|{_TEXT}|{_held(_MESSAGE_DEPTH)})*+"
    return _quoted(rf'(?<llamaherd_message>{{(?={_before("role", _MESSAGE_DEPTH)}"{role}"){whole}}})')


def _before(name: str, depth: int) -> str:
    """Return a regular expression for a JSON object's content up to the value of the key `name`."""
    key = rf'"{name}"\s*+:'
    return rf'(?:(?!{key})(?:[^"\[\]{{}}]|{_TEXT}|{_held(depth)}))*+{key}\s*+'


def _held(depth: int) -> str:
    """Return a regular expression for an array or object with others nested to this depth."""
    held = ""
    for level in range(depth):
        held = rf"[\[{{](?:{_PLAIN}|{_TEXT}{'|' if level else ''}{held})*+[\]}}]"
    return held


def _quoted(text: str) -> str:
    """Escape the text for double quotes in nginx.conf."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _listed(models: Sequence[str]) -> list[str]:
    """Return the percent-encoded names, separated by commas, in values that are short enough for nginx."""
    values = [""]
    for name in models:
        encoded = quote(name, safe="")
        if values[-1] and len(values[-1]) + len(encoded) > _HEADER_BYTES:
            values.append("")
        values[-1] += f",{encoded}" if values[-1] else encoded
    return values


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "model_routes": model_routes,
            "message_pattern": message_pattern,
            "route_mistakes": route_mistakes,
            "upstreams": upstreams,
            "key_share": key_share,
            "rollout_batches": rollout_batches,
            "irreplaceable_models": irreplaceable_models,
            "model_status": model_status,
        }
