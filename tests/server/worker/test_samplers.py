"""Sampling side by side, and from few logits, draws the tokens that each chain alone draws from all of them."""

from __future__ import annotations

import ctypes

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.wire.errors import RequestError
from llamaherd_server.wire.protocol import Generate, Sampling, WorkerConfig
from llamaherd_server.worker import samplers
from llamaherd_server.worker.best import ENTRY, Best
from llamaherd_server.worker.context import Context
from llamaherd_server.worker.intake import sequence_of
from llamaherd_server.worker.interrupt import Interrupt
from llamaherd_server.worker.lib import Log, load
from llamaherd_server.worker.logits import Candidates
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.sampling import NativeSampler
from llamaherd_server.worker.sequence import Sequence
from tests.random_models import RandomModel

PROMPT, NEW = "one two three one two three one two", 16
KINDS = {
    "defaults": Sampling(),
    "greedy": Sampling(temperature=0),
    "greedy, banned": Sampling(temperature=0, ignore_eos=True),
    "greedy, penalties": Sampling(temperature=0, repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
    "cool, from the best": Sampling(temperature=0, xtc_probability=0.5),
    "few": Sampling(top_k=1),
    "many": Sampling(top_k=250, top_p=1.0, min_p=0.0, temperature=2.0),
    "most": Sampling(top_k=300, temperature=1.5),
    "all": Sampling(top_k=0, min_p=0.0, temperature=1.5),
    "bias": Sampling(logit_bias={400: 4.5, 500: -3.0, 600: 8.0}, temperature=1.5),
    "banned": Sampling(ignore_eos=True, temperature=1.5),
    "penalties": Sampling(repeat_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.4, temperature=1.5),
    "penalties, raised": Sampling(repeat_penalty=0.5, repeat_last_n=5, temperature=1.5),
    "penalties, long": Sampling(repeat_penalty=1.2, repeat_last_n=300),
    "dry": Sampling(dry_multiplier=2.0, dry_allowed_length=1, temperature=1.5, dry_sequence_breakers=[]),
    "dry, long": Sampling(dry_multiplier=2.0, dry_penalty_last_n=500, dry_sequence_breakers=["one"]),
    "typical": Sampling(typical_p=0.5, temperature=1.5),
    "xtc": Sampling(xtc_probability=0.7, xtc_threshold=0.02, temperature=1.5),
    "mirostat 1": Sampling(mirostat=1),
    "mirostat 2": Sampling(mirostat=2),
}


@pytest.fixture(scope="module")
def alike() -> Model:
    """A model that most tokens are equally unlikely to, of which there are no multiple of 32."""
    lib = load()
    lib.llama_backend_init()
    path = str(RandomModel("dense", layers=1, width=64, vocab=50_001).path())
    return Model(lib, Log(lib), WorkerConfig(path=path, settings=EngineSettings()), lambda _: None)


def context_of(model: Model) -> Context:
    settings = EngineSettings(parallel=len(KINDS), ctx_per_slot=128, threads=1, batch=512, ubatch=512)
    return Context(model, settings, Interrupt(model.lib, model.log))


def sequences_of(model: Model, kinds: dict[str, Sampling]) -> list[Sequence]:
    made = []
    for slot, kind in enumerate(kinds.values()):
        sampling = msgspec.structs.replace(kind, seed=slot)
        made.append(sequence_of(model, Generate(id=slot, prompt=PROMPT, sampling=sampling)))
        made[-1].slot = slot
    return made


def decode(context: Context, sequences: list[Sequence]) -> None:
    assert context.decode([(sequence, sequence.pending) for sequence in sequences]) == 0


def rows_of(sequences: list[Sequence]) -> list[tuple[Sequence, int]]:
    """After a decode of all that was pending."""
    rows, row = [], -1
    for sequence in sequences:
        row += sequence.pending
        sequence.computed = len(sequence.tokens)
        rows.append((sequence, row))
    return rows


@pytest.mark.parametrize(
    ("which", "few", "together"),
    [("model", True, True), ("alike", True, True), ("alike", True, False), ("alike", False, True)],
)
def test_each_kind_of_chain_draws_the_same_tokens_as_alone(
    which: str, few: bool, together: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "MIN_SKIPPED_LOGITS", 0 if few else 10**9)
    monkeypatch.setattr(samplers, "MIN_PARALLEL_S", -1 if together else 10**9)
    model: Model = request.getfixturevalue(which)
    context, sequences = context_of(model), sequences_of(model, KINDS)
    alone = [NativeSampler(model, one.request.sampling, one.tokens) for one in sequences]
    for _ in range(NEW):
        decode(context, sequences)
        rows = rows_of(sequences)
        pairs = zip(alone, rows, strict=True)
        wanted = [model.lib.llama_sampler_sample(one._chain, context._handle, row) for one, (_, row) in pairs]
        drawn = context.sample(rows)
        assert dict(zip(KINDS, drawn, strict=True)) == dict(zip(KINDS, wanted, strict=True))
        for sequence, token in zip(sequences, drawn, strict=True):
            assert isinstance(token, int)
            sequence.append(token)
    assert len({tuple(one.tokens) for one in sequences}) > len(KINDS) // 2
    context.close()


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_all_there_again_whatever_the_chain_left_of_them(model: Model, kind: str) -> None:
    sampling = msgspec.structs.replace(KINDS[kind], seed=1)
    candidates, chain = Candidates(model), NativeSampler(model, sampling, [])
    for logits in np.random.default_rng(1).standard_normal((NEW, model.n_vocab), dtype=np.float32) * 3:
        candidates.load(logits)
        assert [candidates._array.data[token].id for token in (0, model.n_vocab - 1)] == [0, model.n_vocab - 1]
        chain.choose(candidates)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=0)])
