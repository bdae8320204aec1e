"""Which hosts an edge sends a request to, by the model that it names; the names as nginx is to find them in a body."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
import regex as re  # reads possessive quantifiers as nginx does; Python 3.11.2 does not
from hypothesis import given
from hypothesis import strategies as st

DEFAULT = "smollm2-135m-instruct"  # of a host without variables
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["model", '"model":"no"', "\\", '\\"'])
JSON = st.recursive(
    TEXTS | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)

TWO = {"llamaherd_instances": [{"name": "two"}, {"name": "three"}]}


def host(name: str, *served: str, **more: Any) -> dict[str, Any]:
    """A host that serves models, each of which may be written `name=alias`."""
    models = [
        {"name": one, "sha256": f"{ord(one[0]):x}" * 32, **({"aliases": [alias]} if alias else {})}
        for one, _, alias in (each.partition("=") for each in served)
    ]
    names = [str(model["name"]) for model in models]
    serving = {"llamaherd_models": models, "llamaherd_model": "".join(names[:1]), "llamaherd_more_models": names[1:]}
    return {"inventory_hostname": name, **(serving if served else {}), **more}


def hosts_of(routes: dict[str, Any]) -> dict[str, list[str]]:
    return {name: one["hosts"] for one in routes["sets"] for name in one["names"]}


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [host("a", "chat")],
        [host("a", "chat"), host("b", "chat")],
        [host("a"), host("b")],
        [host("a", "chat", "code"), host("b", "code", "chat")],
        [host("a", "chat=*"), host("b", "chat=*")],
    ],
)
def test_hosts_that_serve_the_same_need_no_routes(route_filters: ModuleType, hosts: list[Any]) -> None:
    assert route_filters.model_routes(hosts) == {}


def test_each_name_goes_to_the_hosts_that_have_it(route_filters: ModuleType) -> None:
    found = route_filters.model_routes([host("a", "chat=gpt"), host("b", "chat=gpt", "code"), host("c")])
    assert hosts_of(found) == {"chat": ["a", "b"], "gpt": ["a", "b"], "code": ["b"], DEFAULT: ["c"]}
    assert len({one["upstream"] for one in found["sets"]}) == 3
    assert (found["models"], found["first"], found["unknown"]) == (["chat", "code", DEFAULT], "chat", "inference")


def test_a_model_of_all_hosts_is_balanced_over_all(route_filters: ModuleType) -> None:
    found = route_filters.model_routes([host("a", "chat"), host("b", "chat", "code")])
    assert [one["upstream"] for one in found["sets"]] == ["inference", "inference_2"]


def test_unknown_names_go_to_who_takes_any(route_filters: ModuleType) -> None:
    found = route_filters.model_routes([host("a", "chat"), host("b", "code=*")])
    assert found["unknown"] in {one["upstream"] for one in found["sets"] if one["hosts"] == ["b"]}
    assert set(hosts_of(found)) == {"chat", "code"}


@pytest.mark.parametrize(
    "written",
    ["org/ä 1.5", r"org\/ä 1.5", r"org/\u00e4 1.5", "org%2F%C3%A4%201.5", "org/%c3%a4%201.5", "org%2F%C3%A4+1.5"],
)
def test_a_name_is_known_however_a_request_writes_it(route_filters: ModuleType, written: str) -> None:
    found = route_filters.model_routes([host("a", "x"), host("b", "org/ä 1.5")])
    patterns = [pattern.encode() for one in found["sets"] if one["hosts"] == ["b"] for pattern in one["patterns"]]
    assert any(re.fullmatch(pattern, written.encode()) for pattern in patterns)
    assert not any(re.fullmatch(pattern, written.upper().encode()) for pattern in patterns)


def unquoted(parameter: str) -> bytes:
    """A regular expression out of nginx.conf, as Python writes it."""
    return parameter.replace('\\"', '"').replace("\\\\", "\\").replace("(?<l", "(?P<l").encode()


def in_body(route_filters: ModuleType, body: str) -> str | None:
    found = route_filters.model_routes([host("a", "x"), host("b", "y")])["in_body"]
    match = re.search(unquoted(found), body.encode())
    return json.loads(f'"{match["llamaherd_named"].decode()}"') if match else None


@given(before=st.dictionaries(TEXTS, JSON, max_size=4), after=st.dictionaries(TEXTS, JSON, max_size=4), name=TEXTS)
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_the_bodys_own_model_is_found(
    route_filters: ModuleType, layout: dict[str, Any], before: Any, after: Any, name: str
) -> None:
    before.pop("model", None)
    after.pop("model", None)
    body = json.dumps({**before, "model": name}, **layout)[:-1]
    body += json.dumps({"z": 1, **after}, **layout).replace("{", ",", 1)
    assert in_body(route_filters, body) == name


@pytest.mark.parametrize(
    "body", ["", "[]", '{"a": {"model": "b"}}', '{"model": 3}', '{"x": "model", "y": "b"}', '{"model": "b']
)
def test_a_body_without_a_model_has_none(route_filters: ModuleType, body: str) -> None:
    assert in_body(route_filters, body) is None


def test_nginx_takes_the_expression(route_filters: ModuleType) -> None:
    assert len(route_filters.model_routes([host("a", "x"), host("b", "y")])["in_body"]) < 4000


def mistakes(route_filters: ModuleType, *hosts: Any, inference: Any = None) -> list[str]:
    found: list[str] = route_filters.route_mistakes(hosts, inference or hosts)
    return found


def test_an_alias_means_one_model(route_filters: ModuleType) -> None:
    [line] = mistakes(route_filters, host("a", "chat=gpt"), host("b", "other=gpt"))
    assert line.startswith(
        "the alias 'gpt' means different models: chat on a (sha256 636363636363); other on b (sha256 6f"
    )
    [line] = mistakes(route_filters, host("a", "chat=other"), host("b", "other"))
    assert "'other'" in line
    assert mistakes(route_filters, host("a", "chat=gpt"), host("b", "copy-of-chat=gpt")) == []


def test_a_model_needs_a_host_that_is_in_service(route_filters: ModuleType) -> None:
    drained = host("b", "code", llamaherd_drained=True)
    [line] = mistakes(route_filters, host("a", "chat"), drained)
    assert line.startswith("model code would have no host: llamaherd_drained is true on b, ")
    assert mistakes(route_filters, host("a", "chat"), drained, host("c", "code")) == []
    assert mistakes(route_filters, host("a", "chat", llamaherd_drained=True)) == []


def test_a_model_needs_a_host_behind_an_edge(route_filters: ModuleType) -> None:
    [line] = mistakes(route_filters, host("a", "chat"), inference=[host("a", "chat"), host("b", "code")])
    assert line.startswith("model code is served by b, which no edge balances over; ")


def test_many_models_are_several_headers(route_filters: ModuleType) -> None:
    names = [f"{number:03}-{'n' * 60}" for number in range(100)]
    listed = route_filters.model_routes([host("a", *names), host("b", "y")])["listed"]
    assert ",".join(listed).split(",") == [*names, "y"]
    assert max(map(len, listed)) < 4000


def batches(route_filters: ModuleType, *hosts: Any, serial: Any = (1, "30%")) -> list[list[str]]:
    found: list[list[str]] = route_filters.rollout_batches(hosts, hosts, serial)
    return found


def test_hosts_of_one_kind_are_rolled_out_as_ansible_does(route_filters: ModuleType) -> None:
    ten = [host(f"h{number}", "chat") for number in range(10)]
    assert [len(batch) for batch in batches(route_filters, *ten)] == [1, 3, 3, 3]
    assert [len(batch) for batch in batches(route_filters, *ten, serial=4)] == [4, 4, 2]
    assert batches(route_filters, *ten)[0] == ["h0"]


def test_each_kind_of_host_has_a_canary(route_filters: ModuleType) -> None:
    fleet = [host(f"a{number}", "chat") for number in range(4)] + [host(f"b{number}", "code") for number in range(4)]
    assert batches(route_filters, *fleet)[0] == ["a0", "b0"]
    assert all(len(batch) == 2 for batch in batches(route_filters, *fleet))


def test_no_batch_has_all_hosts_of_a_model_that_has_several(route_filters: ModuleType) -> None:
    pair = [host("a", "chat"), host("b", "chat", "code"), host("c", "code")]
    assert batches(route_filters, *pair, serial=3) == [["a", "c"], ["b"]]
    assert batches(route_filters, host("a", "chat"), host("b", "chat"), serial="100%") == [["a"], ["b"]]
    out = host("b", "chat", llamaherd_drained=True)
    assert batches(route_filters, host("a", "chat"), out, host("c", "chat"), serial=3) == [["a", "b"], ["c"]]


def test_a_model_of_one_host_does_not_hold_up_the_others(route_filters: ModuleType) -> None:
    assert batches(route_filters, host("a", "chat"), host("b", "code"), host("c", "draw")) == [["a", "b", "c"]]


def test_hosts_that_others_cannot_stand_in_for_are_known(route_filters: ModuleType) -> None:
    fleet = [host("a", "chat"), host("b", "chat", "code"), host("c", "code", llamaherd_drained=True)]
    assert [route_filters.irreplaceable_models(fleet, name) for name in "abc"] == [[], ["code"], []]


def test_a_row_sums_up_a_models_hosts(route_filters: ModuleType) -> None:
    fleet = [host("a", "chat=gpt"), host("b", "chat=gpt", "code")]
    samples = {
        "a": [["up", "chat", "1.0"], ["slots", "chat", "4.0"], ["slots_busy", "chat", "3.0"]],
        "b": [["up", "code", "0.0"], ["slots", "code", "2.0"], ["queue_requests", "code", "5.0"]],
    }
    rows = route_filters.model_status(fleet, samples)
    assert rows == [["chat", "a, b", "1/2", "3/4", "0"], ["code", "b", "0/1", "0/2", "5"]]


MESSAGES = [
    {"role": "system", "content": "role: user"},
    {
        "content": [{"type": "text", "text": '{"role":"user"} }'}, {"type": "image_url", "image_url": {"url": "x"}}],
        "role": "user",
    },
    {"role": "user", "content": "later"},
]


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[:2], MESSAGES[1:], MESSAGES[1:2]])
@pytest.mark.parametrize("more", [{}, {"tools": [{"function": {"parameters": {"role": {"type": "string"}}}}]}])
def test_the_first_message_of_a_user_is_found(
    route_filters: ModuleType, messages: list[dict[str, Any]], more: dict[str, Any]
) -> None:
    pattern = unquoted(route_filters.message_pattern("user"))
    for body in ({"messages": messages, **more}, {**more, "messages": messages}):
        match = re.search(pattern, json.dumps(body).encode())
        assert match
        assert json.loads(match["llamaherd_message"]) == MESSAGES[1]


@pytest.mark.parametrize("body", ["{}", '{"prompt": "user"}', '{"messages": [{"role": "system", "content": "user"}]}'])
def test_a_body_without_a_message_of_a_user_has_none(route_filters: ModuleType, body: str) -> None:
    assert not re.search(unquoted(route_filters.message_pattern("user")), body.encode())


def test_servers_that_serve_a_model_together_share_keys_limits(route_filters: ModuleType) -> None:
    hosts = [host("a", "chat"), host("b", "chat", "code"), host("c", "embed"), {**host("d", "code"), **TWO}]
    shares = {name: route_filters.key_share(hosts, name, 3 if name == "d" else 1) for name in "abcd"}
    assert shares == {
        "a": {"servers": 5, "first": 0, "here": 1},
        "b": {"servers": 5, "first": 1, "here": 1},
        "c": {"servers": 1, "first": 0, "here": 1},
        "d": {"servers": 5, "first": 2, "here": 3},
    }
    assert route_filters.key_share([], "elsewhere", 2) == {"servers": 2, "first": 0, "here": 2}
