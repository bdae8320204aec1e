"""What the step loop needs of a context. context.Context is the real one; tests have one that only keeps count."""

from __future__ import annotations

from typing import Protocol

from llamaherd_server.protocol import EngineSettings, TokenLogprob
from llamaherd_server.worker.sequence import Sequence, Share

# What llama_decode returns; anything else leaves the context unusable.
DONE = 0
NO_ROOM = 1  # in the KV cache; nothing has changed
ABORTED = 2  # some of the batch has been computed
INVALID = -1  # the batch was refused; nothing has changed


class Backend(Protocol):
    """`size` is its KV cells; a common prefix of fewer than `least_shared` tokens is not worth copying.

    In the slot that has them, `least_in_place` are enough.
    """

    settings: EngineSettings
    size: int
    least_shared: int
    least_in_place: int

    def decode(self, shares: list[Share]) -> int:
        """Compute the next tokens of each sequence, as many as its share; one of the codes above."""

    def held(self, slot: int) -> int:
        """How many positions of a slot are intact after a decode that was aborted."""

    def sample(self, sequence: Sequence, row: int) -> int | None:
        """The sequence's next token, from row `row` of the last batch; None: it will be `late`. Raises RequestError."""

    def late(self, sequence: Sequence, wait_s: float) -> int | None:
        """The token that `sample` could not give; None: nor after `wait_s` seconds more. Raises RequestError."""

    def logprob(self, sequence: Sequence, row: int | None, token: int, top: int) -> TokenLogprob:
        """The token's log probability and the `top` most likely ones, from row `row` of the last batch.

        Row None: the token was late, and comes from an earlier batch.
        """

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes; a control token has some only when `special`."""

    def is_eog(self, token: int) -> bool:
        """Whether the token ends the generation."""

    def forget(self, slot: int, start: int = 0) -> None:
        """Drop a slot's cells from position `start` on."""

    def share(self, source: int, target: int, length: int) -> None:
        """Give the empty slot `target` the first `length` positions of `source`."""

    def save(self, slot: int) -> bytes:
        """The content of a slot's cells."""

    def restore(self, slot: int, state: bytes) -> bool:
        """Put saved cells into an empty slot; False, and the slot stays empty, where this context cannot take them."""
