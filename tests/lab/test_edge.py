"""The edge: TLS from three sources, sessions that stay on a host, and changes that no stream notices.

Its hosts run the server over the worker double that paces its tokens, so that streams outlast a deploy on any machine.
"""

from __future__ import annotations

import json
import shlex
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.lab.conftest import Herd
from tests.lab.fleet import EDGE, cut_off, join, logged, paced, served_by
from tests.lab.load import only_running_streams_failed, streaming

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]
long = pytest.mark.fleet
SLOTS = 32  # of each host
STEP_MS = 50
TOKENS = 100  # a stream of 5 s


@pytest.fixture(scope="module")
def fleet(paced_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    """e1 before f1 and f2; f3 is ready to join them."""
    with paced(tmp_path_factory.mktemp("inventory"), paced_server, parallel=SLOTS, PACED_STEP_MS=STEP_MS) as fleet:
        yield fleet


def test_hosts_come_and_go_while_streams_run(fleet: Herd) -> None:
    with streaming(fleet, rate=2, max_tokens=TOKENS) as load:
        two = join(fleet)
        fleet.succeed("deploy.yml", "--tags", "config,nginx")
        three = logged(fleet)
        (fleet.inventory / "hosts.yml").write_text(two)
        fleet.succeed(*EDGE)
    assert load.failures == []
    assert load.outcomes["ok"] >= 20
    assert served_by(fleet, three)["f3"] >= 1
    gone = logged(fleet)
    with streaming(fleet, rate=2, max_tokens=TOKENS):
        pass
    counts = served_by(fleet, gone)
    assert counts["f3"] == 0
    assert min(counts["f1"], counts["f2"]) >= 1


@long
def test_a_host_without_network_costs_only_its_own_streams_and_comes_back_by_itself(fleet: Herd) -> None:
    """At a rate at which every moment has a request on its way to the host."""
    patience_s = 20
    with streaming(fleet, rate=4, max_tokens=TOKENS, patience_s=patience_s) as load:
        with cut_off(fleet, "f1"):
            time.sleep(patience_s)
        back = logged(fleet)
        time.sleep(2 * TOKENS * STEP_MS / 1000)
    assert load.failures, "streams ran there"
    only_running_streams_failed(load, SLOTS)
    assert served_by(fleet, back)["f1"] >= 1


@long
def test_a_renewed_certificate_costs_no_stream(fleet: Herd) -> None:
    before = certificate(fleet)
    with streaming(fleet, rate=2, max_tokens=TOKENS) as load:
        fleet.succeed("deploy.yml", "--tags", "nginx", "-e", '{"llamaherd_nginx_renew_days": 398}')
    assert load.failures == []
    assert certificate(fleet) != before


def certificate(fleet: Herd) -> str:
    """What the edge shows to a client, as PEM."""
    return ssl.get_server_certificate((fleet.address("e1"), 443))


@long
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        pytest.param(
            {"llamaherd_nginx_max_body": "9999999999999g"}, "nginx keeps its old configuration", id="refused by nginx"
        ),
        pytest.param({"llamaherd_nginx_balance": "least_con"}, "llamaherd_nginx_balance", id="refused before"),
        pytest.param({"llamaherd_nginx_tls": "provided"}, "is not a file on the controller", id="no certificate"),
    ],
)
def test_a_bad_variable_leaves_the_old_configuration_serving(
    fleet: Herd, variables: Mapping[str, str], says: str
) -> None:
    state = "sha256sum /etc/nginx/nginx.conf; systemctl show -P ExecMainStartTimestamp nginx"
    before = fleet.sh("e1", state)
    with streaming(fleet, rate=2, max_tokens=TOKENS) as load:
        run = fleet.play(*EDGE, "-e", json.dumps(variables))
    assert run.rc != 0
    assert says in run.output
    assert load.failures == []
    assert fleet.sh("e1", state) == before


