"""A look at the server before the load: does it answer, and how does its tokenizer count our words?"""

from __future__ import annotations

from llamaherd_loadtest.client import ChatClient, Target, clock
from llamaherd_loadtest.dice import seeded
from llamaherd_loadtest.samples import OK, Sample
from llamaherd_loadtest.workload import Calibration, chat_body, text

_SHORT, _LONG = 16, 144  # words


class ServerUnusable(Exception):
    """The server cannot be loaded; the message names the cause and the remedy."""


def calibrate(client: ChatClient, target: Target, seed: int) -> Calibration:
    """Two small requests of known words, and the token counts that the server reports for them.

    Raises ServerUnusable where one is not answered or has no usage.
    """
    short, long = (_prompt_tokens(client, target, seed, words) for words in (_SHORT, _LONG))
    per_word = (long - short) / (_LONG - _SHORT)
    if per_word <= 0:
        raise ServerUnusable(
            f"{target.url} counts {long} tokens in {_LONG} words and {short} in {_SHORT}: no tokenizer?"
        )
    return Calibration(per_word, short - _SHORT * per_word)


def _prompt_tokens(client: ChatClient, target: Target, seed: int, words: int) -> int:
    content = text(seeded(seed, "calibration", words), words)
    sample = Sample(index=0, scheduled=clock())
    client.stream(chat_body(target.model, content, 1, ignore_eos=False), sample)
    if sample.outcome not in (OK, "empty"):
        raise ServerUnusable(f"{target.url} {_cause(sample)}")
    if not sample.prompt_tokens:
        raise ServerUnusable(f"{target.url} reports no usage when streaming (stream_options.include_usage)")
    return sample.prompt_tokens


def _cause(sample: Sample) -> str:
    match sample.outcome, sample.detail:
        case "connection", detail if "CERTIFICATE_VERIFY_FAILED" in detail:
            return "has a certificate of an unknown authority: give its CA with --ca"
        case "connection", detail:
            return f"cannot be reached: {detail}"
        case (("http 401" | "http 403"), detail):
            return f"refuses the API key ({detail}): give one with --key-file"
        case "http 503", detail:
            return f"is not ready: {detail}"
        case outcome, detail:
            return f"does not answer ({outcome}): {detail}"
