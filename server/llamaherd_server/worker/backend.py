"""What the step loop needs of a context. context.Context is the real one; tests have one that only keeps count."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import TokenLogprob
from llamaherd_server.worker.sequence import Drawn, Row, Sequence, Share

if TYPE_CHECKING:
    from llamaherd_server.worker.speculation import Source

# What llama_decode returns; anything else leaves the context unusable.
DONE = 0
NO_ROOM = 1  # in the KV cache; nothing has changed
ABORTED = 2  # some of the batch has been computed
INVALID = -1  # the batch was refused; nothing has changed

Part: TypeAlias = tuple[Any, int, int]
"""A saved state, its bytes, and up to which position it counts."""

Checkpoint: TypeAlias = tuple[int, bytes]
"""A length, and the partial state there."""


class Backend(Protocol):
    """`size` is its KV cells; a common prefix of fewer than `least_shared` tokens is not worth copying.

    `cuts`: a slot can be cut back to any length; otherwise to those that it `keeps`, and to its checkpoints. `chains`:
    a part of a slot can be saved, and loaded after others. `stops`: a step can be aborted. `most_drafted`: how many
    drafted tokens a batch may have.
    """

    settings: EngineSettings
    size: int
    least_shared: int
    cuts: bool
    chains: bool
    stops: bool
    most_drafted: int

    @property
    def drafts(self) -> Source | None:
        """Those of a draft model; None: what a text repeats is drafted."""

    def decode(self, shares: list[Share]) -> int:
        """Compute the next tokens of each sequence, as many as its share; one of the codes above."""

    def held(self, slot: int) -> int:
        """How many positions of a slot are intact after a decode that was aborted."""

    def sample(self, rows: list[Row]) -> list[Drawn]:
        """The next token of each sequence, which differ, from its row of the last batch; None: it will be `late`."""

    def late(self, sequence: Sequence, wait_s: float) -> Drawn:
        """The token that `sample` could not give; None: nor after `wait_s` seconds more."""

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

    def save_part(self, slot: int, start: int, buffer: Callable[[int], Any]) -> int:
        """Write a slot's state from position `start` on to the buffer that is given for its bytes; 0: none was."""

    def load_parts(self, slot: int, parts: list[Part], back: bytes | None) -> bool:
        """Put saved parts into an empty slot, then go `back` to a checkpoint; False, and the slot is empty, if not."""

    def keeps(self, slot: int, length: int) -> bool:
        """Whether a slot's first `length` positions can be gone on from without a checkpoint."""

    def checkpoint(self, slot: int) -> bytes:
        """What of a slot's state could not be cut back to here later."""

    def rewind(self, slot: int, length: int, state: bytes) -> bool:
        """Cut a slot back to the checkpoint `state` at `length`; False, and the slot is empty, where that failed."""
