"""Grammar-constrained sampling as in llama-server: a forbidden token is sampled again from the allowed ones.

The grammar runs in its own process (forkserver.py), whose answer may arrive some steps later. Needs numpy, so this is
imported only for a request with a grammar.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from llamaherd_server.wire.errors import RequestError
from llamaherd_server.worker.forkserver import ALLOWED, Child
from llamaherd_server.worker.logits import Candidates, row_of
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.samplers import Draw
from llamaherd_server.worker.sampling import NativeSampler


class GrammarSampler:
    """Implements sequence.Sampler with `chain` and the grammar in `child`."""

    logits: NDArray[np.float32]  # of the token that is being sampled
    can_be_late = True

    def __init__(self, model: Model, chain: NativeSampler, child: Child) -> None:
        self._model = model
        self._chain = chain
        self._child = child
        self._candidates = Candidates(model)
        self._asked: int | None = None
        self._forced: int | None = None

    @property
    def top_logits(self) -> int:
        return self._chain.top_logits

    @property
    def changed(self) -> Collection[int]:
        return self._chain.changed

    def sample(self, draw: Draw) -> int | None:
        """Send the chain's choice to the grammar. Always None: `late` returns the token."""
        if self._asked is None:
            self.logits = row_of(self._model, draw.context, draw.row).copy()
            if self._forced is not None:
                self._asked = self._forced
            elif draw.entries is not None:
                self._asked = self._chain.choice(draw)
            else:
                self._asked = self._choose(self.logits)[0]
            self._forced = None
            self._child.ask(self._asked)
        return None

    def force(self, token: int) -> None:
        """Make the next `sample` choose this token, if the grammar allows it."""
        self._forced = token

    def late(self, wait_s: float) -> int | None:
        answer = self._child.answer(self._model.n_vocab, wait_s)
        if answer is None or self._asked is None:
            return None
        token, self._asked = self._asked, None
        if answer != ALLOWED:
            forbidden = np.frombuffer(answer, np.uint8) != 0
            token, logit = self._choose(np.where(forbidden, np.float32(-math.inf), self.logits))
            if answer[token] or not math.isfinite(logit):
                message = "no token satisfies both the grammar and the request's logit_bias and ignore_eos"
                raise RequestError("invalid_grammar", "grammar", message)
            self._child.accept(token)
        self._chain.accept(token)
        return token

    def close(self) -> None:
        self._chain.close()
        self._child.close()

    def _choose(self, logits: NDArray[np.float32]) -> tuple[int, float]:
        self._candidates.load(logits)
        return self._chain.choose(self._candidates)
