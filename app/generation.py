"""The engine's work for one chat call: one or several answers at once, merged in the order they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

from app.errors import RequestTimeoutError
from blend.engines import Engine
from blend.types import Delta, Request

_Event = tuple[int, Delta | BaseException | None]


class Generation:
    """``async with Generation(engine, requests, timeout_s) as g: async for index, delta in g``.

    Leaving the block closes every iterator of the engine, which aborts what still runs. The queue is short: a client
    that reads slowly slows its own generation, not the server's memory.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], timeout_s: float) -> None:
        self._engine, self._requests = engine, requests
        self._queue: asyncio.Queue[_Event] = asyncio.Queue(maxsize=64)
        self._tasks: list[asyncio.Task[None]] = []
        self._open = len(requests)
        self._timeout_s = timeout_s
        self._deadline = 0.0

    async def __aenter__(self) -> Generation:
        self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        self._tasks = [asyncio.create_task(self._run(i, r)) for i, r in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        while self._open:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, event = await self._queue.get()
            except TimeoutError:
                raise RequestTimeoutError(f"no complete answer within {self._timeout_s:g} s") from None
            if isinstance(event, BaseException):
                raise event
            if event is not None:
                return index, event
            self._open -= 1
        raise StopAsyncIteration

    async def _run(self, index: int, request: Request) -> None:
        try:
            async with aclosing(self._engine.generate(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    await self._queue.put((index, delta))
        except Exception as e:
            await self._queue.put((index, e))
        else:
            await self._queue.put((index, None))
