"""A streaming client with the same cost for every server: plain asyncio, one connection for each request."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

from llamaherd_loadtest.sse import END, parse_line


@dataclass
class Sample:
    """One streamed completion. Times are in seconds on one clock; `arrivals` has an entry for each content event."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def complete(
    port: int, prompt: str, max_tokens: int, temperature: float = 0.8, *, model: str = "bench", key: str = "none"
) -> Sample:
    """Stream one /v1/completions. Raises RuntimeError unless the server returns a complete stream."""
    fields = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    return await _stream(port, "/v1/completions", fields, key)


async def chat(port: int, messages: list[dict[str, str]], tokens: int) -> Sample:
    """Stream a greedy /v1/chat/completions of exactly `tokens` tokens. Raises RuntimeError as `complete` does."""
    fields = {"model": "bench", "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return await _stream(port, "/v1/chat/completions", fields, "none")


async def _stream(port: int, path: str, fields: dict[str, object], key: str) -> Sample:
    body = json.dumps({**fields, "stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
        % (path.encode(), key.encode(), len(body), body)
    )
    sample = Sample(sent=time.perf_counter())
    other = b""
    finished = False
    # All servers here send each event as a chunk of its own, so chunk sizes are on lines that can be skipped.
    async for line in reader:
        now = time.perf_counter()
        chunk = parse_line(line)
        if chunk is END:
            finished = True
            break
        if chunk is None or chunk.is_error:
            other += line
            continue
        if chunk.text:
            sample.arrivals.append(now)
            sample.text += chunk.text
        if usage := chunk.usage:
            sample.tokens, sample.prompt_tokens = usage.completion_tokens or 0, usage.prompt_tokens or 0
            details = usage.prompt_tokens_details
            sample.cached_tokens = (details.cached_tokens if details else None) or 0
    writer.close()
    if not finished or not sample.arrivals:
        raise RuntimeError(f"no full stream from port {port}: {other[:500].decode(errors='replace')}")
    sample.tokens = sample.tokens or len(sample.arrivals)
    return sample
