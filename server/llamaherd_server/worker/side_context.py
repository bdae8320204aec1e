"""A context of its own over the same weights, computed in bounded pieces between the steps of the generating one."""

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
    """Closed at first. `settings` are those that it was opened with last; `purpose` is named in errors."""

    def __init__(self, model: Model, interrupt: Interrupt, purpose: str) -> None:
        self.settings = EngineSettings()
        self.handle: Any = None
        self._model, self._lib, self._interrupt, self._purpose = model, model.lib, interrupt, purpose

    @property
    def memory_bytes(self) -> float:
        """Memory that `close` gives back, estimated."""
        return self._bytes() if self.handle else 0.0

    def open(self, settings: EngineSettings, *, piece: int, cells: int, **more: Any) -> None:
        """With room for pieces of so many tokens and for so many cells; `more` are further llama_context_params.

        Raises RequestError where the memory does not suffice.
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
        """Whether the shares were computed; they were not where the step was stopped.

        Raises RequestError where llama.cpp refuses them, DecodeFailed where the context is unusable.
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
        """Drop the slot's cells from `start` on, all of them if not given; False where only all can be."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, slot, start, -1))

    def _bytes(self) -> float:
        """A context as any other, and logits for every token, in llama.cpp's buffer and in its output."""
        return context_bytes(self._model, self.settings) + 2 * 4 * self.settings.ubatch * self._model.n_vocab