def test_a_sampler_that_fails_fails_alone(model: Model, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "MIN_PARALLEL_S", -1)
    context, sequences = context_of(model), sequences_of(model, {str(number): sampling for number in range(6)})

    class Fails(NativeSampler):
        def sample(self, draw: samplers.Draw) -> int | None:
            raise RequestError("invalid_grammar", "grammar", "dead end")

    sequences[2].sampler = Fails(model, sampling, [])
    decode(context, sequences)
    drawn = context.sample(rows_of(sequences))
    assert [type(one) for one in drawn] == [int, int, RequestError, int, int, int]
    context.close()


def entries(logits: NDArray[np.float32], wanted: list[tuple[int, list[int]]]) -> list[dict[int, float] | None]:
    best = Best(logits.ctypes.data, logits.shape[1], wanted)
    found: list[dict[int, float] | None] = []
    for row in range(len(logits)):
        if (place := best.entries(row)) is None:
            found.append(None)
            continue
        memory = ctypes.string_at(place[0], place[1] * ENTRY.itemsize)
        found.append({int(one["id"]): float(one["logit"]) for one in np.frombuffer(memory, ENTRY)})
    return found


@pytest.mark.parametrize("n_vocab", [1300, 32_000, 50_257])
def test_the_best_are_the_highest_and_those_named(n_vocab: int) -> None:
    generator = np.random.default_rng(n_vocab)
    logits = generator.standard_normal((5, n_vocab), dtype=np.float32)
    counts = [1, 30, 7, 39, 20]
    named = [[3, 4], [], [n_vocab - 1], [0], [5]]
    for row, found in enumerate(entries(logits, [*zip(counts, named, strict=True)])):
        assert found is not None
        highest = np.argsort(logits[row])[-counts[row] :]
        assert {*map(int, highest), *named[row]} <= found.keys()
        assert all(logit == logits[row, token] for token, logit in found.items())
        assert list(found) == sorted(found)


def test_logits_that_are_alike_or_no_numbers_are_left_to_the_chain() -> None:
    logits = np.random.default_rng(1).standard_normal((4, 2000), dtype=np.float32)
    logits[1, [100, 1900]] = 9.0
    logits[2] = np.nan
    found = entries(logits, [(10, [])] * 4)
    assert [one is None for one in found] == [False, True, True, False]
