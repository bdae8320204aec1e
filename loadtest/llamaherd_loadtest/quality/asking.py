"""Gets a server's answers, and the probabilities that it assigns to given answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from llamaherd_loadtest.admin import Admin, error_message
from llamaherd_loadtest.probe import ServerUnusable
from llamaherd_loadtest.quality.divergence import Row
from llamaherd_loadtest.quality.suite import Chat
from llamaherd_loadtest.quality.validity import is_valid

TOP = 16
ANSWER_TOKENS = 32
CHECK_TOKENS = 256
_AT_ONCE = 4  # answers per request
_TIMEOUT_S = 600.0

KvTypes = tuple[str, str]


class Written(Struct, frozen=True):
    """A chat and the answer that a model wrote to it."""

    chat: Chat
    answer: str


class _Item(Struct):
    tokens: list[int]
    top: list[list[tuple[int, float | None]]]
    logprobs: list[float | None]


class _Evaluated(Struct):
    data: list[_Item]
    pieces: dict[int, str | list[int]]


class Model:
    """One model of a server, accessed with an admin key for /admin/logprobs."""

    def __init__(self, url: str, model: str, key: str = "", ca: Path | None = None) -> None:
        self._admin, self._model = Admin(url, key, ca), model

    def write(self, chat: Chat, seed: int) -> Written:
        """Have the model answer, sampled by the server's defaults. Raises ServerUnusable."""
        body = {"prompt": self._prompt(chat), "max_tokens": ANSWER_TOKENS, "seed": seed}
        return Written(chat, self._post("/v1/completions", body)["choices"][0]["text"])

    def evaluate(self, written: Sequence[Written], kv_types: KvTypes | None = None) -> list[list[Row]]:
        """Return the distributions at each position of the answers. Raises ServerUnusable."""
        types = dict(zip(("kv_type_k", "kv_type_v"), kv_types, strict=True)) if kv_types else {}
        rows: list[list[Row]] = []
        for first in range(0, len(written), _AT_ONCE):
            some = written[first : first + _AT_ONCE]
            inputs = [{"prompt": self._prompt(one.chat), "answer": one.answer} for one in some]
            found = msgspec.convert(
                self._post("/admin/logprobs", {"inputs": inputs, "top": TOP} | types), _Evaluated, strict=False
            )
            rows += [_rows(item, found.pieces) for item in found.data]
        return rows

    def passes(self, check: Chat) -> bool:
        """Return whether its most likely answer has the form that the check requires. Raises ServerUnusable."""
        body = {"messages": check.messages, "temperature": 0, "max_tokens": CHECK_TOKENS}
        body |= {"tools": check.tools} if check.tools else {}
        return is_valid(check, self._post("/v1/chat/completions", body)["choices"][0]["message"])

    def _prompt(self, chat: Chat) -> str:
        body = {"messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {})
        return str(self._post("/apply-template", body)["prompt"])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        content = msgspec.json.encode({"model": self._model} | body)
        response = self._admin.request("POST", path, timeout_s=_TIMEOUT_S, body=content)
        url = self._admin.base + path
        if response.status_code in (404, 405) and path == "/admin/logprobs":
            raise ServerUnusable(f"{url} does not exist: this server is too old to compare its answers")
        if response.status_code != 200:
            raise ServerUnusable(f"{url} answers {response.status_code}: {error_message(response)}")
        return msgspec.json.decode(response.content)


def _rows(item: _Item, pieces: dict[int, str | list[int]]) -> list[Row]:
    """Key by the tokens' texts; bytes that are not text become hexadecimal numbers, which are no token's text."""
    texts = {token: piece if isinstance(piece, str) else "\0" + bytes(piece).hex() for token, piece in pieces.items()}
    rows = []
    for place, top in enumerate(item.top):
        listed = {texts[token]: logprob for token, logprob in reversed(top) if logprob is not None}
        own = texts[item.tokens[place]] if place < len(item.tokens) else None
        floor = min(listed.values())
        if own is not None and (logprob := item.logprobs[place]) is not None:
            listed.setdefault(own, logprob)
        rows.append(Row(listed, floor, own))
    return rows
