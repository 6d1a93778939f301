"""A whole service in a temporary folder: trivial engine, memory store, hash embedder; no model, no network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.server import create_app
from app.service import Service
from app.settings import Settings, load_settings
from app.trivial import TrivialEngine
from retriever.embed import HashEmbedder
from store.base import KVStore
from store.memory import MemoryStore
from tests.certificates import passing

DOCUMENTS = [
    {
        "id": "doc-mara",
        "title": "Mara Venn",
        "text": "Mara Venn was a painter. She grew up on a farm.\n\nShe was born in Eastford. She kept two grey cats.",
    },
    {
        "id": "doc-otto",
        "title": "Otto Brandt",
        "text": "Otto Brandt was a sailor. He spoke four languages.\n\n"
        "He was born in Westhaven. He kept an old parrot.",
    },
]
CHUNK_TOKENS = 60  # bytes here: one paragraph of DOCUMENTS each


class Kit:
    """One running service and a client for it."""

    def __init__(self, service: Service, engine: TrivialEngine, client: httpx.AsyncClient) -> None:
        self.service, self.engine, self.client = service, engine, client

    async def chat(self, **body: Any) -> httpx.Response:
        body.setdefault("model", "trivial:default")
        body.setdefault("messages", [{"role": "user", "content": "Where was Mara Venn born?"}])
        return await self.client.post("/v1/chat/completions", json=body)

    async def ingest(self, documents: list[dict[str, Any]] | None = None, **body: Any) -> dict[str, Any]:
        body["documents"] = DOCUMENTS if documents is None else documents
        answer = await self.client.post("/ingest?wait=true", json=body)
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job


OpenKit = Callable[..., Awaitable[Kit]]


@asynccontextmanager
async def _kit(
    folder: Path, store: KVStore | None, delay_s: float, faithful_ratio: float, certified: bool,
    settings: dict[str, Any],
) -> AsyncIterator[Kit]:  # fmt: skip
    store = store if store is not None else MemoryStore()
    engine = TrivialEngine(store, delay_s=delay_s, faithful_ratio=faithful_ratio)
    engine.certificate = passing(engine.info) if certified else None
    service = await Service.open(
        make_settings(folder, **settings), engine=engine, tokenizer=engine.tokenizer, embedder=HashEmbedder()
    )
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Kit(service, engine, client)
    finally:
        await service.close()


def make_settings(folder: Path, **settings: Any) -> Settings:
    # The trivial engine knows its KV to the bit, and the memory store it mostly has keeps it so.
    given = {
        "data_dir": folder, "model": "trivial", "chunk_tokens": CHUNK_TOKENS, "guard": {"share": 0},
        "store": {"codec": "raw"},
    }  # fmt: skip
    return load_settings(**(given | settings))


@pytest.fixture
async def open_kit(tmp_path: Path) -> AsyncIterator[OpenKit]:
    """Opens services on the test's folder: ``await open_kit(store=..., delay_s=..., strict=True, ...)``."""
    async with AsyncExitStack() as stack:

        async def open_one(
            store: KVStore | None = None,
            delay_s: float = 0.0,
            faithful_ratio: float = 0.0,
            certified: bool = True,
            **settings: Any,
        ) -> Kit:
            return await stack.enter_async_context(_kit(tmp_path, store, delay_s, faithful_ratio, certified, settings))

        yield open_one


@pytest.fixture
async def kit(open_kit: OpenKit) -> Kit:
    """A service that has ``DOCUMENTS`` precomputed."""
    kit = await open_kit()
    assert (await kit.ingest())["state"] == "precomputed"
    return kit


@pytest.fixture
async def empty_kit(open_kit: OpenKit) -> Kit:
    """A service without documents."""
    return await open_kit()
