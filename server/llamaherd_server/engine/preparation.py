"""What llama-server had better not do with a request's texts itself, done in a child process before it gets them.

It would print a grammar that does not compile, or die of it; and long texts would take its few HTTP threads.
"""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import structlog

from llamaherd_server.process.turns import Turns
from llamaherd_server.wire.errors import EngineError, RequestError
from llamaherd_server.worker.forkserver import MOST_TOKENS, Forkserver, Job, Prepared

log = structlog.get_logger()

# Tokens that it is tried for, and what each may cost: in llama-server that is every stream's time.
TRIAL_TOKENS, TRIAL_COST = 16, 12.0
AT_ONCE, LEFT_FOR_OTHERS = 4, 1


class Preparation:
    """Runs some children at once; the result for a grammar is remembered.

    Prebuilt archives of llama.cpp come without the binding that a child needs: there texts go on as they are.
    """

    def __init__(self, model_path: Path) -> None:
        self._forkserver = Forkserver(str(model_path))
        self._turns = Turns(AT_ONCE, LEFT_FOR_OTHERS)
        self.possible = importlib.util.find_spec("llama_cpp") is not None
        if not self.possible:
            log.warning("llama-cpp-python is not installed: grammars go to llama-server untried")

    async def try_grammar(self, grammar: str) -> None:
        """Raises EngineError for a grammar that is refused."""
        if self.possible and not self._forkserver.has_passed(grammar):
            await self._run(Job(grammar=grammar, trial=TRIAL_TOKENS, trial_cost=TRIAL_COST))

    async def tokenize(
        self, text: str, *, add_special: bool, parse_special: bool, room: int | None = None
    ) -> list[int]:
        """The text's tokens; raises EngineError, also where a slot of `room` tokens has no room for it."""
        prepared = await self._run(Job([text], add_special, parse_special, room, MOST_TOKENS if room is None else None))
        return prepared.tokens[0]

    async def count_tokens(self, text: str, *, add_special: bool) -> int:
        """How many tokens the text has; raises EngineError."""
        return (await self._run(Job([text], add_special, counted=True))).count

    async def _run(self, job: Job) -> Prepared:
        try:
            async with self._turns.one():
                child = await asyncio.to_thread(self._forkserver.open, job)
                try:
                    return await asyncio.to_thread(child.prepared)
                finally:
                    child.close()
        except RequestError as error:
            raise EngineError(error.code, error.message, error.param, error.details) from None

    def close(self) -> None:
        """End the process that children are forked from."""
        self._forkserver.close()
