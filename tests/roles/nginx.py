"""A real nginx on loopback, with the configuration that the role renders."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.debian import need
from tests.roles.conftest import run_roles

HOST = "debian12"  # of tests/roles/facts
# The edge's certificate and the hosts' in one, which is its own CA.
SELF_SIGNED = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 7"
SIGN = (
    f"{SELF_SIGNED} -keyout tls.key -out tls.crt -subj /CN={HOST}"
    " -addext subjectAltName=IP:127.0.0.1,DNS:inference.llamaherd.internal"
)


def certificates(folder: Path) -> Path:
    """Where the configuration that `folder` will have finds its certificates, with one that is its own CA."""
    made = folder / "nginx/llamaherd"
    made.mkdir(parents=True)
    subprocess.run(SIGN.split(), cwd=made, check=True, capture_output=True)
    shutil.copy(made / "tls.crt", made / "ca.crt")
    return made


def render(folder: Path, variables: Mapping[str, Any]) -> Path:
    """nginx.conf as HOST would get it, with its paths in `folder`."""
    done = run_roles(folder, HOST, dict(variables))
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    home = folder / "nginx"
    if not home.exists():
        certificates(folder)
    (home / "mime.types").write_text("types {}\n")
    text = (folder / "out/nginx.conf").read_text()
    text = text.replace("user www-data;", "user root;")  # who alone can read `folder`
    text = re.sub(r"/etc/nginx/llamaherd/\w+/", "/etc/nginx/llamaherd/", text)
    text = re.sub(r" (/etc/nginx|/run|/var/log/nginx)/", f" {home}/", text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"    {kind}_temp_path {home}/{kind};\n" for kind in kinds)
    config = home / "nginx.conf"
    config.write_text(text.replace("http {\n", f"http {{\n{temporary}", 1))
    return config


@contextmanager
def running(config: Path) -> Iterator[None]:
    """nginx with this configuration, until the block ends."""
    command = [need("nginx"), "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # it listens when the command returns
    if done.returncode:
        raise RuntimeError(done.stderr)
    try:
        yield
    finally:
        subprocess.run([*command, "-s", "stop"], check=True)


@contextmanager
def answering(respond: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of what stands in for a server until the block ends: `respond` gets each connection, one by one."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection:
                respond(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
