"""Who goes next: the reference engine's turns, alone and as its requests see them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from blend.engines.transformers.turns import Turns
from tests.blend.served import Served
from tests.blend.tiny import sentence


async def hold(turns: Turns, priority: int, name: str, order: list[str], until: asyncio.Event) -> None:
    async with turns.take(priority):
        order.append(name)
        await until.wait()


async def start(turns: Turns, *takers: tuple[str, int]) -> tuple[list[str], asyncio.Event, list[asyncio.Task[None]]]:
    """Takers that wait in this order behind whoever is first."""
    order: list[str] = []
    until = asyncio.Event()
    tasks = []
    for name, priority in takers:
        tasks.append(asyncio.create_task(hold(turns, priority, name, order, until)))
        await asyncio.sleep(0)
    return order, until, tasks


async def test_the_lowest_number_goes_first_and_equals_in_the_order_they_came() -> None:
    draw = random.Random(5)
    for _ in range(20):
        takers = [(f"t{i}", draw.randrange(4)) for i in range(12)]
        order, until, tasks = await start(Turns(1), ("first", 9), *takers)
        until.set()
        await asyncio.gather(*tasks)
        assert order == ["first", *(name for name, _ in sorted(takers, key=lambda t: t[1]))]


async def test_as_many_hold_a_place_as_there_are() -> None:
    turns = Turns(3)
    order, until, tasks = await start(turns, *((f"t{i}", 0) for i in range(5)))
    assert order == ["t0", "t1", "t2"]
    until.set()
    await asyncio.gather(*tasks)
    assert order == [f"t{i}" for i in range(5)]
    async with turns.take(), turns.take(), turns.take():
        late = asyncio.ensure_future(turns.take().__aenter__())
        await asyncio.sleep(0)
        assert not late.done()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late


async def test_whoever_gives_up_loses_no_place_for_the_others() -> None:
    turns = Turns(1)
    order, until, (first, waiting, last) = await start(turns, ("first", 0), ("waiting", 0), ("last", 0))
    waiting.cancel()
    until.set()
    await asyncio.gather(first, last)
    assert order == ["first", "last"]
    assert waiting.cancelled()
    # Given up in the moment in which the place is handed over.
    order, until, (first, waiting, last) = await start(turns, ("first", 0), ("waiting", 0), ("last", 0))
    first.cancel()
    await asyncio.sleep(0)
    waiting.cancel()
    until.set()
    await asyncio.wait_for(last, 5)
    assert order == ["first", "last"]
    assert waiting.cancelled()


async def test_a_failure_inside_gives_the_place_back() -> None:
    turns = Turns(1)
    with pytest.raises(RuntimeError):
        async with turns.take():
            raise RuntimeError
    async with asyncio.timeout(5), turns.take(7):
        pass


@pytest.mark.parametrize("places", ["one request at a time", "many at once"])
def test_the_engine_serves_lower_numbers_first(reference: Callable[..., Served], places: str) -> None:
    """Whether a late request waits for a place or for the worker, it ends before an earlier one of a higher number."""
    served = reference(kv_cache_gib=1e-6 if places.startswith("one") else None)
    prompt = served.prompt(served.document(*(sentence(i, 20) for i in range(4))))
    order: list[str] = []

    async def follow(name: str, priority: int, tokens: int) -> None:
        request = replace(served.request(prompt, tokens=tokens), priority=priority)
        async for _ in served.engine.generate(request):
            order.append(name)

    async def all_of_them() -> None:
        first = asyncio.ensure_future(follow("first", 0, 4))
        while not order:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.gather(first, follow("later", 20, 6), *(follow("chat", 0, 6) for _ in range(2)))

    served.loop.run(all_of_them())
    before = order[: order.index("later")]
    if places.startswith("one"):
        assert before == ["first"] * 4 + ["chat"] * 12
    else:  # it may use a gap in which nobody else asks for a token
        assert before.count("chat") >= 6
    assert order.count("later") == 6
