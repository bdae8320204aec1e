"""The command line: `python -m llamaherd_server --config server.toml`, and `… keys` for the API keys."""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import hashlib
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop

from llamaherd_server import keyfile
from llamaherd_server.api.state import AppState
from llamaherd_server.app import create_app
from llamaherd_server.config.keys import KeysError
from llamaherd_server.config.settings import Settings, SettingsError, load
from llamaherd_server.engine.base import Engine
from llamaherd_server.engine.context_length import with_context_length
from llamaherd_server.engine.draft_model import check_vocabulary
from llamaherd_server.engine.embedded import EmbeddedEngine
from llamaherd_server.engine.native import NativeEngine
from llamaherd_server.gguf import part_paths
from llamaherd_server.http.protocol import Protocol
from llamaherd_server.process import log

DEFAULT_CONFIG = Path("/etc/llamaherd/server.toml")
# Longer than the 60 s for which nginx keeps idle upstream connections, so that nginx never writes to a closing one.
_KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    """Leaves signals to Lifecycle: uvicorn would close the listening socket first and re-raise the signal last."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, exit on the second."""
        del sig, frame
        state: AppState = self.config.app.state.llamaherd  # type: ignore[union-attr]
        if state.lifecycle.draining:
            self.should_exit = self.force_exit = True
        else:
            asyncio.get_running_loop().call_soon_threadsafe(state.lifecycle.drain)


def main() -> None:
    """Serve until SIGTERM. Exit codes: 0 after a drain, 78 for invalid settings, 1 for other failures."""
    parser = argparse.ArgumentParser(prog="llamaherd-server", description="OpenAI-compatible server over llama.cpp")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="server.toml (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="check the settings and the keys, then exit")
    commands = parser.add_subparsers(dest="command", title="commands")
    keyfile.add_arguments(commands.add_parser("keys", help="add, list or revoke API keys"))
    arguments = parser.parse_args()
    log.configure()
    try:
        if arguments.command == "keys":
            keyfile.run(arguments, arguments.file or _keys_file(arguments.config))
            return
        settings = load(arguments.config)
        app = create_app(settings, partial(_engine, settings.loaded_at_once(), check=arguments.check))
    except (SettingsError, KeysError) as error:
        sys.stderr.write(f"llamaherd-server: {error}\n")
        sys.exit(os.EX_CONFIG)
    if arguments.check:
        return
    listener = _listen(settings)
    state: AppState = app.state.llamaherd
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)

    def stop() -> None:
        server.should_exit = True

    state.lifecycle.over = stop
    gc.freeze()  # keeps full collections during large requests from traversing all modules
    uvloop.run(_serve(server, listener, state))
    sys.exit(state.lifecycle.exit_code)


async def _serve(server: _Server, listener: socket.socket, state: AppState) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, state.lifecycle.reload)
    await server.serve([listener])


def _keys_file(config: Path) -> Path:
    path = load(config).auth.keys_file
    if path is None:
        raise SettingsError(f"auth.keys_file is not set in {config}: set it, or use --file")
    return path


def _engine(among: int, settings: Settings, *, check: bool = False) -> Engine:
    """Create a model's engine; `among` models share the memory. `check` compares llama-server's flags with its help."""
    model, engine, limits = settings.model, settings.engine, settings.limits
    path = part_paths(model.path)[0]
    timeouts = {"heartbeat_timeout_s": limits.heartbeat_timeout_s, "load_timeout_s": limits.load_timeout_s}
    draft = model.draft and part_paths(model.draft)[0]
    if draft:
        check_vocabulary(path, draft)
    if engine.kind == "embedded":
        return EmbeddedEngine(
            path,
            with_context_length(settings, among),
            placement=model.placement,
            draft=draft,
            chat_template=model.chat_template,
            lora=model.adapters(),
            prompt_cache_mib=limits.prompt_cache_mib,
            prompt_cache_share=1 / among,
            prompt_cache_dir=_prompts_of(limits.prompt_cache_dir, model.name),
            **timeouts,
        )
    native = NativeEngine(
        engine.program(),
        path,
        with_context_length(settings, among),
        placement=model.placement,
        name=model.name,
        mmproj=model.mmproj,
        draft=draft,
        chat_template=model.chat_template,
        lora=model.adapters(),
        rpc=engine.rpc,
        extra_args=[*_cache_ram(limits.prompt_cache_mib), *engine.extra_args],
        **timeouts,
    )
    if check:
        native.check_flags()
    return native


def _cache_ram(mib: int | None) -> list[str]:
    return [] if mib is None else ["--cache-ram", str(mib)]


def _prompts_of(folder: Path | None, model: str) -> Path | None:
    return folder and folder / hashlib.blake2b(model.encode(), digest_size=8).hexdigest()


def _listen(settings: Settings) -> socket.socket:
    """Bind the port, before anything slow is started; exits with a message if that fails."""
    host, port = settings.http.host, settings.http.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # inherited by connections: closes those whose client reads nothing for this long
            idle_ms = int(settings.limits.idle_client_timeout_s * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, idle_ms)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        remedy = "set http.port to a free one" if error.errno == errno.EADDRINUSE else "check http.host and http.port"
        sys.exit(f"llamaherd-server: cannot listen on {host} port {port}: {error.strerror}: {remedy}")
    return listener


if __name__ == "__main__":
    main()
