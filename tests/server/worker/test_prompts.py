"""Where computed prompts are kept: in a bounded memory that outlives its writer, and in files."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaherd_server.wire.engine_settings import EngineSettings
from llamaherd_server.worker import arena
from llamaherd_server.worker.arena import Arena
from llamaherd_server.worker.prompt_files import SUFFIX, store
from llamaherd_server.worker.prompts import MIN_TOKENS, PromptCache

PAGE = 1 << 16
SETTINGS = EngineSettings()


@pytest.fixture
def fd() -> Iterator[int]:
    fd = arena.create(8 * PAGE)
    yield fd
    os.close(fd)


def cache(
    fd: int, folder: Path | None = None, *, model: str = "model", settings: EngineSettings = SETTINGS
) -> PromptCache:
    made = PromptCache(Arena(fd, 8 * PAGE), model, folder)
    made.suit(settings, cuts=True)
    return made


def saver(state: bytes) -> Callable[[Callable[[int], Any]], int]:
    def save(buffer: Callable[[int], Any]) -> int:
        into = buffer(len(state))
        if into is None:
            return 0
        into[:] = state
        return len(state)

    return save


def put(prompts: PromptCache, tokens: list[int], state: bytes = b"state", scope: str = "") -> bool:
    after = prompts.lacks(scope, tokens, chained=True)
    return after is not None and prompts.put(scope, tokens, after, [], saver(state))


def states(prompts: PromptCache, tokens: list[int], scope: str = "") -> list[tuple[bytes, int]]:
    """Of what is found for `tokens`: each part's state, and up to which position it counts."""
    if (found := prompts.find(scope, tokens)) is None:
        return []
    with prompts.held(found) as (parts, _, _):
        return [(bytes(state), end) for state, _, end in parts]


def prompt(number: int, length: int = 100) -> list[int]:
    return random.Random(number).choices(range(1000), k=length)


def test_what_prompts_share_is_kept_once(fd: int) -> None:
    prompts, shared = cache(fd), prompt(1, 50)
    assert put(prompts, [*shared, *prompt(2)], b"first")
    assert put(prompts, [*shared, *prompt(3)], b"other")
    assert states(prompts, [*shared, *prompt(3), 7]) == [(b"first", 50), (b"other", 150)]
    assert states(prompts, [*shared, *prompt(4)]) == [(b"first", 50)]
    assert not put(prompts, [*shared, *prompt(2)])


def test_a_key_finds_its_own_prompts_alone(fd: int) -> None:
    prompts = cache(fd)
    assert put(prompts, prompt(1), scope="one")
    assert states(prompts, prompt(1), "other") == []
    assert states(prompts, prompt(1), "one")


def test_one_token_is_left_to_compute_and_next_to_nothing_is_no_find(fd: int) -> None:
    prompts = cache(fd)
    assert put(prompts, prompt(1))
    assert states(prompts, prompt(1)) == [(b"state", 99)]
    assert states(prompts, [*prompt(1)[: MIN_TOKENS - 1], *prompt(2)]) == []


def test_memory_is_bounded_and_what_served_last_stays(fd: int) -> None:
    prompts = cache(fd)
    for number in range(20):
        assert put(prompts, prompt(number), b"x" * 1000)
        assert prompts.arena.used <= 8 * PAGE
        assert states(prompts, prompt(0)), "used again and again"
    assert prompts.evictions == 12
    assert states(prompts, prompt(19))
    assert not states(prompts, prompt(5))
    assert not put(prompts, prompt(99), b"x" * 9 * PAGE)


def test_another_worker_finds_what_the_first_had_finished(fd: int) -> None:
    first = cache(fd)
    assert put(first, prompt(1), b"one")
    offset = first.arena.allocate(100)  # killed in the middle of a second one
    assert offset is not None
    second = cache(fd)
    assert states(second, prompt(1)) == [(b"one", 99)]
    assert second.arena.used == PAGE
    assert put(second, prompt(2))


def test_other_settings_find_nothing_until_the_former_are_back(fd: int) -> None:
    prompts = cache(fd)
    assert put(prompts, prompt(1))
    prompts.suit(EngineSettings(kv_type_k="q8_0"), cuts=True)
    assert states(prompts, prompt(1)) == []
    prompts.suit(SETTINGS, cuts=True)
    assert states(prompts, prompt(1))


