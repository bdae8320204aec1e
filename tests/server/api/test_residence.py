"""Models on demand: which is loaded when, who waits, and who is never cut off."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from llamaherd_server.api import answer
from llamaherd_server.engine import residence, switch
from llamaherd_server.engine.residence import OnDemandModel, Residence
from llamaherd_server.wire.errors import EngineError

from .conftest import Serve
from .double import Double


@dataclass
class House:
    """Guests whose loads and unloads are written down; each takes `takes_s`."""

    most: int = 1
    takes_s: float = 0.0
    told: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.residence = Residence(self.most)
        self.guests: dict[str, OnDemandModel] = {}

    def guest(self, name: str, idle_s: float = 600) -> OnDemandModel:
        async def load() -> None:
            await asyncio.sleep(self.takes_s)
            if name in self.broken:
                raise EngineError("does_not_fit", "too large")
            self.told.append(f"+{name}")

        async def unload() -> None:
            await asyncio.sleep(0)
            self.told.append(f"-{name}")

        guest = self.guests[name] = OnDemandModel(name, idle_s, load, unload)
        self.residence.add(guest)
        return guest

    async def use(self, guest: OnDemandModel, for_s: float = 0.0) -> None:
        async with self.residence.held(guest):
            assert guest.loaded
            await asyncio.sleep(for_s)
            assert guest.loaded


async def test_the_least_recently_used_gives_way() -> None:
    house = House(most=2)
    a, b, c = (house.guest(name) for name in "abc")
    for guest in (a, b, a, c, b):
        await house.use(guest)
    assert house.told == ["+a", "+b", "-b", "+c", "-a", "+b"]


async def test_requests_that_come_together_load_it_once() -> None:
    house = House(takes_s=0.01)
    a = house.guest("a")
    await asyncio.gather(*(house.use(a) for _ in range(5)))
    assert house.told == ["+a"]


async def test_one_at_work_finishes_what_it_has_and_takes_nothing_new() -> None:
    house = House()
    a, b = house.guest("a"), house.guest("b")
    order: list[str] = []

    async def use(name: str, guest: OnDemandModel, for_s: float) -> None:
        await house.use(guest, for_s)
        order.append(name)

    first = asyncio.create_task(use("first", a, 0.1))
    await asyncio.sleep(0.02)
    other = asyncio.create_task(use("other", b, 0.0))
    await asyncio.sleep(0.02)
    late = asyncio.create_task(use("late", a, 0.0))
    await asyncio.gather(first, other, late)
    assert order == ["first", "other", "late"]
    assert house.told == ["+a", "-a", "+b", "-b", "+a"]


async def test_models_asked_for_by_turns_are_at_work_for_as_long_as_they_load() -> None:
    house = House(takes_s=0.1)
    guests = [house.guest("a"), house.guest("b")]
    until = asyncio.get_running_loop().time() + 2

    async def asks(guest: OnDemandModel) -> None:
        while asyncio.get_running_loop().time() < until:
            await house.use(guest, 0.01)

    await asyncio.gather(*map(asks, guests * 2))
    assert min(guest.loads for guest in guests) >= 2
    assert sum(guest.loads for guest in guests) <= 2 / 0.2 + 2


async def test_a_request_that_holds_it_may_use_it_while_it_is_to_leave() -> None:
    house = House()
    a, b = house.guest("a"), house.guest("b")

    async def long() -> None:
        async with house.residence.held(a):
            await asyncio.sleep(0.1)
            assert a.draining
            await house.use(a)

    await asyncio.wait_for(asyncio.gather(long(), house.use(b)), 5)
    assert house.told == ["+a", "-a", "+b"]


async def test_who_gives_up_while_it_loads_holds_nothing() -> None:
    house = House(takes_s=0.05)
    a, b = house.guest("a"), house.guest("b")
    gone = asyncio.create_task(house.use(a))
    await asyncio.sleep(0.01)
    gone.cancel()
    await house.use(b)
    assert house.told == ["+a", "-a", "+b"]
    assert not a.users
    assert not a.waiting


async def test_one_that_cannot_be_loaded_is_refused_for_a_while_then_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residence, "RETRY_S", 0.1)
    house = House(broken={"a"})
    a, b = house.guest("a"), house.guest("b")
    for _ in range(3):
        with pytest.raises(EngineError, match="model 'a' could not be loaded: too large"):
            await house.use(a)
    await house.use(b)
    house.broken.clear()
    await asyncio.sleep(0.1)
    await house.use(a)
    assert house.told == ["+b", "-b", "+a"]


async def test_an_idle_one_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residence, "_TICK_S", 0.01)
    house = House(most=2)
    a, b = house.guest("a", idle_s=0.1), house.guest("b", idle_s=0.1)
    running = asyncio.create_task(house.residence.run())
    await house.use(a)
    await house.use(b, 0.5)
    assert house.told == ["+a", "+b", "-a"]
    running.cancel()


class Slow(Double):
    """An engine that takes a moment to load, and to end."""

    async def start(self) -> None:
        self.state = "ready"
        await asyncio.sleep(0.3)

    async def stop(self) -> None:
        self.state = "stopped"
        await asyncio.sleep(0.3)


@pytest.fixture
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(_: object) -> None:
        return None

    monkeypatch.setattr(switch, "read_model_info", unknown)


@pytest.mark.usefixtures("_unknown")
async def test_who_asks_while_it_goes_waits_until_it_is_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residence, "_TICK_S", 0.01)
    double = Slow(tokens=2)
    async with serve(double, entry={"residence": "on_demand", "idle_s": 0.1}) as served:
        await served.chat()
        while double.state != "stopped":
            await asyncio.sleep(0.01)
        assert (await served.http.get("/readyz")).status_code == 200
        reply = await served.chat()
        assert reply.status_code == 200, reply.text
        assert served.state.engine.status().loads == 2


@pytest.mark.usefixtures("_unknown")
async def test_a_stream_that_waits_for_its_model_is_kept_alive(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_S", 0.05)
    async with serve(Slow(tokens=2), entry={"residence": "on_demand"}) as served:
        assert served.state.engine.status().state == "unloaded"
        reply = await served.http.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert served.state.engine.status().state == "ready"
    assert reply.text.startswith(": keep-alive\n\n")
    assert reply.text.endswith("data: [DONE]\n\n")
