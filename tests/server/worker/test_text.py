"""Text out of token bytes: whole characters, and no stop string or beginning of one ever leaks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llamaherd_server.wire.text import TextStream


def stream(pieces: list[bytes], stops: list[str]) -> tuple[list[str], TextStream]:
    text = TextStream(stops)
    sent = []
    for piece in pieces:
        sent.append(text.feed(piece))
        if text.stop is not None:
            return sent, text
    return [*sent, text.finish()], text


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.text(max_size=40), st.lists(st.integers(0, 200), max_size=10))
def test_any_cut_of_the_bytes_gives_the_same_text(text: str, cuts: list[int]) -> None:
    sent, _ = stream(pieces_of(text.encode("utf-8", "replace"), cuts), [])
    assert "".join(sent) == text.encode("utf-8", "replace").decode()
    assert all("\ufffd" not in part for part in sent) or "\ufffd" in text


@given(
    st.text("abcé", max_size=30),
    st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 100), max_size=12),
)
def test_output_ends_at_the_first_stop_string_wherever_tokens_are_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    sent, state = stream(pieces_of(text.encode(), cuts), stops)
    found = [text.find(stop) for stop in stops if stop in text]
    output = "".join(sent)
    if not found:
        assert output == text
        assert state.stop is None
    else:
        assert state.stop is not None
        assert text.startswith(output + state.stop)
        assert not any(stop in output for stop in stops)


def test_half_a_character_at_the_end_is_dropped() -> None:
    sent, _ = stream([b"ok", "é".encode()[:1]], [])
    assert "".join(sent) == "ok"
