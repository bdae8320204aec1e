"""A second context over the same weights, which computes in bounded pieces between the generating context's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import DecodeFailed, RequestError
from llamaherd_server.worker.backend import ABORTED, DONE
from llamaherd_server.worker.batch import Batch, Tokens
from llamaherd_server.worker.context import new_context
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.memory import DoesNotFit, check_fits, context_bytes
from llamaherd_server.worker.model import Model


class SideContext:
    """Initially closed. `settings`: those it was last opened with; `purpose` appears in error messages."""

    def __init__(self, model: Model, interrupt: Interrupt, purpose: str) -> None:
        self.settings = EngineSettings()
        self.handle: Any = None
        self._model, self._lib, self._interrupt, self._purpose = model, model.lib, interrupt, purpose

    @property
    def memory_bytes(self) -> float:
        """Estimated memory that `close` frees."""
        return self._bytes() if self.handle else 0.0

    def open(self, settings: EngineSettings, *, piece: int, cells: int, **more: Any) -> None:
        """Create the context for pieces of `piece` tokens and `cells` KV cells; `more`: further llama_context_params.

        Raises RequestError if the memory does not suffice.
        """
        self.settings = replace(
            settings,
            parallel=1,
            ctx_per_slot=cells,
            kv_unified=True,
            kv_cells=0,
            batch=piece,
            ubatch=piece,
            speculative="off",
        )
        try:
            check_fits(self._model, self.settings, needed=self._bytes())
            self.handle = new_context(self._model, self.settings, n_outputs_max=piece, **more)
        except DoesNotFit as error:
            raise RequestError("does_not_fit", None, f"no memory for {self._purpose}: {error}") from None
        self._interrupt.watch(self.handle)
        self._memory = self._lib.llama_get_memory(self.handle)
        self._batch = Batch(self._lib, piece)

    def close(self) -> None:
        if self.handle is not None:
            self._lib.llama_free(self.handle)
            self.handle = None

    def decode(self, shares: Sequence[tuple[Tokens, int]], *, output_from: int, mostly_for: int | None) -> bool:
        """Compute the shares; returns False if the step was interrupted.

        Raises RequestError if llama.cpp rejects them, DecodeFailed if the context is unusable.
        """
        self._batch.fill(shares, output_from=output_from)
        self._interrupt.mostly_for = mostly_for
        result = int(self._lib.llama_decode(self.handle, self._batch.native))
        if result in (DONE, ABORTED):
            return result == DONE
        if result < -1:
            raise DecodeFailed(f"llama_decode returned {result} for {self._purpose}")
        raise RequestError("internal", None, f"llama.cpp refused these inputs: llama_decode returned {result}")

    def forget(self, slot: int, start: int = -1) -> bool:
        """Drop the slot's cells from `start` on, by default all; returns False if only all can be dropped."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, slot, start, -1))

    def _bytes(self) -> float:
        """A generating context's memory, plus logits for every token in llama.cpp's buffer and in its output."""
        return context_bytes(self._model, self.settings) + 2 * 4 * self.settings.ubatch * self._model.n_vocab
