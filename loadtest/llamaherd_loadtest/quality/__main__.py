"""Checks whether a model still answers as before: `python -m llamaherd_loadtest.quality --reference FILE …`.

If FILE does not exist, it is created with answers to a suite's prompts and the probabilities that the model assigns to
them. If it exists, the model is compared with it; the exit status is 0 if all limits are kept, 3 if not, and 2 if the
two cannot be compared.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from llamaherd_loadtest.files import write_whole
from llamaherd_loadtest.limits import QualityLimit, divide_limits
from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.quality.asking import Model, Written
from llamaherd_loadtest.quality.divergence import Incomparable, Row, compared
from llamaherd_loadtest.quality.suite import DEFAULT, Chat, load_checks, load_suite
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.judge import judge_quality
from llamaherd_loadtest.workload import Calibration

_WORDS = Calibration(per_word=1.3, overhead=20)  # roughly English: a suite's lengths need no more precision


class Reference(Struct, frozen=True):
    """A model's answers, the probabilities it assigned to them, and the checks it passed."""

    written: list[Written]
    rows: list[list[Row]]
    passed: list[Chat] = []


def record(model: Model, suite: str, limits: Sequence[QualityLimit]) -> Reference:
    """Record what is needed to check `limits` later. Raises ServerUnusable and ValueError."""
    shares, answers = _divided(limits)
    passed = [check for check in load_checks(suite) if model.passes(check)] if shares else []
    chats = [*load_suite(suite, _WORDS)] if answers or not shares else []
    written = [model.write(chat, seed) for seed, chat in enumerate(chats, 1)]
    return Reference(written, model.evaluate(written), passed)


def compare(reference: Reference, model: Model, limits: Sequence[QualityLimit]) -> tuple[bool, str]:
    """Return whether the model keeps the limits, and a sentence. Raises Incomparable and ServerUnusable."""
    shares, answers = _divided(limits)
    sentences = []
    for limit in shares:
        kept, of = sum(map(model.passes, reference.passed)), len(reference.passed)
        still = f"{kept} of the {of} tool calls and JSON answers that were valid still are"
        sentences.append(still if of else "no tool call or JSON answer was valid before")
        if kept < limit.value * of:  # greedy answers to the same questions are not a sample: the share is exact
            return False, f"limit valid={limit.value:g} misses: {sentences[0]}"
    if answers:
        quality = compared(reference.rows, model.evaluate(reference.written))
        judgement, name = judge_quality(quality, answers)
        if judgement is not Judgement.PASSES:
            named = next((f"limit {one.name}={one.value:g}" for one in answers if one.name == name), name)
            return False, f"{named} {judgement}: {quality}"
        sentences.insert(0, str(quality))
    return True, "; ".join(sentences)


def _divided(limits: Sequence[QualityLimit]) -> tuple[list[QualityLimit], list[QualityLimit]]:
    """Split limits into those of checks and those of distributions."""
    return [one for one in limits if one.name == "valid"], [one for one in limits if one.name != "valid"]


def main() -> int:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m llamaherd_loadtest.quality", description=__doc__)
    add = parser.add_argument
    add("--url", required=True, help="URL that serves the /admin routes")
    add("--ca", type=Path, help="certificate of the server's CA")
    add("--key-file", type=Path, help="file that holds an admin key")
    add("--model", required=True, help="the model's name")
    add("--suite", default=DEFAULT, help="prompts: a .yml file, a workload name, or the bundled suite (default)")
    add("--reference", type=Path, required=True, help="file with the reference answers")
    add("--limit", action="append", default=[], help="same_top=0.98, kld=0.02 or valid=0.9; may be repeated")
    args = parser.parse_args()
    try:
        latency, limits = divide_limits(args.limit)
        if latency:
            raise ValueError(f"limit {latency[0].name} does not apply to answers: give same_top, kld or valid")
        key = args.key_file.read_text(encoding="utf-8").strip() if args.key_file else ""
        model = Model(args.url, args.model, key, args.ca)
        if not args.reference.exists():
            _write(args.reference, record(model, args.suite, limits))
            return 0
        reference = msgspec.json.decode(args.reference.read_bytes(), type=Reference)
        kept, sentence = compare(reference, model, limits)
    except Incomparable as error:
        sys.stderr.write(f"quality: the answers cannot be compared: {error}\n")
        return 2
    except (ServerUnusable, ValueError, OSError) as error:
        sys.stderr.write(f"quality: {error}\n")
        return 2
    sys.stdout.write(f"{sentence}\n")
    return 0 if kept else 3


def _write(path: Path, reference: Reference) -> None:
    """Write a file that only this user can read, since prompts may be private."""
    os.umask(0o077)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, msgspec.json.encode(reference))


if __name__ == "__main__":
    sys.exit(main())