@pytest.fixture
def as_before(fleet: Herd) -> Iterator[None]:
    """Afterwards the edge is as the inventory says."""
    yield
    fleet.succeed(*EDGE)


@long
@pytest.mark.usefixtures("as_before")
def test_prefix_keeps_each_session_on_one_host_while_it_serves(fleet: Herd) -> None:
    fleet.succeed(*EDGE, "-e", "llamaherd_nginx_balance=prefix")
    sessions = {f"s{n}": served_for(fleet, {"X-Session-ID": f"s{n}"}) for n in range(8)}
    assert {len(hosts) for hosts in sessions.values()} == {1}
    assert set.union(*sessions.values()) == {"f1", "f2"}
    assert len(served_for(fleet, {})) == 1, "one key, one host"
    drained = fleet.inventory / "host_vars/f1.yml"
    drained.parent.mkdir(exist_ok=True)
    drained.write_text("llamaherd_drained: true\n")
    fleet.succeed(*EDGE, "-e", "llamaherd_nginx_balance=prefix")
    drained.unlink()
    assert {host for name in sessions for host in served_for(fleet, {"X-Session-ID": name})} == {"f2"}
    fleet.succeed(*EDGE, "-e", "llamaherd_nginx_balance=prefix")
    assert {name: served_for(fleet, {"X-Session-ID": name}) for name in sessions} == sessions


def served_for(fleet: Herd, headers: Mapping[str, str]) -> set[str]:
    """The hosts that answer six requests with these headers and the default key."""
    before = logged(fleet)
    with httpx.Client(verify=trusting(fleet.inventory / ".secrets/ca.crt")) as client:
        for _ in range(6):
            client.get(f"https://{fleet.address('e1')}/v1/models", headers={**key(fleet), **headers}).raise_for_status()
    return {host for host, count in served_by(fleet, before).items() if count}


def key(fleet: Herd) -> dict[str, str]:
    return {"Authorization": f"Bearer {(fleet.inventory / '.secrets/keys/default').read_text().strip()}"}


def trusting(ca: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca))


@long
@pytest.mark.usefixtures("as_before")
def test_a_provided_certificate_and_its_successor(fleet: Herd, tmp_path: Path) -> None:
    first, second = (provide(fleet, tmp_path / name) for name in ("first", "second"))
    trusted = tmp_path / "trusted.crt"
    trusted.write_text((tmp_path / "first.crt").read_text() + (tmp_path / "second.crt").read_text())
    fleet.succeed(*EDGE, "-e", json.dumps(first))
    with streaming(fleet, rate=2, max_tokens=TOKENS, ca=trusted) as load:
        assert certificate(fleet) == (tmp_path / "first.crt").read_text()
        fleet.succeed(*EDGE, "-e", json.dumps(second))
        assert certificate(fleet) == (tmp_path / "second.crt").read_text()
    assert load.failures == []


KEY = "llamaherd_nginx_certificate_key"


def provide(fleet: Herd, path: Path, address: str = "") -> dict[str, str]:
    """A certificate for the edge's address, or another, that signs itself, path.crt with path.key, as variables."""
    sign = (
        f"{SELF_SIGNED} -addext subjectAltName=IP:{address or fleet.address('e1')} -out {path}.crt -keyout {path}.key"
    )
    subprocess.run(shlex.split(sign), check=True, capture_output=True)
    files = {"llamaherd_nginx_certificate": f"{path}.crt", KEY: f"{path}.key"}
    return files | {"llamaherd_nginx_tls": "provided"}


