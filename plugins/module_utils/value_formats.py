"""Formats of variables' values, beyond their types: ports, names, addresses, sizes, times, directories."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ansible_collections.llamaherd.llamaherd.plugins.module_utils.setting_rules import OTLP_ENDPOINT, is_otlp_endpoint

_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(\*\.)?{_LABEL}(\.{_LABEL})*")
# Some of these are special characters in build tools, units or shells.
_MISREAD = re.compile(r"""[\x00-\x1f:;&|<>(){}*?\[\]$`"'\\#%~!,]""")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TEXTS = ("llamaherd_upgrade_prompt",)
# Shared directories, which a deploy must not give to the service user, nor reset.yml remove.
_SHARED = re.compile(
    r"/(bin|boot|dev|etc|home|lib\w*|media|mnt|opt|private|proc|root|run|sbin|srv|sys|tmp|usr|var|Applications|Library|"
    r"System|Users|Volumes)?|/usr/(bin|include|lib\w*|local|sbin|share|src)|/usr/local/(bin|etc|lib|sbin|share|src)|"
    r"/var/(backups|cache|lib|local|lock|log|mail|opt|run|spool|tmp)|/etc/(nginx|ssl|ssh|systemd)|/(home|Users)/[^/]+|"
    r"/(root|home/[^/]+|Users/[^/]+)/(\.cache|\.config|\.local|\.ssh)"
)


def _reads(read: Callable[[str], Any], value: str) -> bool:
    try:
        read(value)
    except ValueError:
        return False
    return True


_is_address = partial(_reads, ipaddress.ip_address)
_is_network = partial(_reads, partial(ipaddress.ip_network, strict=False))


def _is_host(value: str) -> bool:
    return _is_address(value) or (
        bool(_DNS_NAME.fullmatch(value)) and not value.rpartition(".")[2].isdigit()  # 10.0.0.999 is not a name
    )


def _listens(value: str) -> bool:
    return _is_address(value[1:-1] if value[:1] + value[-1:] == "[]" else value) and (":" in value) == ("[" in value)


def _is_own_folder(value: str) -> bool:
    parts = value.split("/")[1:]
    plain = value.startswith("/") and not _MISREAD.search(value) and not {".", ".."} & set(parts)
    return plain and not _SHARED.fullmatch(re.sub("/+", "/", value).rstrip("/") or "/")


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda value: bool(compiled.fullmatch(value))


_TIME = r"(\d+(ms|[smhdwMy])? ?)+"
_SIZE = r"infinity|\d+(\.\d+)?[KMGT]?|\d+(\.\d+)?%"
_MOST = 2**31  # the limit of the programs that get these values
_HTTP = _matches(r"https?://[^\s/]\S*")
# By name without llamaherd_, with [] and .key for entries: the check, and its words for messages.
_FORMATS: dict[str, tuple[Callable[[Any], bool], str]] = {
    r"\w*port|instances\.port": (lambda value: 1 <= value <= 65535, "a port, 1 to 65535"),
    r"nginx_certificate_days": (lambda value: 1 <= value <= 36500, "between 1 and 36500"),
    r"loadgen_(users|processes)|model_downloads|nginx_streams|status_seconds|upgrade_window_s|\w+_start_timeout_s|"
    r"monitoring_\w+_p95_s|verify_\w*exposure": (lambda value: 0 < value < _MOST, "above 0"),
    r"server_nice": (lambda value: -20 <= value <= 19, "between -20 and 19"),
    r"\w+_ratio": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    r"user|group": (_matches("[a-z_][a-z0-9_-]{0,30}"), "a name of small letters, digits, - and _"),
    r"prefix|(state|config|cache|server_prompt_cache)_dir": (
        _is_own_folder,
        "the absolute path of a folder of its own, without special characters, as reset.yml removes all that is in it: "
        "/data/llamaherd",
    ),
    r"nginx_names\[\]": (_is_host, "a DNS name (others than ASCII as xn--…) or an IP address, without scheme and port"),
    r"nginx_addresses\[\]": (_listens, "an IP address, IPv6 in brackets"),
    r"nginx_exempt\[\]": (_is_network, "an address or a network such as 10.0.0.0/8"),
    r"(server_host|rpc_address|monitoring_address)": (_is_host, "an IP address or a DNS name"),
    r"server_otlp_endpoint": (is_otlp_endpoint, OTLP_ENDPOINT),
    r"nginx_\w+_rate": (_matches(r"[1-9]\d*r/[sm]"), "a rate such as 20r/s or 30r/m"),
    r"nginx_max_body": (_matches(r"\d+[kKmMgG]?"), "a size such as 4m"),
    r"nginx_\w+_timeout": (_matches(_TIME), "a time such as 60s"),
    r"nginx_affinity_header": (_matches("[A-Za-z][A-Za-z0-9-]*"), "a header's name, of letters, digits and -"),
    r"nginx_acme_email|open_webui_admin_email": (_matches(r"[^@\s]+@[^@\s]+"), "an address with @"),
    r"\w+_memory_max": (_matches(rf"auto|{_SIZE}"), "a size such as 8G, a share such as 50%, or infinity"),
    r"server_cpu_quota": (_matches(r"\d+%"), "a share of one core such as 150%"),
    r"monitoring_retention": (_matches(r"(\d+(ms|[smhdwy]))+"), "a time such as 30d"),
    r"\w+_url|nginx_acme_directory|lab_mirror": (_HTTP, "an http or https URL"),
    r"\w+_sha256": (_matches("[0-9a-f]{64}"), "64 small hex digits"),
}
_ALL = tuple((re.compile(f"llamaherd_({pattern})"), check, words) for pattern, (check, words) in _FORMATS.items())


def format_mistakes(name: str, value: Any, spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message if a value of the right type has a wrong format; "" passes where it is a default or a switch.

    `name` is that of the variable, with an entry's index or key: llamaherd_nginx_names[0], llamaherd_instances[0].port.
    """
    if value == "" and (spec.get("default") == "" or name == "llamaherd_server_prompt_cache_dir"):  # "" turns it off
        return
    kind = re.sub(r"\[\d+\]$", "[]", re.sub(r"\[\d+\]\.", ".", name))
    for pattern, check, words in _ALL:
        if pattern.fullmatch(kind):
            if not check(value):
                yield f"{name} must be {words}, not {value!r}"
            return
    if "." in kind:
        return
    if spec.get("type") in ("int", "float") and not 0 <= value < _MOST:
        yield f"{name} must not be below 0, and is {value}" if value < 0 else f"{name} is too large: {value}"
    elif isinstance(value, str) and not value.strip():
        yield f"{name} is empty: give it a value, or remove it, which leaves it at its default"
    elif isinstance(value, str) and (value != value.strip() or _CONTROL.search(value)) and kind not in _TEXTS:
        yield f"{name} has a line end, or spaces at its ends: remove them"  # it may be a secret
