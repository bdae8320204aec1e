"""The tuner's pure parts: the space, the journal, the sentence."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from llamaherd_loadtest.limits import parse_limit
from llamaherd_loadtest.quantiles import Judgement, unbiased_quantile
from llamaherd_loadtest.tune.decide import Candidate, Choice, choose
from llamaherd_loadtest.tune.estimates import Estimates
from llamaherd_loadtest.tune.evidence import Drift, Measurement, Noise, Record, judge_over, score_noise
from llamaherd_loadtest.tune.journal import Journal, ReplayBench, read_steps
from llamaherd_loadtest.tune.judge import judge_alone
from llamaherd_loadtest.tune.model import Model
from llamaherd_loadtest.tune.objective import TOKENS
from llamaherd_loadtest.tune.physics import Shape
from llamaherd_loadtest.tune.posterior import Array
from llamaherd_loadtest.tune.search import Step
from llamaherd_loadtest.tune.settings import difference, label
from llamaherd_loadtest.tune.space import candidates, needs_as_much, parse_space, prune

from .simulated import CURRENT, LIMITS, SimulatedServer, search
from .simulated_hosts import CURRENT as HOST_CURRENT
from .simulated_hosts import OUTPUT, PROMPT, Host


def step(number: int) -> Step:
    return Step(number, "screen", CURRENT, Measurement(took_s=1.0, score=float(number)), 10.0)


def test_candidates_hold_the_current_and_the_default_first_and_each_once() -> None:
    mine = {**CURRENT, "parallel": 3}
    found = candidates(mine, parse_space(["parallel=2,3,4", "kv_unified=true,false"], mine))
    assert found[:2] == [mine, CURRENT]
    assert len(found) == 6
    assert {s["parallel"] for s in found} == {2, 3, 4}
    assert parse_space(["flash_attention=on,auto"], {"flash_attention": "auto"}) == {"flash_attention": ["on", "auto"]}


def test_slots_smaller_than_the_workload_are_never_launched() -> None:
    small, twisted = {**CURRENT, "ctx_per_slot": 256}, {**CURRENT, "ubatch": 4096}
    launch, pruned = prune([CURRENT, small, twisted], need=500)
    assert launch == [CURRENT]
    assert [p.why for p in pruned] == [
        "a slot of 256 tokens is smaller than the workload's 500 at p99",
        "ubatch 4096 is larger than batch 2048",
    ]


def test_knobs_that_change_answers_are_opened_on_purpose() -> None:
    current = {**CURRENT, "kv_type_k": "f16"}
    with pytest.raises(ValueError, match=r"kv_type_k changes what the model answers.*--quality"):
        parse_space(["kv_type_k=q8_0"], current)
    assert parse_space(["kv_type_k=q8_0"], current, quality=True) == {"kv_type_k": ["q8_0"]}


def test_what_needs_no_less_memory_is_known_without_the_model() -> None:
    f16 = {**CURRENT, "kv_type_k": "f16", "kv_type_v": "f16"}
    assert needs_as_much({**f16, "parallel": 8}, f16) and needs_as_much(f16, f16)
    assert not needs_as_much(f16, {**f16, "parallel": 8})
    assert not needs_as_much({**f16, "parallel": 8, "ubatch": 256}, f16)
    assert not needs_as_much({**f16, "parallel": 6, "kv_type_k": "q8_0"}, f16)
    assert needs_as_much({**f16, "parallel": 8, "kv_type_k": "q8_0"}, f16)
    embedded, other = {**f16, "engine": "embedded"}, {**f16, "engine": "llama-server"}
    assert not needs_as_much(other, embedded) and needs_as_much(other, other)
    assert not needs_as_much({**f16, "kv_unified": False}, f16) and needs_as_much(f16, {**f16, "kv_unified": False})


def test_settings_read_well() -> None:
    assert label(CURRENT, ("kv_unified",)) == "parallel 4, batch 2048, ubatch 512, kv_unified on"
    assert label({**CURRENT, "engine": "llama-server"}, ("engine",)).endswith(", engine llama-server")
    assert difference(CURRENT, {**CURRENT, "parallel": 8, "kv_unified": False}) == "parallel 4 → 8, kv_unified on → off"


def test_what_is_in_doubt_is_measured_next() -> None:
    """Of the two fastest, alike, it is not known whether they keep the limit; the third is slower and keeps it."""
    rows, mean = np.arange(4), np.array([[1.0, 0.99, 0.7, 0.6], [-0.05, -0.05, -0.5, -0.5]])
    sd = np.array([[0.001] * 4, [0.1, 0.1, 0.001, 0.001]])

    def draws(rng: np.random.Generator, count: int, places: Array) -> Array:
        return mean[:, None, places] + sd[:, None, places] * rng.standard_normal((2, count, len(places)))

    estimates = Estimates(
        rows, mean, sd, sd[0], draws, limits=LIMITS[:1], measured=rows, drift=0.0, middle=0.5, noise=0.1
    )
    rng, everything, others = np.random.default_rng(1), np.ones(4, bool), np.array([False, False, True, True])
    assert estimates.best(2, others) == [2, 3]
    assert [estimates.best(1, everything, doubt) for doubt in (0.1, 1.0)] == [[0], [2]]
    assert {estimates.next(everything, rng) for _ in range(9)} <= {0, 1}, "what is in doubt is measured"
    assert estimates.next(~everything, rng) is None


def test_how_latencies_spread_is_learned_from_all_settings() -> None:
    """Of few requests each, limited quantiles are nearer to the truth than where each is taken by itself."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(8):
        host = Host(seed)
        space = [{**HOST_CURRENT, "parallel": slots} for slots in (1, 2, 4, 6)]
        models = {single: Model(space, host.limits, TOKENS, Shape(PROMPT, OUTPUT)) for single in errors}
        for row, settings in enumerate(space):
            for _ in range(3):
                window = host.measure(settings, 3 * host.request_s(settings), 0)
                models[True].add(row, window, 0.5)
                models[False].add(row, replace(window, ttft_ms=[], tpot_ms=[]), 0.5)
        for single, model in models.items():
            estimates = model.estimates(np.arange(len(space)))
            for row, settings in enumerate(space):
                for limit, mean, _ in estimates.excess(row):
                    errors[single].append(mean - math.log(host.truth(settings)[1][limit.name] / limit.ms))
    pooled, alone = (sum(error**2 for error in found) for found in errors.values())
    assert pooled < 0.9 * alone


