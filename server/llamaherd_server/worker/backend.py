"""What the scheduler needs of a llama_context. context.Context implements it; tests use a fake without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.protocol import TokenLogprob
from llamaherd_server.worker.sequence import Drawn, Row, Sequence, Share

if TYPE_CHECKING:
    from llamaherd_server.worker.speculation import Source

# Return codes of llama_decode; any other leaves the context unusable.
DONE = 0
NO_ROOM = 1  # the KV cache is full; nothing has changed
ABORTED = 2  # part of the batch has been computed
INVALID = -1  # the batch was rejected; nothing has changed

Part: TypeAlias = tuple[Any, int, int]
"""A saved state, its size in bytes, and the position up to which it is used."""

Checkpoint: TypeAlias = tuple[int, bytes]
"""A length in tokens, and the partial state at that length."""


class Backend(Protocol):
    """`size` is the number of KV cells. A shared prefix of fewer than `least_shared` tokens is not worth copying.

    `cuts`: a slot can be truncated to any length; otherwise only to lengths that `keeps` accepts and to checkpoints.
    `chains`: part of a slot can be saved, and loaded after other parts. `stops`: a step can be aborted.
    `draft_depth`, `most_drafted`: the maximum number of drafted tokens of a sequence and in a batch.
    """

    settings: EngineSettings
    size: int
    least_shared: int
    cuts: bool
    chains: bool
    stops: bool
    draft_depth: int
    most_drafted: int

    @property
    def drafts(self) -> Source | None:
        """The draft model's context; None: drafts come from prompt lookup."""

    def decode(self, shares: list[Share]) -> int:
        """Compute the given number of tokens of each sequence. Returns one of the codes above."""

    def held(self, slot: int) -> int:
        """The number of positions of a slot that are valid after an aborted decode."""

    def sample(self, rows: list[Row]) -> list[Drawn]:
        """The next token of each sequence, all distinct, from its row of the last batch; None: ask `late`."""

    def late(self, sequence: Sequence, wait_s: float) -> Drawn:
        """The token for which `sample` returned None; None again if it takes more than another `wait_s` seconds."""

    def logprob(self, sequence: Sequence, row: int | None, token: int, top: int) -> TokenLogprob:
        """The log probabilities of the token and of the `top` most likely ones, from row `row` of the last batch.

        `row` is None for a late token, whose logits come from an earlier batch.
        """

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes; empty for a control token unless `special`."""

    def is_eog(self, token: int) -> bool:
        """Whether the token ends the generation."""

    def forget(self, slot: int, start: int = 0) -> None:
        """Drop a slot's cells from position `start` on."""

    def reject(self, slot: int, length: int) -> None:
        """Drop the end of a draft, from `length` on, that the last batch added. Raises DecodeFailed."""

    def share(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to the empty slot `target`."""

    def save(self, slot: int) -> bytes:
        """The state of a slot, serialized."""

    def restore(self, slot: int, state: bytes) -> bool:
        """Load saved cells into an empty slot. Returns False and leaves it empty if this context rejects them."""

    def save_part(self, slot: int, start: int, buffer: Callable[[int], Any]) -> int:
        """Write a slot's state from `start` on to `buffer(size)`. Returns the bytes written; 0 without a buffer."""

    def load_parts(self, slot: int, parts: list[Part], back: bytes | None) -> bool:
        """Load saved parts into an empty slot, then the checkpoint `back`, if given. Empties the slot on failure."""

    def keeps(self, slot: int, length: int) -> bool:
        """Whether a slot can be continued after its first `length` positions without a checkpoint."""

    def checkpoint(self, slot: int) -> bytes:
        """The part of a slot's state that truncation could not bring back later."""

    def rewind(self, slot: int, length: int, state: bytes) -> bool:
        """Rewind a slot to the checkpoint `state` at `length`. Empties the slot and returns False on failure."""
