"""One llama-server process with its command line, private socket, key and heartbeat."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec

from llamaherd_server.engine.flags import flags
from llamaherd_server.engine.process import ChildProcess
from llamaherd_server.wire.engine_settings import EngineSettings, Placed
from llamaherd_server.wire.protocol import FromWorker, ModelInfo, NativeConfig, Ready, Sampling, Stats, Step
from llamaherd_server.worker.lib import ON_GPU

_LOADING_POLL_S = 0.05
_HEARTBEAT_S = 1.0
_RANDOM_SEED = 2**32 - 1
# llama-server closes idle connections after 5 s; ours must expire earlier.
_KEEPALIVE_S = 2.0
_PARTIAL = re.compile(r"layers \( *(\d+) overflowing\)")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class _Entry(msgspec.Struct):
    level: str = ""
    msg: str = ""


_entries = msgspec.json.Decoder(_Entry)


class NativeProcess(ChildProcess):
    """Implements engine.supervisor.Process; requests go over `http`.

    The socket is in a folder that only this user can enter. The key is passed in the environment, never as an argument.
    Every process gets a new socket and a new key.
    """

    http: httpx.AsyncClient

    async def start(self, config: bytes) -> None:
        self._config = config_ = msgspec.json.decode(config, type=NativeConfig)
        self._folder = Path(tempfile.mkdtemp(prefix="llamaherd-"))
        socket = str(self._folder / "llama-server.sock")
        key = secrets.token_urlsafe(32)
        # the binary reads LLAMA_ARG_* like flags, and only the settings may configure it
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        self._began = time.monotonic()
        self._ready = False
        self._beats = 0
        self._placed: Placed | None = None
        self._partial = 0
        self._process = await asyncio.create_subprocess_exec(
            *(config_.binary, *flags(config_, socket)),
            env={**inherited, "LLAMA_API_KEY": key},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=socket, limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S)
            ),
            base_url="http://llama-server",
            headers={"Authorization": f"Bearer {key}"},
            timeout=None,  # noqa: S113 (the front end has deadlines; the heartbeat detects a wedged process)
        )
        self._log = asyncio.create_task(self._pass_on_log())

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def exited(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; return whether the process has ended."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), timeout_s)
            return True
        return False

    def send(self, frame: bytes) -> None:
        """Do nothing: requests go over HTTP."""

    async def receive(self, timeout_s: float | None) -> FromWorker | None:
        """Return Ready once, then a Step each second as heartbeat; None once the process ended. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not await self.exited(_HEARTBEAT_S if self._ready else _LOADING_POLL_S):
                with suppress(httpx.HTTPError):  # it is not listening yet, still loading, or ending
                    message: FromWorker = await (self._beat() if self._ready else self._introduce())
                    return message
        return None

    async def ended(self) -> str:
        """Wait for the process to end; return how it ended and the last line of its log, if any."""
        how = await super().ended()
        await self.http.aclose()
        shutil.rmtree(self._folder, ignore_errors=True)
        return how

    async def _pass_on_log(self) -> None:
        """Read both streams: with --log-jsonl the log is on standard output, fatal errors on standard error."""
        stdout = self._read(self._process.stdout, self._pass_on_entry)
        await asyncio.gather(stdout, self._read(self._process.stderr, self._pass_on))

    def _pass_on_entry(self, line: bytes) -> None:
        """Log warnings, errors and the placement of layers; other entries are per request and contain model output."""
        try:
            entry = _entries.decode(line)
        except msgspec.DecodeError:
            return
        if found := _PARTIAL.search(entry.msg):
            self._partial += int(found[1])
        if found := ON_GPU.search(entry.msg):
            self._placed = Placed(gpu_layers=int(found[1]), layers=int(found[2]), partial_layers=self._partial)
        if found or entry.level in ("warn", "error"):
            self._pass_on(entry.msg.strip().replace("\n", "\\n").encode())

    async def get(self, path: str) -> Any:
        """Return the JSON response of a GET; raises httpx.HTTPError."""
        return (await self.http.get(path)).raise_for_status().json()

    async def _introduce(self) -> Ready:
        await self.get("/health")
        props, models = await self.get("/props"), await self.get("/v1/models")
        special = await self.http.post("/tokenize", json={"content": "", "add_special": True})
        meta = models["data"][0]["meta"]
        self._ready = True
        return Ready(
            model=ModelInfo(
                description=str(meta.get("ftype", "")),
                architecture="",  # llama-server does not return it
                n_params=meta["n_params"],
                size_bytes=meta["size"],
                n_ctx_train=meta["n_ctx_train"],
                n_vocab=meta["n_vocab"],
                n_embd=meta["n_embd"],
                add_bos=bool(special.raise_for_status().json()["tokens"]),
                bos_token=props["bos_token"],
                eos_token=props["eos_token"],
                chat_template=props["chat_template"] or None,
                pooling="rank" if {"--rerank", "--reranking"} & {*self._config.extra_args} else "mean",
                sampling=_defaults(props["default_generation_settings"]["params"]),
                build=props["build_info"],
                placed=self._placed,
            ),
            settings=self._config.settings,
            load_s=time.monotonic() - self._began,
        )

    async def _beat(self) -> Step:
        """Query the slots: llama-server's compute thread answers, so a response shows that its loop is running."""
        slots = await self.get("/slots")
        self._beats += 1
        used = sum(slot.get("n_prompt_tokens", 0) for slot in slots)
        stats = Stats(
            step=self._beats,
            slots_busy=sum(slot["is_processing"] for slot in slots),
            waiting=0,
            parked=0,
            kv_used=used,
            kv_size=_cells(self._config.settings),
            batch_tokens=0,
            decode_s=0.0,
            sample_s=0.0,
            overhead_s=0.0,
            preemptions=0,
            cached_tokens=0,
            prompt_tokens=0,
        )
        return Step([], stats)


def _cells(settings: EngineSettings) -> int:
    return (settings.kv_unified and settings.kv_cells) or settings.parallel * settings.ctx_per_slot


def _end_with_parent() -> None:
    """Have Linux kill the process when the front end dies, even by a SIGKILL that no handler can catch (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _defaults(params: dict[str, Any]) -> dict[str, int | float]:
    """Return the sampling values of the GGUF and the command line that differ from llama-server's defaults."""
    usual = msgspec.structs.asdict(Sampling()) | {"seed": _RANDOM_SEED, "max_tokens": -1}
    return {
        name: value
        for name, value in params.items()
        if isinstance(default := usual.get(name), int | float) and not math.isclose(value, default, rel_tol=1e-6)
    }
