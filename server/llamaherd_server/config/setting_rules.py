"""Rules for an engine's settings and a model's placement. The playbooks use this file too, by a link in
plugins/module_utils, on a controller without the server's packages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

MIN_CTX = 16
OTLP_ENDPOINT = (
    "the http or https URL of a collector, without user, query and /v1/traces, such as http://collector.internal:4318"
)


def setting_mistakes(settings: Mapping[str, Any], schema: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the errors in complete settings, one line each: the setting, its value, the remedy.

    `schema`: each setting's JSON schema, used for its bounds. Types must have been checked before.
    """
    if found := out_of_range(settings, schema):
        return found
    parallel, batch, ubatch, ctx = (int(settings[name]) for name in ("parallel", "batch", "ubatch", "ctx_per_slot"))
    if 0 < ctx < MIN_CTX:
        found.append(f"ctx_per_slot {ctx} is out of range: it must be at least {MIN_CTX}, or 0 for as much as fits")
    if ubatch > batch:
        found.append(f"ubatch {ubatch} is larger than batch {batch}: lower ubatch or raise batch")
    if batch < parallel:
        found.append(
            f"batch {batch} is smaller than parallel {parallel}: raise batch, each slot puts one token into it"
        )
    if parallel * ctx >= 2**31:
        found.append(f"parallel {parallel} x ctx_per_slot {ctx} is more than {2**31 - 1} tokens: lower one of them")
    if settings["flash_attention"] == "off" and settings["kv_type_v"] not in ("f32", "f16", "bf16"):
        found.append(
            f"kv_type_v {settings['kv_type_v']} needs flash attention: set flash_attention to auto or on, or choose f16"
        )
    return found


def placement_mistakes(placement: Mapping[str, Any], schema: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the errors in a model's placement, like `setting_mistakes`."""
    found = out_of_range(placement, schema)
    layers, devices, shares = placement["gpu_layers"], placement["devices"], placement["tensor_split"]
    if layers == "auto" and (shares or placement["cpu_moe_layers"] or placement["split_mode"] in ("row", "tensor")):
        found.append(
            "gpu_layers auto chooses tensor_split and cpu_moe_layers itself, and needs split_mode layer or none: "
            "remove these settings, or set gpu_layers to a number or -1"
        )
    if shares and (min(shares) < 0 or not 0 < sum(shares) < float("inf")):
        found.append(f"tensor_split {shares} must have no negative share, and at least one above 0")
    if devices and len(shares) > len(devices):
        found.append(f"tensor_split {shares} has more shares than there are devices: {', '.join(devices)}")
    return found


def is_otlp_endpoint(value: str) -> bool:
    """Return whether `value` is an OTLP_ENDPOINT."""
    try:
        url = urlsplit(value)
        valid = url.port != 0 and re.fullmatch(r"[\w.:-]+", url.hostname or "", re.ASCII)
    except ValueError:  # a port above 65535, or brackets without an IPv6 address
        return False
    whole = value.isprintable() and not set(" ?#@") & set(value)
    return bool(valid and whole and url.scheme in ("http", "https") and not re.search("/v1/traces/*$", url.path))


def out_of_range(settings: Mapping[str, Any], schema: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return an error for each number out of its bounds. Does not check types."""
    return [
        f"{name} {settings[name]} is out of range: it must be {' or '.join([*words, 'between'])} {one['minimum']} and "
        f"{one['maximum']}"
        for name, one in schema.items()
        if "minimum" in one and not _within(settings[name], one["minimum"], one["maximum"], words := _words(one))
    ]


def _words(schema: Mapping[str, Any]) -> list[str]:
    """Return the words that a setting accepts in place of a number."""
    return [word for kind in schema.get("anyOf", ()) for word in kind.get("enum", ())]


def _within(value: Any, low: int, high: int, words: list[str]) -> bool:
    if value in words:
        return True
    try:
        return value is not None and low <= float(value) <= high
    except OverflowError:
        return False
    except (TypeError, ValueError):
        return not words
