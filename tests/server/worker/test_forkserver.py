"""The grammar that a child keeps to, in this process: what it allows, and what it costs to say so."""

from __future__ import annotations

import random
import string

import pytest

from llamaherd_server.wire.errors import RequestError
from llamaherd_server.worker.forkserver import Child, Forkserver, Job
from llamaherd_server.worker.forkserver_child import Grammars
from llamaherd_server.worker.model import Model
from llamaherd_server.worker.vocabulary import PIECE_CHARS

_rng = random.Random(1)
WORDS = ["".join(_rng.choices(string.ascii_lowercase, k=7)) for _ in range(300)]
GRAMMARS = {
    "object": r'root ::= "{" ws "\"a\":" ws "\"" [^"\\\x7F\x00-\x1F]* "\"" ws "}"' + "\nws ::= [ \\t]*",
    "anything": "root ::= .*",
    "all characters but one": "root ::= [^日]+",
    "one script": "root ::= [一-鿿]+",
    "words": "root ::= " + " | ".join(f'"{word}"' for word in WORDS),
    "marks in texts": r'root ::= "<a!\"" [^<!\]]* "]<" # <[5]>' + "\n",
    "a token by its name": 'root ::= <[5]> "a" | !<[6]> "b"',
}


@pytest.fixture(scope="module")
def grammars(model: Model) -> Grammars:
    return Grammars(model, bytearray(), None)


@pytest.mark.parametrize("kind", GRAMMARS)
def test_looking_at_beginnings_first_allows_the_same_tokens(model: Model, grammars: Grammars, kind: str) -> None:
    grammars._compile(GRAMMARS[kind])
    for _ in range(12):
        allowed = grammars._allowed()
        assert allowed == grammars._apply(grammars._everything)
        tokens = [token for token, no in enumerate(allowed) if not no and token not in model.eog_tokens]
        if not tokens:
            break
        grammars._accept(_rng.choice(tokens))


@pytest.fixture(scope="module")
def forkserver(model: Model) -> Forkserver:
    return model.forkserver


def test_a_child_keeps_to_its_grammar_token_by_token(model: Model, forkserver: Forkserver) -> None:
    (yes, no) = (model.tokenize(word, add_special=False, parse_special=False)[0] for word in (" yes", " no"))
    child = forkserver.open(Job(grammar='root ::= " yes" " no"'))
    assert child.prepared().tokens == []
    child.ask(no)
    allowed = answer(child, model)
    assert allowed[yes] == 0
    assert allowed[no]
    child.accept(yes)
    child.ask(no)
    assert answer(child, model) == b"\1"
    child.close()


def answer(child: Child, model: Model) -> bytes:
    given = child.answer(model.n_vocab, 20)
    assert given is not None
    return given


def test_closing_ends_a_child_in_the_middle_of_its_work(forkserver: Forkserver) -> None:
    rules = "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(40))
    child = forkserver.open(Job(grammar=f'root ::= r0\n{rules}\nr40 ::= "a" | ""'))
    child.close()
    with pytest.raises(RequestError):
        child.prepared()
    again = forkserver.open(Job(["a herd"]))
    assert again.prepared()


def test_a_forkserver_that_has_died_is_started_again(model: Model, forkserver: Forkserver) -> None:
    before = forkserver.open(Job(["a herd"])).prepared()
    assert forkserver._process is not None
    forkserver._process.kill()
    forkserver._process.wait()
    assert forkserver.open(Job(["a herd"])).prepared() == before


def test_tokens_are_counted_or_given_as_far_as_they_are_wanted(forkserver: Forkserver) -> None:
    text = "a herd of llamas " * 2000
    whole = forkserver.open(Job([text])).prepared()
    assert whole.count == len(whole.tokens[0]) == 12_001
    counted = forkserver.open(Job([text], counted=True)).prepared()
    assert (counted.tokens, counted.count) == ([], 12_001)
    assert forkserver.open(Job([text], most=12_001)).prepared() == whole
    with pytest.raises(RequestError, match="the text has 12001 tokens, more than 12000: send it in parts"):
        forkserver.open(Job([text], most=12_000)).prepared()
    with pytest.raises(RequestError, match="the prompt has 12001 tokens, a slot holds 12001") as refused:
        forkserver.open(Job([text], room=12_001)).prepared()
    assert refused.value.details == {"n_prompt_tokens": 12_001, "n_ctx": 12_001}


@pytest.mark.parametrize("text", ["a" * 2**20, " " * 2**20, "<|im_start|>" * 2**17, "\N{GRINNING FACE}" * 2**18])
def test_of_a_text_that_is_far_too_long_a_beginning_is_looked_at(forkserver: Forkserver, text: str) -> None:
    with pytest.raises(RequestError, match=r"the prompt has at least \d+ tokens, a slot holds 1024"):
        forkserver.open(Job([text], room=1024)).prepared()


@pytest.mark.parametrize("parse", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_a_long_text_has_the_tokens_of_its_pieces(model: Model, add: bool, parse: bool) -> None:
    parts = ["<|im_start|>", "<|im_end|>", "\n", " ", "  ", "a herd", "<", "|>", "<|im_", "😀", "<repo_name>"]
    text = "".join(random.Random(2).choices(parts, k=PIECE_CHARS))
    assert len(model.parts(text, PIECE_CHARS, parse_special=True)) > 3
    assert model.tokenize(text, add_special=add, parse_special=parse) == model._tokens(text, add, parse)