def test_a_drifting_host_is_estimated_as_it_was_in_the_middle() -> None:
    """Most windows are early, where it was still fast."""
    model = Model([CURRENT, {**CURRENT, "parallel": 8}], LIMITS, TOKENS, Shape())
    for window, at in enumerate([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.9, 1.0]):
        slower = math.exp(0.2 * at)
        observed = {limit.name: 0.5 * slower * limit.ms for limit in LIMITS}
        model.add(window % 2, Measurement(took_s=1.0, score=100 / slower, observed=observed, requests=50), at)
    estimates = model.estimates(np.arange(2))
    assert estimates.drift == pytest.approx(-0.2, abs=0.03)
    assert estimates.score(0) == pytest.approx(100 * math.exp(-0.1), rel=0.01)
    assert estimates.excess(1)[0][1] == pytest.approx(math.log(0.5) + 0.1, abs=0.01)


def test_confirming_windows_alone_count_once_there_are_any() -> None:
    lucky, sober = (Measurement(took_s=1.0, score=speed) for speed in (200.0, 100.0))
    record = Record(CURRENT, screening=[lucky])
    assert record.windows == [lucky]
    record.confirming.append(sober)
    assert record.windows == [sober]


def test_a_journal_resumes_an_unfinished_search_of_the_same_kind_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path, "this host", 1, CURRENT)
    first.record(step(1))
    with path.open("ab") as file:
        file.write(b'{"type":"step","st')  # the crash
    again = Journal(path, "this host", 2, CURRENT)
    assert (again.seed, again.resumed) == (1, [step(1)])
    assert Journal(tmp_path / "other.jsonl", "this host", 2, CURRENT).resumed == []
    again.record(step(1))
    again.close()
    assert read_steps(path) == [step(1)]
    assert Journal(path, "this host", 3, CURRENT).resumed == []
    assert Journal(path, "another build", 4, CURRENT).seed == 4


def test_settings_that_a_killed_search_left_in_force_are_not_taken_for_the_current_ones(tmp_path: Path) -> None:
    path, tried, deployed = tmp_path / "journal.jsonl", {**CURRENT, "parallel": 8}, {**CURRENT, "parallel": 6}
    killed = Journal(path, "this host", 1, CURRENT)
    killed.record(step(1))
    killed.trying(tried)
    again = Journal(path, "this host", 2, tried)
    assert (again.seed, again.current, again.resumed) == (1, CURRENT, [step(1)])
    assert Journal(path, "this host", 2, deployed).current == deployed, "what an operator has changed since stays"


