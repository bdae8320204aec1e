"""Log probabilities from a row of logits, before any sampler touched them. Needs numpy, so imported when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llamaherd_server.protocol import Logprob, TokenLogprob


def token_logprob(logits: Any, n_vocab: int, token: int, top: int, piece: Callable[[int], bytes]) -> TokenLogprob:
    """The chosen `token` and the `top` most likely ones, by log softmax over all `n_vocab` logits."""
    row = np.ctypeslib.as_array(logits, shape=(n_vocab,)).astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    best = np.argpartition(row, -top)[-top:] if top else np.empty(0, dtype=np.int64)
    ordered = best[np.argsort(row[best])[::-1]]
    most_likely = [Logprob(int(one), piece(int(one)), float(row[one])) for one in ordered]
    return TokenLogprob(token, piece(token), float(row[token]), most_likely)
