"""What llama-server had better not do with a request's texts itself, done in a child process before it gets them.

It would print a grammar that does not compile, or die of it; and long texts would take its few HTTP threads.
"""

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


class Preparation:
    """Runs some children at once; the result for a grammar is remembered.

    Prebuilt archives of llama.cpp come without the binding that a child needs: there texts go on as they are.
    """

    def __init__(self, model_path: Path) -> None:
        self._forkserver = Forkserver(str(model_path))
        self._turn = asyncio.Semaphore(AT_ONCE)
        self.possible = importlib.util.find_spec("llama_cpp") is not None
        if not self.possible:
            log.warning("llama-cpp-python is not installed: grammars go to llama-server untried")

    async def try_grammar(self, grammar: str) -> None:
        """Raises EngineError for a grammar that is refused."""
        if self.possible and not self._forkserver.has_passed(grammar):
            await self._run(Job(grammar=grammar, trial=TRIAL_TOKENS, trial_s=TOKEN_S))

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The text's tokens; raises EngineError."""
        [tokens] = await self._run(Job([text], add_special, parse_special))
        return tokens

    async def _run(self, job: Job) -> list[list[int]]:
        try:
            async with self._turn:
                child = await asyncio.to_thread(self._forkserver.open, job)
                try:
                    return await asyncio.to_thread(child.prepared)
                finally:
                    child.close()
        except RequestError as error:
            raise EngineError(error.code, error.message, error.param) from None

    def close(self) -> None:
        """End the process that children are forked from."""
        self._forkserver.close()
