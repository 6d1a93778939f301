"""A service whose every answer is compared, and what the guard's tests ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from blend.types import Delta, Request

from .conftest import Kit, OpenKit

GUARD = {"share": 1, "least": 2, "window": 4, "ladder": [0.3]}
UNFAITHFUL = 2.0  # no blend recomputes that much


async def guarded_kit(open_kit: OpenKit, faithful_ratio: float, **settings: Any) -> Kit:
    """A service that compares every answer of ``DOCUMENTS``."""
    guard = GUARD | settings.pop("guard", {})
    kit = await open_kit(faithful_ratio=faithful_ratio, guard=guard, **settings)
    assert (await kit.ingest())["state"] == "precomputed"
    return kit


async def ask(kit: Kit, **body: Any) -> tuple[str, dict[str, Any]]:
    """The answer and ``rag.cache`` of one request, once the guard has dealt with it."""
    answer = await kit.chat(**body)
    assert answer.status_code == 200, answer.text
    await kit.service.guard.settled()
    found = answer.json()
    return found["choices"][0]["message"]["content"], found["rag"]["cache"]


def count(kit: Kit, result: str, chosen_by: str = "server") -> float:
    labels = {"result": result, "chosen_by": chosen_by}
    value = kit.service.metrics.registry.get_sample_value("ragblend_guard_comparisons_total", labels)
    assert value is not None
    return value


def counts(kit: Kit) -> dict[str, float]:
    """All results that were counted, whoever chose."""
    found = {r: count(kit, r) + count(kit, r, "client") for r in ("agree", "differ", "failed", "dropped")}
    return {result: n for result, n in found.items() if n}


def gauge(kit: Kit, name: str, collection: str = "default") -> float | None:
    return kit.service.metrics.registry.get_sample_value(f"ragblend_guard_{name}", {"collection": collection})


class Spy:
    """Keeps every request that reaches the engine; ``guard`` may do something before the guard's own are answered."""

    def __init__(self, kit: Kit, monkeypatch: pytest.MonkeyPatch, guard: Callable[[], Any] | None = None) -> None:
        self.requests: list[Request] = []
        self._generate, self._guard = kit.engine.generate, guard
        monkeypatch.setattr(kit.engine, "generate", self)

    async def __call__(self, request: Request) -> AsyncIterator[Delta]:
        self.requests.append(request)
        if request.id.endswith("-guard") and self._guard is not None:
            await self._guard()
        async with aclosing(self._generate(request)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                yield delta

    @property
    def own(self) -> list[Request]:
        return [r for r in self.requests if r.id.endswith("-guard")]
