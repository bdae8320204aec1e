"""Operations on whole rows of logits. Needs numpy, so it is imported only when a request needs them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaherd_server.wire.protocol import Logprob, TokenLogprob
from llamaherd_server.worker.draft_model import DraftModel
from llamaherd_server.worker.model import Model


def row_of(model: Model | DraftModel, context: Any, row: int) -> NDArray[np.float32]:
    """The logits of batch row `row`, shape (n_vocab,): a view of llama.cpp's own memory."""
    return np.ctypeslib.as_array(model.lib.llama_get_logits_ith(context, row), shape=(model.n_vocab,))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log probabilities, shape (n_vocab,), of logits that no sampler has modified."""
    values: NDArray[np.float32] = logits - np.max(logits)
    values -= np.float32(np.log(np.exp(values).sum(dtype=np.float64)))
    return values


def most_likely(logprobs: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """Return the `count` tokens with the highest log probabilities, the most likely first."""
    best = np.argpartition(logprobs, -count)[-count:]
    return best[np.argsort(logprobs[best])[::-1]].astype(np.int32)


def likeliest(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The most likely token, and its probability."""
    token = int(logits.argmax())
    return token, 1 / float(np.exp(logits - logits[token]).sum())


def token_logprob(model: Model, logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Log probabilities of `token` and of the `top` most likely tokens, by logits that no sampler has modified."""
    values = log_softmax(logits)
    best = most_likely(values, top).tolist() if top else []
    likely = [Logprob(one, model.piece(one, special=True), float(values[one])) for one in best]
    return TokenLogprob(token, model.piece(token, special=True), float(values[token]), likely)


class Candidates:
    """A llama_token_data_array over the whole vocabulary, to which samplers are applied one by one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._data = np.zeros(model.n_vocab, dtype=[("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._pointer = self._data.ctypes.data_as(ctypes.POINTER(model.lib.llama_token_data))
        self._array = model.lib.llama_token_data_array(self._pointer, model.n_vocab, -1, False)

    def load(self, logits: NDArray[np.float32]) -> None:
        """Reset to these logits."""
        self._data["id"] = np.arange(self._model.n_vocab)
        self._data["logit"] = logits
        self._array.data = self._pointer  # XTC drops tokens by advancing it
        self._array.size, self._array.selected, self._array.sorted = self._model.n_vocab, -1, False

    def apply(self, sampler: Any) -> None:
        self._model.lib.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def selected(self) -> tuple[int, float]:
        """The token that a chain has selected, and its logit."""
        chosen = self._array.data[self._array.selected]
        return int(chosen.id), float(chosen.logit)
