"""The prompts that a model is evaluated on: those of a suite, or of a workload."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from llamaherd_loadtest.rng import fresh_seed
from llamaherd_loadtest.workload import Calibration, Prompts, Workload, load_workload, workload_names

DEFAULT = "default"
_MAX_PROMPTS = 24  # of a workload


class Chat(Struct, frozen=True, forbid_unknown_fields=True):
    """One question, in OpenAI's form."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []


class _Suite(Struct, forbid_unknown_fields=True):
    """`checks` are chats whose answer has a required form: a call of one of their tools, otherwise JSON."""

    prompts: list[str | Chat] = []
    checks: list[str | Chat] = []


def load_suite(name: str, calibration: Calibration) -> Iterator[Chat]:
    """Yield the chats of a suite file, of the bundled suite, or of a workload.

    Raises ValueError for a file that is neither.
    """
    if name in workload_names():
        yield from of_workload(load_workload(name), calibration)
        return
    if name != DEFAULT and Path(name).suffix not in (".yml", ".yaml"):
        known = ", ".join([DEFAULT, *workload_names()])
        raise ValueError(f"unknown suite {name!r}; available: {known}, or a .yml file")
    try:
        prompts = _read(name).prompts
    except msgspec.MsgspecError as error:
        try:
            workload = load_workload(name)
        except ValueError:
            raise ValueError(f"suite {name}: {error}") from error
        yield from of_workload(workload, calibration)
        return
    yield from map(_chat, prompts)


def load_checks(name: str) -> list[Chat]:
    """Return the checks of a suite file or of the bundled suite. Raises ValueError if it has none."""
    try:
        checks = [] if name in workload_names() else _read(name).checks
    except msgspec.MsgspecError as error:
        raise ValueError(f"suite {name}: {error}") from error
    if not checks:
        raise ValueError(f"limit valid needs a suite with checks, but {name} has none: use {DEFAULT}, or add checks")
    return [*map(_chat, checks)]


def _read(name: str) -> _Suite:
    bundled = resources.files("llamaherd_loadtest.quality") / "suite.yml"
    try:
        return msgspec.yaml.decode(bundled.read_bytes() if name == DEFAULT else Path(name).read_bytes(), type=_Suite)
    except OSError as error:
        raise ValueError(f"suite {name} cannot be read: {error.strerror}") from error


def _chat(one: str | Chat) -> Chat:
    return one if isinstance(one, Chat) else Chat([{"role": "user", "content": one}])


def of_workload(workload: Workload, calibration: Calibration) -> Iterator[Chat]:
    """Yield the first requests of the workload, with fresh prompts."""
    prompts = Prompts(workload, model="", seed=fresh_seed(), calibration=calibration)
    for index in range(_MAX_PROMPTS):
        body = msgspec.json.decode(prompts.request(index))
        yield Chat(body["messages"], body.get("tools", []))
