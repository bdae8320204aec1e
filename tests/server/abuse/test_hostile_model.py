"""The real server with a model file whose chat template attacks it: only the request that renders it fails."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from bench.servers import Running

from ..conftest import required, running

KEY = b"tokenizer.chat_template"
TEMPLATE = """
{%- set ask = messages[-1].content %}
{%- if ask == 'internals' %}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif ask == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif ask == 'gigabytes' %}{{ 'a' * (ask | length * 99999999) }}
{%- else %}{{ ask }}{% endif %}"""


def hostile(path: Path) -> Path:
    """The test model with its template overwritten in place: llama.cpp's GGUF, a string is its length and its bytes."""
    content = bytearray(Path(required("LLAMAHERD_TEST_MODEL")).read_bytes())
    start = content.index(KEY) + len(KEY) + 4
    (length,) = struct.unpack_from("<Q", content, start)
    content[start + 8 : start + 8 + length] = TEMPLATE.encode().ljust(length)
    path.write_bytes(content)
    return path


def test_a_hostile_template_costs_its_own_requests(tmp_path: Path) -> None:
    with running(tmp_path, model={"path": hostile(tmp_path / "hostile.gguf")}) as server:

        def chat(ask: str) -> httpx.Response:
            body = {"messages": [{"role": "user", "content": ask}], "max_tokens": 1}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

        def complete() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)

        assert chat("hello").status_code == 200
        before = Running(0, server.process.pid).rss_mib
        for ask, message in (("internals", "unsafe"), ("loop", " time"), ("gigabytes", "memory")):
            with ThreadPoolExecutor() as pool:
                attack = pool.submit(chat, ask)
                assert complete().status_code == 200
                refused = attack.result()
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "template_error")
            assert message in refused.json()["error"]["message"]
            assert chat("hello").status_code == 200
        assert Running(0, server.process.pid).rss_mib < before + 64
        assert httpx.get(f"{server.url}/admin/engine").json()["restarts"] == 0
