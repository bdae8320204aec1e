"""An HTTPS client out of the standard library: what is verified must not depend on what clients happen to install."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests to one base URL; `ca` is the file with the CA's certificate, None for plain HTTP."""

    def __init__(self, url: str, ca: str | None, key: str) -> None:
        self.url, self.ca, self.key = urlsplit(url), ca, key

    def connect(self, context: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
        host, port = self.url.hostname or "", self.url.port
        if self.url.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        context = context or ssl.create_default_context(cafile=self.ca)
        return http.client.HTTPSConnection(host, port or 443, timeout=TIMEOUT_S, context=context)

    def refusal(self) -> str:
        """Why the certificate is refused; empty where it is not, or where nothing can be reached."""
        connection = self.connect()
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message.removesuffix(".")
        except OSError:  # of which each test tells
            return ""
        finally:
            connection.close()
        return ""

    def request(self, method: str, path: str, body: Any = None, *, key: str | None = "") -> Answer:
        """`key` None sends none, empty sends the client's own."""
        connection = self.connect()
        try:
            answer = self._send(connection, method, path, body, self.key if key == "" else key)
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def burst(self, path: str, count: int) -> list[Answer]:
        """The answers to `count` GET requests, sent at once over one connection: a slow client slows none of them."""
        ask = f"GET {path} HTTP/1.1\r\nHost: {self.url.netloc}\r\nAuthorization: Bearer {self.key}\r\n"
        connection = self.connect()
        try:
            connection.connect()
            connection.sock.sendall(f"{ask}\r\n".encode() * (count - 1) + f"{ask}Connection: close\r\n\r\n".encode())
            with connection.sock.makefile("rb") as file:
                answers = [BytesIO(answer) for answer in file.read().split(b"HTTP/1.1 ")[1:]]
        finally:
            connection.close()
        return [Answer(int(file.readline()[:3]), http.client.parse_headers(file), file.read()) for file in answers]

    def stream(self, path: str, body: Any) -> list[tuple[float, str]]:
        """The server-sent events' data, each with its time of arrival (monotonic seconds)."""
        connection = self.connect()
        try:
            answer = self._send(connection, "POST", path, body, self.key)
            assert answer.status == http.client.OK, answer.read()
            lines = ((time.monotonic(), line.decode().strip()) for line in answer)
            return [(at, line.removeprefix("data: ")) for at, line in lines if line.startswith("data: ")]
        finally:
            connection.close()

    @staticmethod
    def _send(
        connection: http.client.HTTPConnection, method: str, path: str, body: Any, key: str | None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        return connection.getresponse()
