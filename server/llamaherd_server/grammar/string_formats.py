"""The string formats of JSON Schema, OpenAPI, pydantic and zod as regular expressions."""

from __future__ import annotations

from decimal import Decimal

_YEAR_AND_DAY = (
    r"(?!0000)(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8]))|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_CLOCK}:[0-5]\d(?:\.\d{{1,6}})?(?:Z|[+-]{_CLOCK})"
_DATE_PART = r"(?:\d{1,4}Y(?:\d{1,4}M(?:\d{1,4}D)?)?|\d{1,4}M(?:\d{1,4}D)?|\d{1,4}D)"
_TIME_PART = (
    r"T(?:\d{1,4}H(?:\d{1,4}M(?:\d{1,4}(?:\.\d{1,6})?S)?)?|\d{1,4}M(?:\d{1,4}(?:\.\d{1,6})?S)?|\d{1,4}(?:\.\d{1,6})?S)"
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_SHORT_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_H = "[0-9A-Fa-f]{1,4}"
_IPV6 = (
    rf"(?:(?:{_H}:){{7}}{_H}|(?:{_H}:){{1,7}}:|:(?::{_H}){{1,7}}|::"
    + "".join(rf"|(?:{_H}:){{1,{7 - n}}}(?::{_H}){{1,{n}}}" for n in range(1, 7))
    + ")"
)
_URI_CHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})"
_URI_TAIL = rf"{_URI_CHAR}*(?:\?(?:{_URI_CHAR}|\?)*)?(?:#(?:{_URI_CHAR}|\?)*)?"
_AUTHORITY = rf"//{_LABEL}(?:\.{_LABEL})*(?::\d{{1,4}})?"
_BASE64 = "[A-Za-z0-9+/]"
_HEX = "[0-9A-Fa-f]"
_UUID_ENDS = rf"[89ABab]{_HEX}{{3}}-{_HEX}{{12}}"

FORMATS = {
    "date": _YEAR_AND_DAY,
    "time": _TIME,
    "date-time": rf"{_YEAR_AND_DAY}T{_TIME}",
    "duration": rf"P(?:{_DATE_PART}(?:{_TIME_PART})?|{_TIME_PART}|\d{{1,4}}W)",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_LABEL}\.)+[A-Za-z]{{2,}}",
    "hostname": rf"{_SHORT_LABEL}(?:\.{_SHORT_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "ipvanyaddress": rf"{_IPV4}|{_IPV6}",
    "ipvanyinterface": rf"{_IPV4}|{_IPV6}",
    "ipv4interface": rf"{_IPV4}(?:/(?:3[0-2]|[12]?\d))?",
    "ipv6interface": rf"{_IPV6}(?:/(?:12[0-8]|1[01]\d|[1-9]?\d))?",
    "cidrv4": rf"{_IPV4}/(?:3[0-2]|[12]?\d)",
    "cidrv6": rf"{_IPV6}/(?:12[0-8]|1[01]\d|[1-9]?\d)",
    "uuid": rf"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    **{f"uuid{n}": rf"{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-{_UUID_ENDS}" for n in (1, 3, 4, 5, 6, 7, 8)},
    "uri": rf"https?:{_AUTHORITY}(?:(?=[/?#]){_URI_TAIL})?|(?!https?:)[A-Za-z][A-Za-z0-9+.-]*:(?=[^?#]){_URI_TAIL}",
    "uri-reference": rf"(?:[A-Za-z][A-Za-z0-9+.-]*:)?(?!:){_URI_TAIL}",
    "json-pointer": r"(?:/(?:[^~/]|~[01])*)*",
    "jwt": r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+",
    "base64": rf"(?:{_BASE64}{{4}})*(?:{_BASE64}{{2}}==|{_BASE64}{{3}}=)?",
    "base64url": r"(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}(?:==)?|[A-Za-z0-9_-]{3}=?)?",
}
FORMATS |= {
    "byte": FORMATS["base64"],
    "guid": FORMATS["uuid"],
    "url": FORMATS["uri"],
    "iri": FORMATS["uri"],
    "idn-email": FORMATS["email"],
    "idn-hostname": FORMATS["hostname"],
    "ipv4network": FORMATS["cidrv4"],
    "ipv6network": FORMATS["cidrv6"],
    "ip-address": FORMATS["ipv4"],
}
# Formats that name the purpose of a text without constraining it.
UNCONSTRAINED = frozenset(
    (
        *("binary", "password", "path", "file-path", "directory-path", "name-email", "multi-host-uri", "color"),
        *("text", "html", "markdown", "phone"),
    )
)
# OpenAPI's integer formats.
INTEGERS = {
    **{f"int{bits}": (Decimal(-(2 ** (bits - 1))), Decimal(2 ** (bits - 1) - 1)) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (Decimal(0), Decimal(2**bits - 1)) for bits in (8, 16, 32, 64)},
}
