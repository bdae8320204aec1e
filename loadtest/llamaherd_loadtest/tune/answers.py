"""Selects the KV types to search: those whose answers to the workload's prompts keep the limits, compared with f16."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from llamaherd_loadtest.client import clock
from llamaherd_loadtest.limits import QualityLimit
from llamaherd_loadtest.quality.asking import KvTypes, Model, Written
from llamaherd_loadtest.quality.divergence import Quality, Row, compared
from llamaherd_loadtest.quality.suite import Chat
from llamaherd_loadtest.quantiles import Judgement
from llamaherd_loadtest.tune.judge import judge_quality
from llamaherd_loadtest.tune.settings import Settings

REFERENCE: KvTypes = ("f16", "f16")


class KvAnswers(Struct, frozen=True):
    """How answers change with these types of keys and values, and whether that keeps the limits."""

    kv_types: KvTypes
    quality: Quality
    judgement: Judgement
    limit: str

    @property
    def verdict(self) -> str:
        return f"{self.judgement} {self.limit}".strip()


class Answers(Struct, frozen=True, tag="answers"):
    """All types that were compared, and the seconds it took."""

    compared: list[KvAnswers]
    took_s: float = 0.0

    def permit(self, settings: Settings) -> bool:
        """Return whether the KV types of `settings` allow searching them."""
        types = kv_types(settings)
        return types == REFERENCE or any(
            one.kv_types == types and one.judgement is Judgement.PASSES for one in self.compared
        )


def kv_types(settings: Settings) -> KvTypes:
    return str(settings.get("kv_type_k", REFERENCE[0])), str(settings.get("kv_type_v", REFERENCE[1]))


def compare_kv_types(
    model: Model, chats: Iterable[Chat], types: Sequence[KvTypes], limits: Sequence[QualityLimit], budget_s: float
) -> Answers:
    """Generate answers to as many chats as the budget allows, once, and evaluate them with each of the types.

    Raises ServerUnusable, also if the server's engine cannot return log probabilities of given texts.
    """
    started = clock()
    written, reference = list[Written](), list[list[Row]]()
    for seed, chat in enumerate(chats, 1):
        written.append(model.write(chat, seed))
        reference += model.evaluate(written[-1:], REFERENCE)
        if clock() - started > budget_s / (1 + len(types)):
            break
    answers = []
    for one in types:
        quality = compared(reference, model.evaluate(written, one))
        answers.append(KvAnswers(one, quality, *judge_quality(quality, limits)))
    return Answers(answers, clock() - started)