@long
@pytest.mark.usefixtures("as_before")
def test_a_certificate_that_cannot_serve_is_refused_before_anything_changes(fleet: Herd, tmp_path: Path) -> None:
    one, other = (provide(fleet, tmp_path / name) for name in ("one", "other"))
    elsewhere = provide(fleet, tmp_path / "elsewhere", "198.51.100.1")
    before = certificate(fleet)
    for variables, says in (
        (one | {KEY: other[KEY]}, "other.key is not the key of"),
        (elsewhere, "is for 198.51.100.1, not for"),
    ):
        run = fleet.play(*EDGE, "-e", json.dumps(variables))
        assert run.rc != 0
        assert says in run.errors[0]
        assert run.changed["e1"] == 0
        assert certificate(fleet) == before
    insisted = json.dumps(elsewhere | {"llamaherd_nginx_certificate_allow_refused": True})
    assert "WARNING: " in fleet.succeed(*EDGE, "-e", insisted).output
    assert certificate(fleet) == (tmp_path / "elsewhere.crt").read_text()
    verified = fleet.play("verify.yml", "--limit", "e1", "-e", insisted)
    assert verified.rc != 0
    assert f"clients refuse the certificate of https://{fleet.address('e1')}" in verified.output


@long
@pytest.mark.usefixtures("as_before")
def test_a_configuration_that_cannot_be_loaded_is_taken_back_and_not_forgotten(fleet: Herd) -> None:
    state = "sha256sum /etc/nginx/nginx.conf /etc/nginx/llamaherd/loaded.conf; systemctl is-active nginx"
    before = fleet.sh("e1", state)
    another = ("-e", '{"llamaherd_nginx_max_body": "5m"}')
    fleet.sh("e1", f"printf '[Service]\\nExecReload=\\nExecReload=/bin/false\\n' >{DROP_IN}; systemctl daemon-reload")
    try:
        run = fleet.play(*EDGE, *another)
    finally:
        fleet.sh("e1", f"rm {DROP_IN}; systemctl daemon-reload")
    assert run.rc != 0
    assert "runs the former one" in run.output
    assert fleet.sh("e1", state) == before
    assert fleet.succeed(*EDGE, *another).changed["e1"] == 2, "nginx.conf, and loading it"
    fleet.sh("e1", "rm /etc/nginx/llamaherd/loaded.conf; cp /etc/nginx/mime.types /etc/nginx/llamaherd/loaded.conf")
    assert fleet.succeed(*EDGE, *another).changed["e1"] == 1, "loading what an interrupted run did not load"
    assert fleet.succeed(*EDGE, *another).changed["e1"] == 0


DROP_IN = "/etc/systemd/system/nginx.service.d/zz.conf"
SITE = "/etc/nginx/sites-enabled/blog"
ASK_SITE = (
    "python3 -c 'import urllib.request; print(urllib.request.urlopen(\"http://127.0.0.1:8085\").read().decode())'"
)


@long
@pytest.mark.usefixtures("as_before")
def test_a_site_that_is_not_ours_stays_as_it_is(fleet: Herd) -> None:
    def put(port: int, more: str = "") -> None:
        fleet.sh("e1", f"echo 'server {{ listen {port}; return 200 mine; {more} }}' >{SITE}")

    try:
        put(8085)
        fleet.succeed(*EDGE)
        assert fleet.sh("e1", ASK_SITE) == "mine\n"
        put(443)
        run = fleet.play(*EDGE)
        assert f"{SITE}:1 lets nginx listen on port 443" in run.errors[0]
        put(8085, "no_such_directive on;")
        run = fleet.play(*EDGE)
        assert "no_such_directive" in run.errors[0]
        assert SITE in run.errors[0]
        assert fleet.sh("e1", ASK_SITE) == "mine\n", "nginx still runs what it had"
    finally:
        fleet.sh("e1", f"rm -f {SITE}")


