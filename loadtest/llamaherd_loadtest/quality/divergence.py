"""How far apart two next-token distributions are if only the most likely tokens of each are known.

Tokens are compared by their texts. The estimate of the KL divergence D(P || Q) is a lower bound: tokens that both sides
list are separate classes; tokens that only P lists form one class, whose probability under Q is at most what Q's list
leaves; all others form one class. Merging outcomes never raises a divergence (the log sum inequality: Cover and Thomas,
Elements of Information Theory, 2nd ed., theorem 2.7.1), so the estimate is never too high. With 16 tokens, it is the
closer the sharper the distributions are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from llamaherd_loadtest.quantiles import ERROR, Share, share
from llamaherd_loadtest.tune.evidence import student_t

_MIN_FREEDOM = 4  # student_t is accurate from here on
_MIN_MASS = 1e-5  # log probabilities have five decimals


class Incomparable(Exception):
    """Two releases tokenize the same answer differently; the message says where."""


class Row(Struct, frozen=True):
    """The distribution at one position: log probabilities by text. No unlisted token exceeds `floor`. `own` is the
    answer's own token there, which is always listed; it is None after the last token."""

    logprobs: dict[str, float]
    floor: float
    own: str | None

    @property
    def best(self) -> str:
        return max(self.logprobs, key=self.logprobs.__getitem__)


class Difference(Struct, frozen=True):
    """One answer: its positions, the sum of their divergences in nats, and how many have the same top token."""

    positions: int
    divergence: float
    same: int


class Quality(Struct, frozen=True):
    """All answers: mean KL divergence in nats, and the share of positions with the same top token.

    Their intervals have an error probability of about ERROR on either side. They are over answers, because the
    positions of one answer are not independent.
    """

    answers: int
    positions: int
    same: int
    kld: Share
    same_top: Share

    def __str__(self) -> str:
        kld, same = self.kld, self.same_top
        return (
            f"KL divergence {kld.value:.3g} ({kld.low:.3g} to {kld.high:.3g}), same top token {same.value:.1%} "
            f"({same.low:.1%} to {same.high:.1%}) at {self.positions} positions of {self.answers} answers"
        )


def difference(before: Sequence[Row], after: Sequence[Row]) -> Difference:
    """Compare one answer under two models. Raises Incomparable if they tokenize it differently."""
    owns = [[row.own for row in rows] for rows in (before, after)]
    if owns[0] != owns[1]:
        place = next((i for i, (a, b) in enumerate(zip(*owns, strict=False)) if a != b), min(map(len, owns)))
        texts = [repr("".join(own or "" for own in side[place : place + 1])) for side in owns]
        raise Incomparable(f"the vocabularies differ: where one has the token {texts[0]}, the other has {texts[1]}")
    pairs = [*zip(before, after, strict=True)]
    return Difference(len(pairs), sum(divergence(*pair) for pair in pairs), sum(p.best == q.best for p, q in pairs))


def divergence(p: Row, q: Row) -> float:
    """Return a lower bound of D(P || Q) in nats."""
    both = p.logprobs.keys() & q.logprobs.keys()
    exact = sum(math.exp(p.logprobs[token]) * (p.logprobs[token] - q.logprobs[token]) for token in both)
    only = p.logprobs.keys() - both
    p_only = sum(math.exp(p.logprobs[token]) for token in only)
    p_rest = max(1 - sum(map(math.exp, p.logprobs.values())), _MIN_MASS)
    q_left = max(1 - sum(math.exp(q.logprobs[token]) for token in both), 2 * _MIN_MASS)
    # The most that Q may assign to the tokens it does not list; of that, the amount that minimises the divergence.
    q_unlisted = max(1 - sum(map(math.exp, q.logprobs.values())), _MIN_MASS)
    most = min(len(only) * math.exp(q.floor), q_unlisted)
    q_only = min(q_left * p_only / (p_only + p_rest), most)
    classes = [(p_only, q_only), (p_rest, q_left - q_only)] if only else [(p_rest, q_left)]
    merged = sum(a * math.log(a / max(b, _MIN_MASS / 10)) for a, b in classes if a > 0)
    return max(0.0, exact + merged)


def compared(before: Sequence[Sequence[Row]], after: Sequence[Sequence[Row]]) -> Quality:
    """Compare the same answers under two models. Raises Incomparable, and ValueError without answers."""
    return summarise([difference(*pair) for pair in zip(before, after, strict=True)])


def summarise(differences: Sequence[Difference]) -> Quality:
    """Raises ValueError if `differences` is empty."""
    if not differences:
        raise ValueError("there are no answers to compare")
    positions = [one.positions for one in differences]
    kld = _mean([one.divergence for one in differences], positions)
    other = _mean([one.positions - one.same for one in differences], positions)
    if none := share(0, sum(positions)) if not other.value else None:
        other = none
    same_top = Share(1 - other.value, max(0.0, 1 - other.high), 1 - other.low)
    return Quality(len(differences), sum(positions), sum(one.same for one in differences), kld, same_top)


def _mean(sums: Sequence[float], positions: Sequence[int]) -> Share:
    """Return the mean per position with its interval: Student's t over answers, applied to the logarithm by the delta
    method because the sums are skewed to the right."""
    count, of = len(sums), sum(positions)
    mean = sum(sums) / of
    if mean <= 0 or count < 2:
        return Share(mean, 0.0, math.inf if mean > 0 else 0.0)
    squares = sum((value - mean * n) ** 2 for value, n in zip(sums, positions, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / of
    reach = math.exp(student_t(1 - ERROR, max(count - 1, _MIN_FREEDOM)) * error / mean)
    return Share(mean, mean / reach, mean * reach)