@pytest.fixture
def stored(fd: int, tmp_path: Path) -> Path:
    """A folder of two prompts that share a prefix."""
    prompts = cache(fd)
    assert put(prompts, prompt(1), b"begin")
    assert put(prompts, [*prompt(1), *prompt(2)], b"end")
    store(prompts.arena, tmp_path, 1 << 20, 60)
    return tmp_path


def restarted(folder: Path, **more: Any) -> PromptCache:
    fd = arena.create(8 * PAGE)
    try:
        return cache(fd, folder, **more)
    finally:
        os.close(fd)


def test_files_are_read_when_they_are_asked_for(stored: Path) -> None:
    prompts = restarted(stored)
    tokens = [*prompt(1), *prompt(2), 7]
    assert prompts.arena.used == 0
    assert states(prompts, tokens) == []
    prompts.fetch("", tokens)
    assert states(prompts, tokens) == [(b"begin", 100), (b"end", 200)]
    assert {path.stat().st_mode & 0o777 for path in stored.iterdir()} == {0o600}


def test_files_that_nobody_has_read_outlive_another_stop(fd: int, stored: Path) -> None:
    prompts = cache(fd)
    assert put(prompts, prompt(3), b"new")
    store(prompts.arena, stored, 1 << 20, 0)
    tokens = [*prompt(1), *prompt(2), 7]
    for _ in range(2):
        later = restarted(stored)
        store(later.arena, stored, 1 << 20, 0)
    later.fetch("", tokens)
    assert states(later, tokens) == [(b"begin", 100), (b"end", 200)]


def test_what_memory_has_no_room_for_stays_on_disk(stored: Path) -> None:
    fd = arena.create(PAGE)
    prompts = PromptCache(Arena(fd, PAGE), "model", stored)
    os.close(fd)
    prompts.suit(SETTINGS, cuts=True)
    prompts.fetch("", [*prompt(1), *prompt(2)])
    assert states(prompts, [*prompt(1), *prompt(2)]) == [(b"begin", 100)]
    assert len([*stored.iterdir()]) == 2


@pytest.mark.parametrize("damage", ["torn", "tampered", "empty"])
def test_a_file_that_is_not_what_was_written_goes_with_one_line(
    stored: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in stored.iterdir():
        content = path.read_bytes()
        if b"begin" in content:
            broken = {"torn": content[:-2], "tampered": content[:-1] + b"N", "empty": b""}[damage]
            path.write_bytes(broken)
    prompts = restarted(stored)
    prompts.fetch("", [*prompt(1), *prompt(2)])
    assert states(prompts, [*prompt(1), *prompt(2)]) == []
    [line] = capfd.readouterr().err.splitlines()
    assert re.search(r"removed .*: (incomplete or damaged|checksum mismatch)$", line)
    assert len([*stored.iterdir()]) == 1


@pytest.mark.parametrize("other", [{"model": "other"}, {"settings": EngineSettings(kv_unified=False)}])
def test_files_of_another_model_or_setting_go(stored: Path, other: dict[str, Any]) -> None:
    restarted(stored, **other)
    assert [*stored.iterdir()] == []


def test_the_latest_prompts_are_written_as_far_as_there_is_room(fd: int, tmp_path: Path) -> None:
    prompts = cache(fd)
    for number in range(3):
        assert put(prompts, prompt(number), b"x" * 1000)
    (tmp_path / f"left{SUFFIX}.new").write_bytes(b"half")
    store(prompts.arena, tmp_path, 3000, 60)
    later = restarted(tmp_path)
    for number in range(3):
        later.fetch("", prompt(number))
    assert [bool(states(later, prompt(number))) for number in range(3)] == [False, True, True]
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(("room", "most_bytes", "read"), [(8, 2**20, 3), (2, 2**20, 2), (8, 3200, 2)])
def test_the_latest_prompts_are_read_first_into_free_room(
    fd: int, tmp_path: Path, room: int, most_bytes: int, read: int
) -> None:
    prompts = cache(fd)
    for number in range(3):
        assert put(prompts, prompt(number), b"x" * 1000)
    store(prompts.arena, tmp_path, 2**20, 60)
    small = arena.create(room * PAGE)
    later = PromptCache(Arena(small, room * PAGE), "model", tmp_path)
    os.close(small)
    later.suit(SETTINGS, cuts=True)
    later.fetch_latest(most_bytes)
    assert [bool(states(later, prompt(number))) for number in range(3)] == [read == 3, True, True]
    assert later.evictions == 0