SELF_SIGNED = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 7 -subj /CN=edge"
NAME = "edge.lab.example"
ACME = {
    "llamaherd_nginx_tls": "acme",
    "llamaherd_nginx_names": [NAME],
    "llamaherd_nginx_acme_directory": "https://127.0.0.1:14000/dir",
}
# An authority on the edge itself, whose certificate it trusts.
PEBBLE = f"""set -e
apt-get install -y -q pebble >/dev/null
{SELF_SIGNED} -addext subjectAltName=IP:127.0.0.1 -out /tmp/pebble.crt -keyout /tmp/pebble.key
cat /tmp/pebble.crt >>/etc/ssl/certs/ca-certificates.crt
echo 127.0.0.1 {NAME} >>/etc/hosts
echo '{{"pebble": {{"listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000", "httpPort": 80,
  "certificate": "/tmp/pebble.crt", "privateKey": "/tmp/pebble.key"}}}}' >/tmp/pebble.json
systemd-run --quiet --unit=pebble --setenv=PEBBLE_VA_NOSLEEP=1 pebble -config /tmp/pebble.json
until python3 -c '
import ssl, urllib.request
context = ssl.create_default_context(cafile="/tmp/pebble.crt")
print(urllib.request.urlopen("https://127.0.0.1:15000/roots/0", context=context).read().decode())
' 2>/dev/null; do sleep 0.2; done
"""


@long
@pytest.mark.usefixtures("as_before")
def test_acme_fetches_a_certificate_and_renews_it_under_a_stream(fleet: Herd, tmp_path: Path) -> None:
    root = tmp_path / "root.crt"
    root.write_text(fleet.sh("e1", PEBBLE))
    fleet.succeed(*EDGE, "-e", json.dumps(ACME))
    first = certificate(fleet)
    assert fleet.succeed(*EDGE, "-e", json.dumps(ACME)).changed["e1"] == 0
    assert fleet.sh("e1", "systemctl is-active certbot.timer") == "active\n"
    body = {"model": "chat", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 900, "stream": True}
    client = httpx.Client(verify=trusting(root), headers=key(fleet) | {"Host": NAME}, timeout=60)
    url, sni = f"https://{fleet.address('e1')}/v1", {"sni_hostname": NAME}
    with client, client.stream("POST", f"{url}/chat/completions", json=body, extensions=sni) as answer:
        lines = answer.iter_lines()
        next(lines)
        fleet.sh("e1", "certbot renew --quiet --force-renewal --no-random-sleep-on-renew")
        deadline = time.monotonic() + 10  # nginx takes it up after the reload's command has ended
        while certificate(fleet) == first:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert httpx.Client(verify=trusting(root)).get(f"{url}/models", headers=key(fleet), extensions=sni).is_success
        renewed = time.monotonic_ns()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    sent = [choice["delta"].get("content") for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert max(int(text) for text in sent if text) > renewed, "the stream ended before the renewal did"


@long
def test_reset_leaves_what_others_use_and_goes_on_to_its_end(fleet: Herd) -> None:
    """The last test here: nothing serves any more."""
    fleet.sh("f1", "useradd --no-create-home --gid llamaherd other; mkdir /opt/llamaherd/mounted")
    fleet.sh("f1", "mount -t tmpfs none /opt/llamaherd/mounted")
    fleet.sh("e1", f"echo 'server {{ listen 8085; return 200 mine; }}' >{SITE}")
    for _ in range(2):
        run = fleet.succeed("reset.yml", "-e", '{"skip_confirmation": true}')
        assert "the group llamaherd stays, for other is in it" in run.output
        assert "/opt/llamaherd/mounted" in run.output
    assert fleet.sh(
        "f1", "id -gn other; ls /opt/llamaherd; ls -d /etc/llamaherd* /var/lib/llamaherd* 2>/dev/null; true"
    ) == ("llamaherd\nmounted\n")
    assert fleet.sh("e1", ASK_SITE) == "mine\n"
    assert fleet.sh("e1", "sysctl -n net.ipv4.tcp_keepalive_time net.ipv4.tcp_keepalive_probes").split() == [
        "7200",
        "9",
    ]
    fleet.sh("f1", "umount /opt/llamaherd/mounted; rmdir /opt/llamaherd/mounted")
