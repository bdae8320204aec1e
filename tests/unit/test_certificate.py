"""What certificate_mistakes says of pairs that OpenSSL's own command made."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

NAME, ADDRESS = "llm.example.com", "192.0.2.7"
KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out"
CA = "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\n"
LEAF = f"subjectAltName=DNS:{NAME},IP:{ADDRESS}\n"
# As `openssl ca` writes and reads times.
PAST, FUTURE, LONG_AGO, FAR = "20200101000000Z", "20900101000000Z", "20190101000000Z", "20990101000000Z"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root → intermediate → leaf, and what else operators have by mistake."""
    folder = tmp_path_factory.mktemp("certificates")

    def run(command: str) -> None:
        subprocess.run(["sh", "-ec", command], cwd=folder, check=True, capture_output=True)

    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nrand_serial=yes\nunique_subject=no\nnew_certs_dir=.\ndefault_md=sha256\n"
        "policy=p\n[p]\ncommonName=supplied\n"
    )

    def sign(name: str, issuer: str, extensions: str, begin: str = LONG_AGO, end: str = FAR) -> None:
        (folder / f"{name}.ext").write_text(extensions)
        (folder / "index").write_text("")
        run(f"{KEY} {name}.key; openssl req -new -key {name}.key -subj '/CN={name}' -out {name}.csr")
        own = f"-selfsign -keyfile {name}.key" if issuer == name else f"-cert {issuer}.crt -keyfile {issuer}.key"
        run(
            f"openssl ca -batch -notext -config ca.conf {own} -in {name}.csr -out {name}.crt -extfile {name}.ext "
            f"-startdate {begin} -enddate {end}"
        )

    sign("root", "root", CA)
    sign("intermediate", "root", CA)
    sign("leaf", "intermediate", LEAF)
    sign("expired", "intermediate", LEAF, end=PAST)
    sign("future", "intermediate", LEAF, begin=FUTURE)
    sign("self", "self", LEAF)
    sign("other", "intermediate", "subjectAltName=DNS:other.example.com\n")
    for leaf in ("leaf", "expired", "future", "other"):
        run(f"cat {leaf}.crt intermediate.crt >{leaf}-chain.crt; cat {leaf}-chain.crt root.crt >{leaf}-whole.crt")
    run("cat intermediate.crt leaf.crt >reversed.crt; openssl x509 -in leaf.crt -outform DER -out der.crt")
    run("cp leaf.csr request.crt; openssl pkey -in leaf.key -pubout -out public.key")
    run(f"openssl req -x509 -newkey rsa:2048 -nodes -keyout named.key -out named.crt -subj /CN={NAME} 2>&1")
    run("echo text >text.crt; echo text >text.key")
    run("openssl pkey -in leaf.key -aes256 -passout pass:x -out encrypted.key")
    run("openssl req -x509 -newkey rsa:1024 -nodes -keyout weak.key -out weak.crt -subj /CN=weak 2>&1")
    return folder


@pytest.mark.parametrize(
    ("certificate", "key", "kind", "says"),
    [
        ("leaf-whole", "leaf", "", ""),
        ("self", "self", "", ""),
        ("leaf-chain", "leaf", "doubtful", "CN=root is neither in the file nor a root that this machine trusts"),
        ("leaf-whole", "other", "unusable", "other.key is not the key of"),
        (
            "leaf-whole",
            "encrypted",
            "unusable",
            "encrypted.key is encrypted, and nginx has no password for it; decrypt",
        ),
        ("reversed", "leaf", "unusable", "begins with CN=intermediate, but"),
        ("text", "leaf", "unusable", "text.crt is not a certificate in PEM"),
        ("der", "leaf", "unusable", "openssl x509 -inform DER"),
        ("request", "leaf", "unusable", "it begins with a CERTIFICATE REQUEST; name the right file"),
        ("leaf-whole", "public", "unusable", "it begins with a PUBLIC KEY"),
        ("named", "named", "refused", f"is for no name, not for {NAME}"),
        ("leaf-whole", "text", "unusable", "text.key is not a private key in PEM"),
        ("weak", "weak", "unusable", "EE_KEY_TOO_SMALL"),
        ("expired-whole", "expired", "refused", "CN=expired expired on 2020-01-01 00:00 UTC"),
        ("expired-chain", "expired", "refused", "CN=expired expired on 2020-01-01 00:00 UTC"),
        ("future-whole", "future", "refused", "CN=future is not valid before 2090-01-01 00:00 UTC"),
        ("other-whole", "other", "refused", f"is for other.example.com, not for {NAME}"),
        ("other-chain", "other", "refused", f"is for other.example.com, not for {ADDRESS}"),
        ("leaf", "leaf", "refused", "ends with CN=leaf, whose issuer CN=intermediate is neither"),
    ],
)
def test_a_mistake_is_named_with_its_value(
    certificate_filters: ModuleType, made: Path, certificate: str, key: str, kind: str, says: str
) -> None:
    paths = [made / f"{certificate}.crt", made / f"{key}.key"]
    texts = [path.read_bytes().decode(errors="replace") for path in paths]
    found = certificate_filters.certificate_mistakes([str(path) for path in paths], texts, [NAME, ADDRESS])
    assert {name for name in ("unusable", "refused") if found[name]} == {kind} - {"", "doubtful"}
    assert not kind or any(says in line for line in found[kind])
    assert all("\n" not in line for lines in found.values() for line in lines)


def test_both_mistakes_of_a_certificate_are_named(certificate_filters: ModuleType, made: Path) -> None:
    paths = [str(made / "expired-whole.crt"), str(made / "expired.key")]
    texts = [Path(path).read_text() for path in paths]
    refused = certificate_filters.certificate_mistakes(paths, texts, ["elsewhere.example.com"])["refused"]
    assert ["expired on 2020-01-01" in refused[0], "not for elsewhere.example.com" in refused[1]] == [True, True]
    assert certificate_filters.certificate_until(texts[0]) == "2020-01-01 00:00 UTC"
