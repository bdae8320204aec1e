"""Tries a grammar before llama-server gets it, which would print one that does not compile, or die of it."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import structlog

from llamaherd_server.engine.base import EngineError
from llamaherd_server.worker.errors import RequestError
from llamaherd_server.worker.forkserver import Forkserver, Job

log = structlog.get_logger()

# Tokens that it is tried for, and the CPU time that each may take: in llama-server it is every stream's.
TRIAL_TOKENS, TOKEN_S = 24, 0.15
AT_ONCE = 3


class Trials:
    """Runs some trials at once; the result for a grammar is remembered.

    Prebuilt archives of llama.cpp come without the binding that a trial needs: there a grammar goes untried.
    """

    def __init__(self, model_path: Path) -> None:
        self._forkserver = Forkserver(str(model_path))
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._possible = importlib.util.find_spec("llama_cpp") is not None
        if not self._possible:
            log.warning("llama-cpp-python is not installed: grammars go to llama-server untried")

    async def run(self, grammar: str) -> None:
        """Raises EngineError for a grammar that is refused."""
        if not self._possible or self._forkserver.has_passed(grammar):
            return
        job = Job(grammar=grammar, trial=TRIAL_TOKENS, trial_s=TOKEN_S)
        try:
            async with self._turn:
                child = await asyncio.to_thread(self._forkserver.open, job)
                try:
                    await asyncio.to_thread(child.prepared)
                finally:
                    child.close()
        except RequestError as error:
            raise EngineError(error.code, error.message, error.param) from None

    def close(self) -> None:
        """End the process that children are forked from."""
        self._forkserver.close()
