"""Evaluation of given tokens: the probability of each one after its predecessors, according to the model."""

from __future__ import annotations

from msgspec import Struct, field


class EvaluatedInput(Struct):
    """Token ids. Probabilities are computed from position `start` (at least 1) to the one after the last token."""

    tokens: list[int]
    start: int


class Evaluate(Struct, tag="evaluate"):
    """Requests log probabilities of each input's tokens and of the `top` most likely tokens at each position.

    `kv_types`: types of the KV cells (type_k, type_v) for the computation; None: the current ones.
    """

    id: int
    inputs: list[EvaluatedInput]
    top: int
    kv_types: tuple[str, str] | None = None


class Evaluation(Struct):
    """Result for one input: native arrays with one row per position, from `start` to the one after the last token.

    `logprobs`: f32, of the input's own token, NaN in the last row; `top_tokens`: i32, `top` values per row, most likely
    first; `top_logprobs`: f32, of the same tokens.
    """

    logprobs: bytes
    top_tokens: bytes
    top_logprobs: bytes


class Evaluated(Struct, tag="evaluated"):
    """One evaluation for each input; `pieces` maps every token in them to its bytes."""

    id: int
    evaluations: list[Evaluation]
    pieces: dict[int, bytes] = field(default_factory=dict)
