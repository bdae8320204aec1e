"""Tries grammars and tokenizes long texts in child processes before llama-server gets them.

llama-server would print a grammar that does not compile, or crash on it; long texts would block its few HTTP threads.
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

# Tokens of a grammar's trial and the cost limit of each, stricter than forkserver's: a slow grammar delays all streams.
TRIAL_TOKENS, TRIAL_COST = 16, 12.0
AT_ONCE, LEFT_FOR_OTHERS = 4, 1


class Preparation:
    """Runs at most AT_ONCE child processes at a time and caches the verdict on each grammar.

    Children need llama-cpp-python. Without it, as with prebuilt archives of llama.cpp, texts are passed on unchecked.
    """

    def __init__(self, model_path: Path) -> None:
        self._forkserver = Forkserver(str(model_path))
        self._turns = Turns(AT_ONCE, LEFT_FOR_OTHERS)
        self.possible = importlib.util.find_spec("llama_cpp") is not None
        if not self.possible:
            log.warning("llama-cpp-python is not installed: grammars are passed to llama-server unchecked")

    async def try_grammar(self, grammar: str) -> None:
        """Try the grammar in a child process; raises EngineError if it is refused."""
        if self.possible and not self._forkserver.has_passed(grammar):
            await self._run(Job(grammar=grammar, trial=TRIAL_TOKENS, trial_cost=TRIAL_COST))

    async def tokenize(
        self, text: str, *, add_special: bool, parse_special: bool, room: int | None = None
    ) -> list[int]:
        """Return the tokens of the text; raises EngineError, also if they do not fit into a slot of `room` tokens."""
        prepared = await self._run(Job([text], add_special, parse_special, room, MOST_TOKENS if room is None else None))
        return prepared.tokens[0]

    async def count_tokens(self, text: str, *, add_special: bool) -> int:
        """Return the number of tokens in the text; raises EngineError."""
        return (await self._run(Job([text], add_special, counted=True))).count

    async def _run(self, job: Job) -> Prepared:
        try:
            async with self._turns.place():
                child = await asyncio.to_thread(self._forkserver.open, job)
                try:
                    return await asyncio.to_thread(child.prepared)
                finally:
                    child.close()
        except RequestError as error:
            raise EngineError(error.code, error.message, error.param, error.details) from None

    def close(self) -> None:
        """Stop the process from which children are forked."""
        self._forkserver.close()
