"""Evaluation of given tokens: how probable the model finds each of them after those before it."""

from __future__ import annotations

from msgspec import Struct, field


class EvaluatedInput(Struct):
    """Token ids; from position `start` (at least 1) on, each one's probability is asked for, and the next token's."""

    tokens: list[int]
    start: int


class Evaluate(Struct, tag="evaluate"):
    """Log probabilities of each input's tokens, and of the `top` most likely ones in their place.

    They are computed with KV cells of `kv_types` (type_k, type_v), those in force where None.
    """

    id: int
    inputs: list[EvaluatedInput]
    top: int
    kv_types: tuple[str, str] | None = None


class Evaluation(Struct):
    """Of one input. Native arrays, one row a position from `start` to the one after the last token.

    `logprobs`: f32, of the input's own token, NaN in the last row; `top_tokens`: i32, rows of `top`, the most likely
    first; `top_logprobs`: f32, likewise.
    """

    logprobs: bytes
    top_tokens: bytes
    top_logprobs: bytes


class Evaluated(Struct, tag="evaluated"):
    """One evaluation for each input; `pieces` are the bytes of all tokens in it."""

    id: int
    evaluations: list[Evaluation]
    pieces: dict[int, bytes] = field(default_factory=dict)