def test_a_resumed_search_ends_as_if_it_had_not_been_interrupted() -> None:
    steps: list[Step] = []
    whole = search(SimulatedServer(5), CURRENT, budget_s=600, seed=5)
    whole.on_step = steps.append
    choice = whole.run()
    server = SimulatedServer(5)
    for done in steps[:10]:  # what the interrupted search drew from the noise
        server.measure(done.settings, 1.0, 0)
    resumed = search(server, CURRENT, budget_s=600, seed=5, bench=ReplayBench(server, steps[:10]))
    assert resumed.run() == choice


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Journal(tmp_path / "nowhere" / "journal.jsonl", "this host", 1, CURRENT)


def test_a_limit_is_judged_by_the_requests_of_all_windows() -> None:
    """A tenth of the requests above a p95 limit, in windows too small for a p95 each."""
    windows = [Measurement(took_s=1.0, requests=8, over={"ttft_p95": (over, 8)}) for over in (1, 0, 1, 2, 0, 1)]
    judged = [judge_over(windows[:count], LIMITS[0]) for count in (2, 6)] + [judge_over(windows * 4, LIMITS[0])]
    assert judged == [Judgement.UNRESOLVED, Judgement.UNRESOLVED, Judgement.MISSES]
    assert judge_over([Measurement(took_s=1.0, requests=80, over={"ttft_p95": (3, 80)})], LIMITS[0]) is Judgement.PASSES
    assert judge_alone(Record(CURRENT, screening=windows * 4), LIMITS) is Judgement.MISSES


def test_a_host_that_slows_down_is_held_against_the_limit_without_that() -> None:
    """Measured at its end, 10 % slower than on average: p95 is at 1.05 times the limit then, at 0.95 without."""
    rng = random.Random(1)
    late = [LIMITS[0].ms * 1.05 * math.exp(rng.gauss(-1.645 * 0.2, 0.2)) for _ in range(2000)]
    over = sum(value > LIMITS[0].ms for value in late)
    window = Measurement(took_s=1.0, requests=2000, at=1.0, ttft_ms=late, over={"ttft_p95": (over, 2000)})
    assert judge_over([window], LIMITS[0]) is Judgement.MISSES
    assert judge_over([window], LIMITS[0], Drift(-0.2, 0.5)) is Judgement.PASSES
    waiting = replace(window, over={"ttft_p95": (over + 200, 2200)})
    assert judge_over([waiting], LIMITS[0], Drift(-0.2, 0.5)) is Judgement.MISSES, "some have not been answered at all"


def test_current_settings_that_surely_miss_a_limit_go_without_a_gain() -> None:
    def choice(risk: float) -> Choice:
        current = Candidate(Record(CURRENT), Judgement.MISSES, risk=risk)
        slower = Candidate(Record({**CURRENT, "ubatch": 128}), Judgement.PASSES, gain=-0.1, sd=0.02)
        return choose(current, [slower], Noise(0.03, 10))

    assert [choice(risk).change for risk in (0.999, 0.96)] == [True, False]


def test_noise_is_the_prior_at_first_and_the_hosts_own_soon() -> None:
    def noise(windows: int) -> float:
        quiet = [Measurement(took_s=1.0, score=100.0 + i % 2) for i in range(windows)]
        return score_noise([Record(CURRENT, screening=quiet)]).sigma

    assert noise(1) == pytest.approx(0.1)
    assert noise(6) < 0.04
    assert noise(12) < 0.02


def test_settings_that_miss_a_limit_by_a_tenth_do_not_pass_in_small_windows() -> None:
    """Of 8 requests a window the mean p95 reads 0.85 of the truth: 45 % of such settings passed."""
    rng, limit = random.Random(1), parse_limit("ttft_p95=1s")

    def passes(truth_ms: float) -> float:
        passed = 0
        for _ in range(100):
            record = Record(CURRENT)
            for _ in range(6):
                values = sorted(truth_ms * math.exp(rng.gauss(-1.645 * 0.3, 0.3)) for _ in range(8))
                record.confirming.append(
                    Measurement(
                        took_s=1.0,
                        score=100.0 * math.exp(rng.gauss(0, 0.05)),
                        requests=8,
                        observed={limit.name: unbiased_quantile(values, 0.95)},
                        over={limit.name: (sum(value > limit.ms for value in values), 8)},
                    )
                )
            passed += judge_alone(record, [limit]) is Judgement.PASSES
        return passed / 100

    assert passes(1100) < 0.05
    assert passes(750) >= 0.9
