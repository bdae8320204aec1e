"""What Prometheus is told to read of a fleet, and who may read it."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.debian import need
from tests.roles.conftest import Render, Rendered

INSTANCE = {"name": "gpu1", "port": 8082, "devices": "1"}
GROUPS = {
    "inference": {
        "hosts": {"cuda": {"llamaherd_instances": [INSTANCE]}, "rocky9": {"llamaherd_monitoring_exporters": False}}
    },
    "edge": {"hosts": {"edge.internal": {"ansible_host": "10.0.0.9"}}},
    "monitoring": {
        "hosts": {"debian12": None},
        "vars": {"llamaherd_monitoring_alertmanagers": ["https://alerts.internal:9093/am"]},
    },
}


def targets(rendered: Rendered) -> dict[str, list[dict[str, Any]]]:
    """The labels of each job's targets; `at`: its address."""
    config = yaml.safe_load(rendered.text("prometheus.yml"))
    return {
        job["job_name"]: [{"at": one["targets"][0], **one["labels"]} for one in job["static_configs"]]
        for job in config["scrape_configs"]
    }


def test_a_fleet_is_read_through_its_own_nginx(render: Render) -> None:
    found = targets(render("debian12", groups=GROUPS))
    assert [(one["at"], one["instance"], one["__metrics_path__"]) for one in found["llamaherd"]] == [
        ("cuda:9443", "cuda", "/metrics/llamaherd-server"),
        ("cuda:9443", "cuda/gpu1", "/metrics/llamaherd-server-gpu1"),
        ("rocky9:9443", "rocky9", "/metrics/llamaherd-server"),
    ]
    assert [one["at"] for one in found["nginx"]] == ["cuda:9443", "10.0.0.9:9443"]
    assert [one["at"] for one in found["node"]] == ["cuda:9443", "10.0.0.9:9443", "127.0.0.1:9100"]
    assert [(one["listener"], one["__param_target"]) for one in found["tls"]] == [
        ("private", "cuda:9443"),
        ("private", "rocky9:9443"),
        ("private", "10.0.0.9:9443"),
        ("public", "https://10.0.0.9:443/livez"),
    ]


def test_nothing_beyond_loopback_is_read_without_tls(render: Render) -> None:
    config = yaml.safe_load(render("debian12", groups=GROUPS).text("prometheus.yml"))
    plain = [
        one["targets"][0]
        for job in config["scrape_configs"]
        for one in job["static_configs"]
        if one["labels"].get("__scheme__", job.get("scheme", "http")) == "http"
    ]
    assert len(plain) > 4
    assert all(address.startswith("127.0.0.1:") for address in plain)


@pytest.mark.needs("promtool")
def test_promtool_accepts_it(render: Render) -> None:
    found = render("debian12", groups=GROUPS)
    config = found.text("prometheus.yml")
    [manager] = yaml.safe_load(config)["alerting"]["alertmanagers"]
    assert manager == {
        "scheme": "https",
        "path_prefix": "/am",
        "static_configs": [{"targets": ["alerts.internal:9093"]}],
    }
    local = found.folder / "prometheus-local.yml"  # promtool looks for the files that it names
    local.write_text(re.sub(r"/etc/prometheus/llamaherd/(rules\.yml|\w+\.(crt|key))", "/dev/null", config))
    command = [need("promtool"), "check", "config", "--syntax-only", str(local)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_are_for_the_monitoring_hosts_certificates(render: Render) -> None:
    server = render("cuda", groups=GROUPS).text("nginx.conf")
    assert re.search(
        r"map \$ssl_client_s_dn \$llamaherd_is_monitoring \{\s+default 0;\s+\"CN=debian12\" 1;\s+\}", server
    )
    block = server.split("listen 9443 ssl;")[1].split("\n    }")[0]
    assert "ssl_verify_client on;" in block
    assert re.search(r"if \(\$llamaherd_is_monitoring = 0\) \{\s+return 403;", block)
    passed = dict(re.findall(r"location = (\S+) \{\s+proxy_pass (\S+);", block))
    assert passed == {
        "/metrics/llamaherd-server": "http://127.0.0.1:8080/metrics",
        "/metrics/llamaherd-server-gpu1": "http://127.0.0.1:8082/metrics",
        "/metrics/node": "http://127.0.0.1:9100/metrics",
        "/metrics/nginx": "http://127.0.0.1:9113/metrics",
    }


def test_a_host_that_watches_itself_opens_nothing(render: Render) -> None:
    alone = render("debian12", groups={"monitoring": {"hosts": {"debian12": None}}})
    assert "listen 127.0.0.1:9443 ssl;" in alone.text("nginx.conf")
    assert {one["at"].split(":")[0] for job in targets(alone).values() for one in job} == {"127.0.0.1"}


def test_without_the_group_nothing_is_there_to_read(debian: Rendered) -> None:
    assert not re.search(r"9443|stub_status|/metrics/", debian.text("nginx.conf"))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"ca_file": "/etc/prometheus/llamaherd/ca.crt"}),
        (
            {"llamaherd_nginx_tls": "acme", "llamaherd_nginx_names": ["llm.example.com"]},
            {"server_name": "llm.example.com"},
        ),
    ],
    ids=["private_ca", "acme"],
)
def test_an_edges_certificate_is_held_against_who_signed_it(
    render: Render, own: dict[str, Any], expected: dict[str, str]
) -> None:
    modules = yaml.safe_load(render("debian12", groups=GROUPS, **own).text("blackbox.yml"))["modules"]
    assert modules["public"]["http"]["tls_config"] == expected


def test_the_units_start_with_our_settings_only(render: Render) -> None:
    found = render("debian12", groups=GROUPS)
    assert "ConditionPathExists=/etc/prometheus/llamaherd/prometheus.yml\n" in found.text("prometheus.conf")
    assert re.search(
        r"ExecStart=\nExecStart=/usr/bin/prometheus --web\.listen-address=127\.0\.0\.1:9090 ",
        found.text("prometheus.conf"),
    )
    node = found.text("prometheus-node-exporter.conf")
    assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in node
    assert "ExecStart=/usr/bin/prometheus-node-exporter --web.listen-address=127.0.0.1:9100\n" in node
