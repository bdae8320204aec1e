"""Filters that check a certificate and its key before they are copied to a host."""

from __future__ import annotations

import datetime
import re
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

try:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
except ImportError:  # ansible-core depends on it; ansible-test's own environments load plugins without it
    x509 = None  # type: ignore[assignment]

# Verification errors of OpenSSL's client: X509_V_ERR_… in x509_vfy.h.
_UNKNOWN_ISSUER = (2, 20, 21)
_OTHER_NAME = (62, 64)


class _UnusableError(Exception):
    """nginx cannot load the certificate and key; the message says why."""


def certificate_mistakes(paths: Sequence[str], texts: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return why nginx cannot load a certificate with its key (unusable) or why clients reject it (refused, doubtful).

    `paths` are the files of certificate and key, `texts` their contents, `names` the names and IP addresses that
    clients use. Each name is tried in a TLS handshake in memory, with the roots that this machine trusts and those in
    the file. doubtful: only clients with a root that this machine does not trust accept the certificate. One line each.
    """
    found: dict[str, list[str]] = {"unusable": [], "refused": [], "doubtful": []}
    try:
        chain = _chain(paths, texts)
    except _UnusableError as error:
        return found | {"unusable": [str(error)]}
    anchors = [chain[-1]] if chain[-1].issuer == chain[-1].subject else []
    unknown = f"whose issuer {_name(chain[-1].issuer)} is neither in the file nor a root that this machine trusts"
    linked = len(chain) > 1 and all(one.issuer == issuer.subject for one, issuer in pairwise(chain))
    if not anchors and linked and _verify_code(_handshake(texts, [], names[0])) in _UNKNOWN_ISSUER:
        found["doubtful"] = [f"{paths[0]} ends with {_name(chain[-1].subject)}, {unknown}; clients must know it"]
        anchors = [chain[-1]]
    found["refused"] = list(_dates(paths[0], chain))
    for name in names:
        refusal = _handshake(texts, anchors, name)
        code = _verify_code(refusal)
        if refusal is None or (found["refused"] and code not in (*_UNKNOWN_ISSUER, *_OTHER_NAME)):
            continue
        if code in _UNKNOWN_ISSUER:
            reason = (
                f"ends with {_name(chain[-1].subject)}, {unknown}; append the intermediate certificates to the file"
            )
        elif code in _OTHER_NAME:
            own = ", ".join(_names(chain[0])) or "no name"
            reason = (
                f"is for {own}, not for {name}; set llamaherd_nginx_names to its names, or have it issued for {name}"
            )
        else:
            reason = f"is refused by clients: {refusal.verify_message}; have it issued again"
        found["refused"].append(f"{paths[0]} {reason}")
    return found | {"refused": list(dict.fromkeys(found["refused"]))}


def certificate_until(text: str) -> str:
    """Return when the first certificate of a PEM text expires, as in `2027-01-31 00:00 UTC`."""
    return _time(x509.load_pem_x509_certificate(text.encode()).not_valid_after_utc)


def _chain(paths: Sequence[str], texts: Sequence[str]) -> list[x509.Certificate]:
    """Return the certificates of the file. Raises _UnusableError if nginx cannot load them with the key."""
    path, key_path = paths
    try:
        chain = x509.load_pem_x509_certificates(texts[0].encode())
    except ValueError:
        remedy = _remedy(path, texts[0], "x509")
        raise _UnusableError(f"{path} is not a certificate in PEM; {remedy}") from None
    try:
        key = load_pem_private_key(texts[1].encode(), None)
    except TypeError:
        remedy = f"decrypt it: openssl pkey -in {key_path}"
        raise _UnusableError(f"{key_path} is encrypted, and nginx has no password for it; {remedy}") from None
    except ValueError:
        remedy = _remedy(key_path, texts[1], "pkey")
        raise _UnusableError(f"{key_path} is not a private key in PEM; {remedy}") from None
    owners = [number for number, one in enumerate(chain) if one.public_key() == key.public_key()]
    if not owners:
        message = f"{key_path} is not the key of {path} ({_name(chain[0].subject)})"
        raise _UnusableError(f"{message}; name the key that the certificate was requested with")
    if owners[0]:
        message = f"{path} begins with {_name(chain[0].subject)}, but {key_path} is the key of its certificate"
        remedy = "put that one first, its issuers after it"
        raise _UnusableError(f"{message} {owners[0] + 1}, {_name(chain[owners[0]].subject)}; {remedy}")
    try:
        _server(texts)
    except ssl.SSLError as error:
        message = f"{path} with {key_path} cannot be loaded: {error.reason or error}"
        raise _UnusableError(f"{message}; have it issued again") from None
    return chain


def _remedy(path: str, text: str, command: str) -> str:
    """Return what to do with a file whose text is not in the format that OpenSSL's `command` writes."""
    if label := re.search(r"-----BEGIN ([A-Z0-9 ]+)-----", text):
        return f"it begins with a {label[1]}; name the right file, whole"
    return f"convert it: openssl {command} -inform DER -in {path}, or for .p12 and .pfx: openssl pkcs12 -in {path}"


def _dates(path: str, chain: Sequence[x509.Certificate]) -> Iterator[str]:
    now = datetime.datetime.now(datetime.UTC)
    for one in chain:
        if one.not_valid_after_utc < now:
            yield f"{path}: {_name(one.subject)} expired on {_time(one.not_valid_after_utc)}; name a renewed one"
        elif one.not_valid_before_utc > now:
            begin = _time(one.not_valid_before_utc)
            yield f"{path}: {_name(one.subject)} is not valid before {begin}; wait, or set this machine's clock"


def _server(texts: Sequence[str]) -> ssl.SSLContext:
    """Return a server context with this certificate and key. Raises SSLError if OpenSSL (and so nginx) rejects them."""
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder, "crt"), Path(folder, "key")
        for path, text in zip((certificate, key), texts, strict=True):
            path.write_text(f"{text}\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
    return context


def _handshake(
    texts: Sequence[str], anchors: Sequence[x509.Certificate], name: str
) -> ssl.SSLCertVerificationError | None:
    """Return the verification error of a client that connects to `name` and also trusts `anchors`, or None."""
    trusting = ssl.create_default_context()
    trusting.hostname_checks_common_name = False  # browsers and Go check only subjectAltName
    for anchor in anchors:
        trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        trusting.load_verify_locations(cadata=anchor.public_bytes(Encoding.PEM).decode())
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(back, there, server_hostname=name)
    server = _server(texts).wrap_bio(there, back, server_side=True)
    for end in (client, server, client):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error
    return None


def _verify_code(refusal: ssl.SSLCertVerificationError | None) -> int:
    return refusal.verify_code if refusal else 0


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in found]


def _name(name: x509.Name) -> str:
    return name.rfc4514_string() or "a certificate without a subject"


def _time(time: datetime.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"certificate_mistakes": certificate_mistakes, "certificate_until": certificate_until}
