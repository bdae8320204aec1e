"""Which sites of a host's nginx are somebody else's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

import pytest

DEFAULT = "server {\n    listen 80 default_server;\n}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A Debian whose nginx has the package's site alone."""
    for folder in ("conf.d", "sites-available", "sites-enabled"):
        (tmp_path / "etc/nginx" / folder).mkdir(parents=True)
    (tmp_path / "etc/nginx/sites-available/default").write_text(DEFAULT)
    (tmp_path / "etc/nginx/sites-enabled/default").symlink_to("../sites-available/default")
    (tmp_path / "etc/nginx/nginx.conf").write_text("http {\n}\n")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    digest = hashlib.md5(DEFAULT.encode(), usedforsecurity=False).hexdigest()
    status = f"Package: nginx-common\nConffiles:\n /etc/nginx/sites-available/default {digest}\n"
    (tmp_path / "var/lib/dpkg/status").write_text(status)
    return tmp_path


def test_the_packages_site_is_nobodys(nginx_facts: ModuleType, root: Path) -> None:
    assert nginx_facts.nginx(root) == {"sites": [], "complaint": ""}


def test_a_changed_default_and_own_sites_are_somebodys(nginx_facts: ModuleType, root: Path) -> None:
    (root / "etc/nginx/sites-available/default").write_text(DEFAULT + "# mine\n")
    one_line = "server { listen 8443 ssl; } # server { listen 1; }\n"
    (root / "etc/nginx/sites-enabled/one-line").write_text(one_line)
    blog = (
        "server {\n  listen [::]:443 ssl;\n  listen 443 ssl;\n\n  listen 127.0.0.1:8081;\n  listen unix:/run/blog;\n}\n"
    )
    (root / "etc/nginx/conf.d/blog.conf").write_text(blog)
    (root / "etc/nginx/conf.d/off").write_text(blog)
    assert nginx_facts.nginx(root)["sites"] == [
        {
            "path": "/etc/nginx/conf.d/blog.conf",
            "listens": [{"line": 2, "port": 443}, {"line": 3, "port": 443}, {"line": 5, "port": 8081}],
        },
        {"path": "/etc/nginx/sites-enabled/default", "listens": [{"line": 2, "port": 80}]},
        {"path": "/etc/nginx/sites-enabled/one-line", "listens": [{"line": 1, "port": 8443}]},
    ]


def test_a_server_in_nginx_conf_is_somebodys_until_it_is_ours(nginx_facts: ModuleType, root: Path) -> None:
    main = root / "etc/nginx/nginx.conf"
    main.write_text("http {\n  server {\n    listen 127.0.0.1;\n  }\n}\n")
    assert nginx_facts.nginx(root)["sites"] == [{"path": "/etc/nginx/nginx.conf", "listens": [{"line": 3, "port": 80}]}]
    (root / "etc/nginx/nginx.conf.before-llamaherd").touch()
    assert nginx_facts.nginx(root)["sites"] == []
