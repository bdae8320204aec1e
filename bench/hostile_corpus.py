"""Requests that try to take more than their share, by kind: each has a name, a path and a body as bytes.

`refused`: the response must be an error. Other requests can be served as long as nobody else pays for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
INT32_MAX = 2**31 - 1
SPECIAL = "<|im_start|>"


@dataclass(frozen=True)
class Attack:
    kind: str
    name: str
    path: str
    body: bytes
    refused: bool = True


def corpus() -> list[Attack]:
    return [
        *_grammars(),
        *_schemas(),
        *_sampling(),
        *_llama_servers(),
        *_bodies(),
        *_texts(),
        *_media(),
    ]


def _completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "Count to ten.", "max_tokens": 16, **fields}).encode()


def _chat(content: object = "Count to ten.", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 16, **fields}).encode()


def _many(element: bytes, count: int) -> bytes:
    return b",".join([element] * count)


def _grammars() -> Iterator[Attack]:
    def doubling(levels: int, leaf: str) -> str:
        rules = [f"r{i} ::= r{i + 1} r{i + 1}" for i in range(levels)]
        return "\n".join(["root ::= r0", *rules, f"r{levels} ::= {leaf}"])

    grammars = {
        "rules that double, 25 levels": doubling(25, '"a"'),
        "optional rules that double, 25 levels": doubling(25, '"a"?'),
        "ambiguous rules that double, 12 levels": doubling(12, '"a" | "b" | ""'),
        "a thousand levels of brackets": "root ::= " + "(" * 1000 + '"a"' + ")" * 1000,
        "a hundred thousand levels of brackets": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
        "a million open brackets": "root ::= " + "(" * 1_000_000,
        "repetition to 10 million": 'root ::= "a"{0,10000000}',
        "repetition to the end of int32": f'root ::= "a"{{{INT32_MAX}}}',
        "repetition past 64 bits": 'root ::= "a"{99999999999999999999999}',
        "repetition backwards": 'root ::= "a"{9,1}',
        "nested repetition": 'root ::= ((("a"{200}){200}){200}){200}',
        "repetition of nothing": 'root ::= (""*)*',
        "3,000 ambiguous optional items": "root ::= " + "e " * 3000 + '\ne ::= "a" | "b" | ""',
        "30,000 optional items": "root ::= " + "e " * 30_000 + '\ne ::= "a"?',
        "60,000 alternatives with one beginning": "root ::= " + " | ".join(f'"word{i}"' for i in range(60_000)),
        "left recursion": 'root ::= root "a" | "a"',
        "left recursion by two rules": 'root ::= a "x"\na ::= root | b\nb ::= a "y"',
        "left recursion behind nothing": 'root ::= e root "a" | "a"\ne ::= ""',
        "stars of stars": 'root ::= ((("a"*)*)*)* "b"',
        "no root": 'main ::= "a"',
        "an undefined rule": "root ::= nobody",
        "an open string": 'root ::= "a',
        "line breaks that forge a log line": 'root ::= "\n{\\"event\\": \\"forged\\"}',
        "a NUL": 'root ::= "a\0b" x',
        "an invalid escape": 'root ::= "\\xZZ"',
        "an open class of characters": "root ::= [a-",
        "a rule of a megabyte": "root ::= " + '"' + "a" * 1_000_000 + '" x',
    }
    cheap = {
        *("a thousand levels of brackets", "repetition to 10 million", "stars of stars"),
        *("rules that double, 25 levels", "nested repetition"),
    }
    for name, grammar in grammars.items():
        yield Attack("grammar", name, COMPLETIONS, _completion(grammar=grammar), name not in cheap)


def _schemas() -> Iterator[Attack]:
    def nested(levels: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(levels):
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        return schema

    def laughs(levels: int) -> dict[str, Any]:
        both = [{"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)]
        return {"$ref": "#/$defs/d0", "$defs": {**{f"d{i}": one for i, one in enumerate(both)}, f"d{levels}": {}}}

    schemas: dict[str, tuple[dict[str, Any], bool]] = {
        "400 levels of objects": (nested(400), True),
        "references that double, 30 levels": (laughs(30), False),
        "a reference to itself": ({"$ref": "#"}, True),
        "references in a circle": (
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
            True,
        ),
        "an enum of 300,000 numbers": ({"enum": list(range(300_000))}, True),
        "an enum of 5,000 words": ({"enum": [f"word{i * 7919 % 100_003}" for i in range(5000)]}, False),
        "400,000 duplicates in required": (
            {"type": "object", "properties": {"a": {}}, "required": ["a"] * 400_000},
            False,
        ),
        "3,900 properties": (
            {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "^\\W+$"} for i in range(3900)}},
            False,
        ),
        "10,000 alternatives": (
            {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(10_000)]},
            True,
        ),
        "a pattern of 5,000 \\W": ({"type": "string", "pattern": "^" + "\\W" * 5000 + "$"}, False),
        "nested repetition in a pattern": ({"type": "string", "pattern": "^((a{1000}){1000}){1000}$"}, True),
        "a pattern that backtracks": ({"type": "string", "pattern": "^(a+)+b$"}, False),
        "a billion characters at least": ({"type": "string", "minLength": 10**9}, True),
        "a million items at least": ({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}, False),
        "integers of 30 digits": ({"type": "integer", "minimum": 10**30, "maximum": 10**31}, False),
    }
    for name, (schema, refused) in schemas.items():
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        yield Attack("schema", name, CHAT, _chat(response_format=wanted), refused)
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(400)}}
    yield Attack("schema", "a tool of 400 levels", CHAT, _chat(tools=[tool], tool_choice="required"))


def _sampling() -> Iterator[Attack]:
    fields: dict[str, tuple[dict[str, Any], bool]] = {
        "repeat_last_n at int32's end": ({"repeat_last_n": INT32_MAX, "repeat_penalty": 1.1}, False),
        "repeat_last_n past int32": ({"repeat_last_n": 2**40, "repeat_penalty": 1.1}, False),
        "dry_penalty_last_n at int32's end": ({"dry_penalty_last_n": INT32_MAX, "dry_multiplier": 1}, False),
        "top_k past 64 bits": ({"top_k": 2**70}, True),
        "n_probs of a billion": ({"logprobs": 10**9}, True),
        "64 breakers of a kilobyte": ({"dry_multiplier": 1, "dry_sequence_breakers": ["x" * 1000] * 64}, False),
        "10,000 breakers": ({"dry_multiplier": 1, "dry_sequence_breakers": [f"b{i}" for i in range(10_000)]}, True),
        "a bias at a float's end with a grammar": ({"logit_bias": {"5": 1e308}, "grammar": 'root ::= "a"'}, False),
        "XTC down to one token with a grammar": (
            {"xtc_probability": 1, "xtc_threshold": 0, "grammar": 'root ::= "a"+'},
            False,
        ),
        "200,000 biases": ({"logit_bias": {str(i): 1 for i in range(200_000)}}, True),
        "a million generations": ({"n": 10**6}, True),
        "a negative number of tokens": ({"max_tokens": -5}, True),
        "an unknown mirostat": ({"mirostat": 7}, True),
        "100,000 stop strings": ({"stop": [f"s{i}" for i in range(100_000)]}, True),
        "a stop string of a megabyte": ({"stop": ["x" * 1_000_000]}, True),
        "dry_base of 0": ({"dry_multiplier": 1, "dry_base": 0}, True),
    }
    for name, (more, refused) in fields.items():
        yield Attack("sampling", name, COMPLETIONS, _completion(**more), refused)
    for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"prompt": "Count.", "max_tokens": 4, "temperature": {literal}}}'.encode()
        yield Attack("sampling", f"temperature {literal}", COMPLETIONS, body)
    biased = b'{"prompt": "Count.", "max_tokens": 4, "grammar": "root ::= \\"a\\"", "logit_bias": {"5": NaN}}'
    yield Attack("sampling", "a bias of NaN with a grammar", COMPLETIONS, biased)


def _llama_servers() -> Iterator[Attack]:
    lazy = {"grammar": 'root ::= "a"', "grammar_lazy": True}
    fields: dict[str, dict[str, Any]] = {
        "a schema that refers to itself alone": {"json_schema": {"$ref": "#"}},
        "a trigger that backtracks": {**lazy, "grammar_triggers": [{"type": 2, "value": "((.*)*)*#$"}]},
        "a trigger that is no pattern": {**lazy, "grammar_triggers": [{"type": 2, "value": "(["}]},
        "100,000 samplers": {"samplers": "k" * 100_000},
        "50,000 probabilities of each token": {"n_probs": 50_000},
    }
    for name, more in fields.items():
        body = {"prompt": "Count to ten.", "n_predict": 16, **more}
        yield Attack("llama-server's own", name, "/completion", json.dumps(body).encode())
    for name, pattern in {"2,000 ambiguous letters": "(a|b|)" * 2000, "50,000 brackets": "(" * 50_000}.items():
        schema = {"type": "string", "pattern": f"^{pattern}$"}
        body = {"prompt": "Count to ten.", "n_predict": 16, "json_schema": schema}
        yield Attack("llama-server's own", f"a schema of {name}", "/completion", json.dumps(body).encode(), False)


def _bodies() -> Iterator[Attack]:
    many = {
        "1.3 million empty strings": ("/detokenize", b'{"tokens": [' + _many(b'""', 1_300_000) + b"]}"),
        "a million empty parts": (
            MESSAGES,
            b'{"model": "bench", "max_tokens": 4, "messages": [{"role": "user", "content": ['
            + _many(b"{}", 1_000_000)
            + b"]}]}",
        ),
        "a million summaries": (
            RESPONSES,
            b'{"model": "bench", "input": [{"type": "reasoning", "summary": [' + _many(b"{}", 1_000_000) + b"]}]}",
        ),
        "a million messages": (CHAT, b'{"messages": [' + _many(b"{}", 1_000_000) + b"]}"),
        "a million prompts": (COMPLETIONS, b'{"prompt": [' + _many(b'""', 1_000_000) + b"]}"),
        "a million nulls to embed": ("/v1/embeddings", b'{"input": [' + _many(b"null", 700_000) + b"]}"),
        "100,000 unknown fields": (
            CHAT,
            b'{"messages": [], ' + b",".join(b'"f%d": 1' % i for i in range(100_000)) + b"}",
        ),
        "600 levels of lists": (COMPLETIONS, b'{"prompt": ' + b"[" * 600 + b"]" * 600 + b"}"),
        "a million levels of lists": (CHAT, b'{"messages": ' + b"[" * 1_000_000 + b"}"),
        "600 levels of objects in metadata": (
            CHAT,
            b'{"messages": [], "metadata": ' + b'{"a":' * 600 + b"1" + b"}" * 600 + b"}",
        ),
        "a number of a million digits": (COMPLETIONS, b'{"prompt": "a", "max_tokens": ' + b"9" * 1_000_000 + b"}"),
        "not JSON": (CHAT, b"{" * 1000),
        "not UTF-8": (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
        "half of a surrogate pair": (CHAT, b'{"messages": [{"role": "nobody", "content": "\\ud83d"}]}'),
        "tokens that are not there": (COMPLETIONS, b'{"prompt": [4294967295], "max_tokens": 4}'),
        "a million tokens": (COMPLETIONS, b'{"prompt": [' + _many(b"5", 1_000_000) + b"]}"),
        "5,000 tools": (
            CHAT,
            _chat(
                tools=[{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(5000)],
                tool_choice="required",
            ),
        ),
    }
    for name, (path, body) in many.items():
        yield Attack("body", name, path, body)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": "a", "content": "b"})
    body = json.dumps({"messages": history, "max_tokens": 4}).encode()
    yield Attack("body", "100,000 levels in a call's arguments", CHAT, body)


def _texts() -> Iterator[Attack]:
    texts = {
        "60,000 special tokens": SPECIAL * 60_000,
        "60,000 halves of a special token": "<|im_" * 60_000,
        "a megabyte of one letter": "a" * 1_000_000,
        "a megabyte of spaces": " " * 1_000_000,
        "a megabyte of line breaks": "\n" * 1_000_000,
        "300,000 emoji": "\N{GRINNING FACE}" * 300_000,
        "a megabyte of digits": "1234567890" * 100_000,
    }
    for name, text in texts.items():
        yield Attack("text", f"{name} as a prompt", COMPLETIONS, _completion(prompt=text))
        yield Attack("text", f"{name} in a chat", CHAT, _chat(text))
    yield Attack(
        "text", "special tokens to count", "/tokenize", json.dumps({"content": SPECIAL * 150_000}).encode(), False
    )


def _media() -> Iterator[Attack]:
    local = "http://127.0.0.1:9/secret"
    parts: dict[str, dict[str, Any]] = {
        "an image on this machine": {"type": "image_url", "image_url": {"url": local}},
        "an image in a file": {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
        "a sound on this machine": {"type": "input_audio", "input_audio": {"data": local, "format": "wav"}},
        "a sound by its address": {"type": "audio_url", "audio_url": {"url": local}},
        "a video on this machine": {"type": "video_url", "video_url": {"url": local}},
        "a file by its path": {"type": "file", "file": {"file_data": "file:///etc/hostname"}},
    }
    for name, part in parts.items():
        yield Attack("media", name, CHAT, _chat([part, {"type": "text", "text": "What is this?"}]))
