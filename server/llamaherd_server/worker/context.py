"""A llama_context over loaded weights, used by the scheduler until a reconfiguration builds another one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import asdict

from llamaherd_server.gguf import drafted, rollback
from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import DecodeFailed
from llamaherd_server.wire.protocol import TokenLogprob
from llamaherd_server.worker.backend import DONE, Part
from llamaherd_server.worker.batch import Batch
from llamaherd_server.worker.draft_context import DraftContext
from llamaherd_server.worker.draft_model import DraftModel
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.memory import DoesNotFit, check_fits, context_bytes, total_cells
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.samplers import Samplers, outcome
from llamaherd_server.worker.sequence import Drawn, Row, Sequence, Share
from llamaherd_server.worker.weights import ModelError

if TYPE_CHECKING:
    from llamaherd_server.worker.mtp_context import MtpContext

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}  # ggml_type
FLASH = {"auto": -1, "off": 0, "on": 1}
# With split KV, sharing a prefix copies all cells of the source slot, which is not worth it for a few tokens.
MIN_COPIED_TOKENS = 64
WHOLE, PARTIAL = 0, 1  # llama_state_seq_flags
MAX_SEQUENCES = 256


class Context:
    """Implements backend.Backend. Raises DoesNotFit if these settings need more memory than is available."""

    def __init__(self, model: Model, settings: EngineSettings, interrupt: Interrupt) -> None:
        self._model = model
        self._interrupt = interrupt
        self._lib = lib = model.lib
        self.settings = settings = resolve_threads(settings)
        check_fits(model, settings)
        self.size = total_cells(settings)
        slots = settings.parallel
        # `chains` needs a spare sequence: parts of a slot are saved from it, and loaded into it before they are copied.
        self.chains = settings.kv_unified and not model.window and slots < MAX_SEQUENCES
        self._spare = slots
        sequences = slots + self.chains
        self.most_drafted = drafted(asdict(settings))
        depth = settings.speculative_depth if self.most_drafted else 0
        kept = rollback(asdict(settings)) if model.recurrent else 0
        outputs = sequences + self.most_drafted
        self._handle = new_context(model, settings, n_seq_max=sequences, n_outputs_max=outputs, n_rs_seq=kept)
        # of a recurrent state 0, unless llama.cpp can roll back its architecture
        self.draft_depth = int(lib.llama_n_rs_seq(self._handle)) if model.recurrent else depth
        self._rolled_back: set[int] = set()  # slots whose rollback takes effect in their next step
        self.stops = not model.recurrent
        if self.stops:  # aborting a step would corrupt a recurrent state
            interrupt.watch(self._handle)
        self._memory = lib.llama_get_memory(self._handle)
        self.generates = bool(self._memory)  # an embedding-only encoder has no KV cache
        self._batch = Batch(lib, settings.batch)
        slides = self._memory and self._state_size(0, WHOLE) > self._state_size(0, PARTIAL)
        self._window = model.window if slides else 0
        self.cuts = not (model.recurrent or self._window)
        if self._window and not settings.kv_unified:  # a draft in several ubatches would overwrite cells of the window
            self.draft_depth = 0
        self._samplers = Samplers(model, self._handle, slots)
        self.least_shared = 1 if settings.kv_unified else MIN_COPIED_TOKENS
        self.drafts: DraftContext | MtpContext | None = None
        self._mtp: MtpContext | None = None
        try:
            self._open_drafts()
        except DoesNotFit:
            self.close()
            raise

    def _open_drafts(self) -> None:
        settings, model, slots = self.settings, self._model, self.settings.parallel
        if settings.speculative == "draft" and model.draft and self.draft_depth:
            # `swa_full` keeps all cells, so that rejected drafts can be cut off
            own = new_context(model.draft, settings, n_seq_max=slots, n_outputs_max=slots, swa_full=True)
            self.drafts = DraftContext(model.draft, own, settings, model)
        if settings.speculative == "mtp" and self.draft_depth:
            if not model.mtp:
                raise DoesNotFit("speculative mtp needs the model's MTP heads, which only a start with mtp loads")
            from llamaherd_server.worker.mtp_context import MtpContext  # noqa: PLC0415 (numpy, 25 MiB)

            kind = self._lib.LLAMA_CONTEXT_TYPE_MTP
            own = new_context(model, settings, n_seq_max=slots, n_outputs_max=slots, swa_full=True, ctx_type=kind)
            self.drafts = self._mtp = MtpContext(model, own, self._handle, settings, self.draft_depth)

    def close(self) -> None:
        if self.drafts:
            self.drafts.close()
        self._samplers.close()
        self._lib.llama_free(self._handle)

    @property
    def memory_bytes(self) -> float:
        """Estimated memory that closing this context releases."""
        return context_bytes(self._model, self.settings)

    def warm_up(self) -> None:
        """Compute one token to prove that the model works; raises ModelError if it does not."""
        self._batch.fill_rows([(0, 0, 0)])
        if self._lib.llama_decode(self._handle, self._batch.native) != 0:
            raise ModelError("the model loads but cannot compute a token")
        self.forget(0)

    def decode(self, shares: list[Share]) -> int:
        self._batch.fill(shares)
        self._rolled_back.difference_update(sequence.slot for sequence, _ in shares)
        longest, count = max(shares, key=lambda share: share[1])
        preemptible = sum(count for one, count in shares if one.request.preemptible and count > 1)
        self._interrupt.preemptible = 2 * preemptible > self._batch.native.n_tokens
        self._interrupt.mostly_for = longest.request.id if 2 * count > self._batch.native.n_tokens else None
        result = int(self._lib.llama_decode(self._handle, self._batch.native))
        if self._mtp and result == DONE:
            self._mtp.follow(shares)
        return result

    def held(self, slot: int) -> int:
        return int(self._lib.llama_memory_seq_pos_max(self._memory, slot)) + 1

    def sample(self, rows: list[Row]) -> list[Drawn]:
        return self._samplers.sample(rows)

    def late(self, sequence: Sequence, wait_s: float) -> Drawn:
        return outcome(sequence.sampler.late, wait_s)

    def logprob(self, sequence: Sequence, row: int | None, token: int, top: int) -> TokenLogprob:
        from llamaherd_server.worker import logits  # noqa: PLC0415 (numpy, 25 MiB that few need)

        values = sequence.sampler.logits if row is None else logits.row_of(self._model, self._handle, row)
        return logits.token_logprob(self._model, values, token, top)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._model.piece(token, special=special)

    def is_eog(self, token: int) -> bool:
        return token in self._model.eog_tokens

    def forget(self, slot: int, start: int = 0) -> None:
        self._truncate(slot, start)

    def reject(self, slot: int, length: int) -> None:
        if not self._truncate(slot, length):
            raise DecodeFailed(f"llama.cpp cannot drop a rejected draft after position {length}")
        if self._model.recurrent:
            self._rolled_back.add(slot)

    def share(self, source: int, target: int, length: int) -> None:
        self._settle(source)
        if self.settings.kv_unified:
            self._lib.llama_memory_seq_cp(self._memory, source, target, 0, length)
            if self._mtp:
                self._mtp.share(source, target, length)
        elif self._window:  # seq_cp takes effect in the next step, and would overwrite a checkpoint loaded before
            self.restore(target, self.save(source))
            self.forget(target, length)
        else:  # llama.cpp copies only whole sequences here: drop the excess
            self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            self.forget(target, length)

    def save(self, slot: int) -> bytes:
        return self._save_state(slot, WHOLE)

    def restore(self, slot: int, state: bytes) -> bool:
        return self._load_state(slot, state, WHOLE) or self._discard(slot)

    def save_part(self, slot: int, start: int, buffer: Callable[[int], Any]) -> int:
        if not start:
            return self._write(slot, WHOLE, buffer)
        self._settle(slot)
        self._lib.llama_memory_seq_cp(self._memory, slot, self._spare, start, -1)
        try:
            return self._write(self._spare, WHOLE, buffer)
        finally:
            self.forget(self._spare)

    def load_parts(self, slot: int, parts: list[Part], back: bytes | None) -> bool:
        start = 0
        for state, size, end in parts:
            target = self._spare if self.chains else slot
            if not self._lib.llama_state_seq_set_data_ext(self._handle, state, size, target, WHOLE):
                self.forget(target)
                return self._discard(slot)
            if self.chains:
                self._lib.llama_memory_seq_cp(self._memory, self._spare, slot, start, end)
                self.forget(self._spare)
            start = end
        return self.rewind(slot, start, back) if back else self._truncate(slot, start)

    def checkpoint(self, slot: int) -> bytes:
        return self._save_state(slot, PARTIAL)

    def rewind(self, slot: int, length: int, state: bytes) -> bool:
        return (self._load_state(slot, state, PARTIAL) and self._truncate(slot, length)) or self._discard(slot)

    def keeps(self, slot: int, length: int) -> bool:
        if self.cuts:
            return True
        if self._model.recurrent:
            return self.held(slot) == length
        oldest = int(self._lib.llama_memory_seq_pos_min(self._memory, slot))
        return oldest <= max(0, length - self._window)

    def _settle(self, slot: int) -> None:
        """Make a recurrent state that was rolled back the slot's own: llama.cpp copies the one before, until a step."""
        if slot in self._rolled_back:
            self._rolled_back.remove(slot)
            self._load_state(slot, self.checkpoint(slot), PARTIAL)

    def _truncate(self, slot: int, length: int) -> bool:
        if self._mtp:
            self._mtp.cut(slot, length)
        return bool(self._lib.llama_memory_seq_rm(self._memory, slot, length, -1))

    def _discard(self, slot: int) -> bool:
        self.forget(slot)
        return False

    def _save_state(self, slot: int, flags: int) -> bytes:
        buffers = []

        def buffer(size: int) -> Any:
            buffers.append((ctypes.c_uint8 * size)())
            return buffers[0]

        written = self._write(slot, flags, buffer)
        return bytes(memoryview(buffers[0])[:written])

    def _write(self, slot: int, flags: int, buffer: Callable[[int], Any]) -> int:
        size = self._state_size(slot, flags)
        state = buffer(size)
        if state is None:
            return 0
        return int(self._lib.llama_state_seq_get_data_ext(self._handle, state, size, slot, flags))

    def _state_size(self, slot: int, flags: int) -> int:
        return int(self._lib.llama_state_seq_get_size_ext(self._handle, slot, flags))

    def _load_state(self, slot: int, state: bytes, flags: int) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return bool(self._lib.llama_state_seq_set_data_ext(self._handle, data, len(state), slot, flags))


def new_context(model: Model | DraftModel, settings: EngineSettings, **more: Any) -> Any:
    """Create a llama_context; `more` sets further fields of llama_context_params. Raises DoesNotFit."""
    params = model.lib.llama_context_default_params()
    fields = {
        "n_ctx": total_cells(settings),
        "n_batch": settings.batch,
        "n_ubatch": settings.ubatch,
        "n_threads": settings.threads,
        "n_threads_batch": settings.threads_batch,
        "flash_attn_type": FLASH[settings.flash_attention],
        "type_k": KV_TYPES[settings.kv_type_k],
        "type_v": KV_TYPES[settings.kv_type_v],
        "kv_unified": settings.kv_unified,
        "swa_full": False,
        "no_perf": True,
        **more,
    }
    for name, value in fields.items():
        setattr(params, name, value)
    context = model.lib.llama_init_from_model(model.handle, params)
    if not context:
        raise DoesNotFit(f"llama.cpp cannot build this context: {model.log.last_error}")
    model.adapt(context)
    return context


def resolve_threads(settings: EngineSettings) -> EngineSettings:
    """Replace a thread count of 0 by the number of CPUs this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.threads or cores
    return msgspec.structs.replace(settings, threads=threads, threads_batch=settings.threads_batch or threads)
