"""Limits on answers: the estimator against exact divergences, and a real server whose answers change, or do not."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from llamaherd_loadtest.limits import QualityLimit, divide_limits
from llamaherd_loadtest.quality.divergence import Difference, Incomparable, Row, difference, divergence, summarise
from llamaherd_loadtest.quality.suite import DEFAULT, Chat, load_checks, load_suite
from llamaherd_loadtest.quality.validity import is_valid
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.answers import Answers, KvAnswers, kv_types
from llamaherd_loadtest.tune.judge import judge_quality
from llamaherd_loadtest.tune.settings import Settings
from llamaherd_loadtest.tune.space import candidates, default_space
from llamaherd_loadtest.workload import Calibration
from llamaherd_server.worker.logits import log_softmax
from tests.server.conftest import Server, running
from tests.server.engine.tiny import SMOLLM2_WIDTH, write_lora

TOP = 16
LIMITS = divide_limits(["same_top=0.98", "kld=0.02"])[1]


def row(logits: np.ndarray, own: str | None = None) -> Row:
    logprobs = log_softmax(logits)
    best = np.argsort(logprobs)[::-1][:TOP]
    return Row({str(i): float(logprobs[i]) for i in best}, float(logprobs[best[-1]]), own)


def exact(p: np.ndarray, q: np.ndarray) -> float:
    p, q = log_softmax(p), log_softmax(q)
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0, 5.0])
def test_the_estimate_is_never_above_the_divergence_and_near_it_for_small_changes(noise: float) -> None:
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(50):
        p = rng.normal(size=2000) * 3
        q = p + rng.normal(size=2000) * noise
        estimate, true = divergence(row(p), row(q)), exact(p, q)
        assert -1e-4 <= estimate <= true + 1e-4
        ratios.append(estimate / true)
    assert np.mean(ratios) > (0.4 if noise < 5 else 0.2)  # far flatter distributions than a language model's


def test_equal_distributions_do_not_diverge_and_disjoint_lists_do_by_far() -> None:
    p = np.zeros(1000)
    p[:16] = 8.0
    assert divergence(row(p), row(p)) == pytest.approx(0, abs=1e-6)
    assert divergence(row(p), row(p[::-1])) > 3


def test_other_tokens_of_the_same_answer_cannot_be_compared() -> None:
    rows = [row(np.arange(20.0), own) for own in ("Pa", "ris", None)]
    with pytest.raises(Incomparable, match="where one has the token 'Pa', the other has 'Paris'"):
        difference(rows, [row(np.arange(20.0), own) for own in ("Paris", None)])


def judged(differences: Sequence[Difference], limits: Sequence[QualityLimit] = LIMITS) -> tuple[Judgement, str]:
    return judge_quality(summarise(differences), limits)


def test_a_limit_is_kept_missed_or_unresolved() -> None:
    good, poor = Difference(32, 0.01, 32), Difference(32, 1.6, 29)
    assert judged([good] * 24) == (Judgement.PASSES, "")
    assert judged([good] * 4) == (Judgement.UNRESOLVED, "number of answers (8 needed)")
    assert judged([Difference(4, 0.0, 4)] * 9) == (Judgement.UNRESOLVED, "same_top")  # 36 positions do not tell
    assert judged([good] * 4 + [poor] * 20) == (Judgement.MISSES, "same_top")
    assert judged([good, poor] * 12, LIMITS[1:]) == (Judgement.UNRESOLVED, "kld")


def test_what_lies_on_a_limit_passes_and_misses_as_seldom_as_is_said() -> None:
    rng = random.Random(2)
    passed = missed = 0
    for _ in range(400):
        drawn = [Difference(32, 32 * 0.02 * rng.lognormvariate(-0.125, 0.5), 32) for _ in range(24)]
        judgement, _ = judged(drawn, LIMITS[1:])
        passed += judgement is Judgement.PASSES
        missed += judgement is Judgement.MISSES
    assert passed < 48  # 5 %, and what the skew of 24 answers adds
    assert missed < 24


def test_kv_types_are_searched_with_a_limit_alone_and_only_those_that_keep_it() -> None:
    current: Settings = {"parallel": 4, "kv_type_k": "f16", "kv_type_v": "f16"}
    assert "kv_type_k" not in default_space(current)
    space = candidates(current, default_space(current, quality=True), mixed=False)
    assert {kv_types(one) for one in space} == {("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0")}
    quality = summarise([Difference(32, 0.01, 32)] * 24)
    answers = Answers(
        [
            KvAnswers(("q8_0", "q8_0"), quality, Judgement.PASSES, ""),
            KvAnswers(("q4_0", "q4_0"), quality, Judgement.UNRESOLVED, "kld"),
        ]
    )
    assert {kv_types(one) for one in space if answers.permit(one)} == {("f16", "f16"), ("q8_0", "q8_0")}


CALL = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
ADD = Chat(
    [],
    [{"function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}, "c": {}}, "required": ["a", "b"]}}}],
)


@pytest.mark.parametrize(
    ("check", "message", "valid"),
    [
        (ADD, {"tool_calls": [{"function": CALL}]}, True),
        (ADD, {"tool_calls": [{"function": CALL}, {"function": CALL | {"name": "sum"}}]}, False),
        (ADD, {"tool_calls": [{"function": CALL | {"arguments": '{"a": 1}'}}]}, False),
        (ADD, {"tool_calls": [{"function": CALL | {"arguments": '{"a": 1, "b": 2, "d": 3}'}}]}, False),
        (ADD, {"tool_calls": [{"function": CALL | {"arguments": '{"a": 1, "b'}}]}, False),
        (ADD, {"content": CALL["arguments"]}, False),
        (Chat([]), {"content": ' [1, "a"]\n'}, True),
        (Chat([]), {"content": '```json\n{"a": 1}\n```'}, True),
        (Chat([]), {"content": 'Here it is: {"a": 1}'}, False),
        (Chat([]), {"content": None}, False),
    ],
)
def test_an_answer_has_the_form_that_it_was_asked_for(check: Chat, message: dict[str, Any], valid: bool) -> None:
    assert is_valid(check, message) == valid


@pytest.mark.parametrize("text", ["valid=0", "valid=1.5", "same_top=98", "same_top=1", "kld=2s", "kld=", "same_top=0"])
def test_limits_that_make_no_sense_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"invalid limit .*: write for example same_top"):
        divide_limits(["ttft_p95=2s", text])


def test_suites_are_read_by_name_file_and_workload(tmp_path: Path) -> None:
    words = Calibration(1.3, 20)
    bundled = [*load_suite(DEFAULT, words)]
    assert len(bundled) > 20
    assert any(one.tools for one in bundled)
    own = tmp_path / "own.yml"
    own.write_text("prompts: [Who are you?]")
    assert [one.messages for one in load_suite(str(own), words)] == [[{"role": "user", "content": "Who are you?"}]]
    own.write_text("{name: short, description: short, prompt: {median: 40}, output: {median: 8}}")
    assert len({str(one.messages) for one in load_suite(str(own), words)}) == 24
    for bad, message in (("nowhere", "available: default"), (str(tmp_path / "no.yml"), "cannot be read")):
        with pytest.raises(ValueError, match=message):
            [*load_suite(bad, words)]
    own.write_text("prompts: [{message: x}]")
    with pytest.raises(ValueError, match=r"suite .*own.yml: "):
        [*load_suite(str(own), words)]


def quality(url: str, reference: Path, *more: str) -> subprocess.CompletedProcess[str]:
    suite = reference.with_name("suite.yml")
    suite.write_text(json.dumps({"prompts": [one.messages[-1]["content"] for one in load_suite(DEFAULT, WORDS)][::3]}))
    command = ["--url", url, "--model", "smollm2", "--suite", str(suite), "--reference", str(reference), *more]
    argv = [sys.executable, "-m", "llamaherd_loadtest.quality", *command]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


WORDS = Calibration(1.3, 20)
KLD = ("--limit", "kld=0.01")


def test_harmful_changes_are_stopped_and_harmless_ones_are_not(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a.gguf", "blk.0.attn_q.weight", SMOLLM2_WIDTH, SMOLLM2_WIDTH)
    reference = tmp_path / "reference.json"
    lora = [{"path": str(adapter), "scale": 5.0}]
    model = {"lora": lora}
    with running(tmp_path, model=model) as server:
        assert quality(server.url, reference).returncode == 0
        assert reference.stat().st_mode & 0o77 == 0
        before = httpx.get(f"{server.url}/admin/engine").json()["settings"]
        changes = {
            "as it is": {},
            "harmless": {"parallel": 1, "batch": 128, "ubatch": 64, "threads_batch": 2, "kv_unified": False},
            "kv q4_0": {"kv_type_k": "q4_0", "kv_type_v": "q4_0"},
        }
        done = {}
        for name, change in changes.items():
            httpx.put(f"{server.url}/admin/engine", json=before | change, timeout=60).raise_for_status()
            done[name] = quality(server.url, reference, *KLD)
    template = tmp_path / "wrong.jinja"
    template.write_text("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}### assistant:\n")
    for name, other in {"lost lora": {}, "wrong template": {"lora": lora, "chat_template": str(template)}}.items():
        with running(tmp_path, model=other) as server:
            done[name] = quality(server.url, reference, *KLD)
    output = {name: one.stdout + one.stderr for name, one in done.items()}
    assert [name for name, one in done.items() if one.returncode == 0] == ["as it is", "harmless"], output
    assert [one.returncode for one in done.values()] == [0, 0, 3, 3, 3], output
    assert "same top token" in output["harmless"]
    assert "limit kld=0.01 misses: KL divergence" in output["lost lora"]
    assert math.isfinite(float(output["lost lora"].split("KL divergence ")[1].split()[0]))


@pytest.mark.parametrize("kind", ["embedded", "llama-server"])
def test_answers_that_lose_their_form_are_stopped(tmp_path: Path, kind: str) -> None:
    reference, suite, template = (tmp_path / name for name in ("reference.json", "suite.yml", "wrong.jinja"))
    checks = ['Repeat this JSON and write nothing else: {"id": 7, "tags": ["a", "b"], "ok": true}', "Sing a song."]
    suite.write_text(json.dumps({"checks": checks}))
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")

    def done(server: Server) -> tuple[int, str]:
        command = ["--url", server.url, "--model", "smollm2", "--suite", str(suite), "--reference", str(reference)]
        argv = [sys.executable, "-m", "llamaherd_loadtest.quality", *command, "--limit", "valid=0.9"]
        ran = subprocess.run(argv, check=False, capture_output=True, text=True)
        return ran.returncode, ran.stdout + ran.stderr

    with running(tmp_path, engine={"kind": kind}) as server:
        assert done(server) == (0, "")
        assert done(server) == (0, "1 of the 1 tool calls and JSON answers that were valid still are\n")
    with running(tmp_path, model={"chat_template": str(template)}, engine={"kind": kind}) as server:
        code, said = done(server)
    assert (code, said.partition(":")[0]) == (3, "limit valid=0.9 misses")


def test_a_suite_without_checks_is_named() -> None:
    assert len(load_checks(DEFAULT)) > 10
    for name in ("chat", "nowhere.yml"):
        with pytest.raises(ValueError, match=rf"{name} (has none|cannot be read)|and {name} has none"):
            load_checks(name)
