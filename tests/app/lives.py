"""A life of a whole service that ingests until it is killed, and says what it has acknowledged (see ``tests.nursery``).

It first checks all that its forerunners have acknowledged and says ``checked``; then ``begin NAME VERSION`` (version 0:
gone) before it changes a document, and ``end`` when that was acknowledged: the job is searchable, the delete returned.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from app.precompute import precompute
from app.server import create_app
from app.service import Service
from app.trivial import TrivialEngine
from retriever.embed import HashEmbedder
from retriever.errors import UnknownDocumentError
from store import StoreConfig, open_store
from tests.app.conftest import make_settings
from tests.nursery import Say, raise_lives

NAMES = tuple(f"doc-{n}" for n in range(12))
CHUNK_TOKENS = 3000  # bytes here, 16 of KV each: 48 KiB, so that whole chunks lie in segments and rests in the index
SEARCHABLE = ("searchable", "precomputing", "precomputed")
ALLOWED = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Life:
    """``allowed``: the versions in which each document may be now; ``finish``: see that all work gets done, and end."""

    folder: str
    seed: int
    allowed: ALLOWED = field(default_factory=dict)
    finish: bool = False


def text_of(name: str, version: int) -> str:
    """Of one to four chunks, each of which says whose it is."""
    rng = random.Random(f"{name} {version}")
    first = f"This is {name} in version {version}."
    paragraphs = [f"{first} It says {rng.randbytes(4).hex()}."]
    for n in range(rng.choice((0, 3, 30, 80))):
        paragraphs.append(f"Paragraph {n} of {name}: {rng.randbytes(50).hex()}.")
    return "\n\n".join(paragraphs)


def live(fields: dict[str, Any], say: Say) -> None:
    asyncio.run(_live(Life(**fields), say))


async def _live(life: Life, say: Say) -> None:
    folder = Path(life.folder)
    store = open_store(StoreConfig(path=folder / "kv", ram_bytes=1 << 20, segment_bytes=1 << 20))
    engine = TrivialEngine(store)
    service = await Service.open(
        make_settings(folder, chunk_tokens=CHUNK_TOKENS, blend={"mode": "blend"}),
        engine=engine,
        tokenizer=engine.tokenizer,
        embedder=HashEmbedder(),
    )
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        # At once what is certain; what a job that was cut short may change under our eyes, when it has ended.
        await _check(service, client, {name: versions for name, versions in life.allowed.items() if len(versions) == 1})
        say("checked")
        assert service.jobs is not None
        for job in service.jobs.latest(100):
            await service.jobs.wait(job)
        await _check(service, client, life.allowed)
        if life.finish:
            await _finished(service)
            await service.close()
            say("finished")
            return
        await _work(service, client, random.Random(life.seed), life, say)


async def _work(service: Service, client: httpx.AsyncClient, rng: random.Random, life: Life, say: Say) -> None:
    newest = {name: max(life.allowed.get(name, (0,))) for name in NAMES}
    highest = max(newest.values(), default=0)
    while True:
        name = rng.choice(NAMES)
        if newest[name] and rng.random() < 0.25:
            say(f"begin {name} 0")
            try:
                await asyncio.to_thread(service.retriever.delete_document, name)
            except UnknownDocumentError:  # it may be gone: a delete was cut short
                pass
            newest[name] = 0
        else:
            highest += 1
            newest[name] = highest
            say(f"begin {name} {highest}")
            body = {"documents": [{"id": name, "title": name, "text": text_of(name, highest)}]}
            answer = await client.post("/ingest", json=body)
            assert answer.status_code == 202, answer.text
            job = answer.json()
            while job["state"] not in SEARCHABLE:
                assert job["state"] != "failed", job
                await asyncio.sleep(0.001)
                job = (await client.get(f"/jobs/{job['id']}")).json()
        say("end")
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.02)  # or the next comes while this one is still precomputed


async def _check(service: Service, client: httpx.AsyncClient, allowed: ALLOWED) -> None:
    """Every document is in a version it may be in, whole, found and answered from."""
    for name, versions in allowed.items():
        version = _version(service, name)
        assert version in versions, f"{name} is in version {version}; it may be in {versions}"
        if not version:
            continue
        text = text_of(name, version)
        assert service.retriever.document_text(name) == text, f"the text of {name} is not that of version {version}"
        chunks = service.retriever.chunks(name)
        pieces = "".join(text[c.start : c.stop] for c in chunks)
        assert "".join(pieces.split()) == "".join(text.split()), f"{name} has lost a chunk"
        word = text.split("It says ")[1].split(".")[0]
        hits = service.retriever.search(["default"], word, k=1, mode="text")
        assert [h.chunk.document_id for h in hits] == [name], f"{name} is not found"
        dense = service.retriever.search(["default"], chunks[-1].text, k=1, mode="dense")
        assert [h.chunk.id for h in dense] == [chunks[-1].id], f"the vectors of {name} are lost"
        await _ask(client, name, version)
    assert service.engine.store.verify().bad == ()


async def _ask(client: httpx.AsyncClient, name: str, version: int) -> None:
    """Answered from its KV (the engine compares every value) or, if that is not there, without it."""
    body = {
        "model": "trivial:default",
        "messages": [{"role": "user", "content": f"What does {name} say?"}],
        "rag": {"filters": {"type": "eq", "key": "document_id", "value": name}, "blend": {"mode": "blend"}},
    }
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["choices"][0]["message"]["content"] == f"This is {name} in version {version}.", found
    cache = found["rag"]["cache"]
    assert cache["reused"] + cache["recomputed"] + cache["missing"] == cache["tokens"]
    reasons = {chunk.get("miss_reason") for chunk in cache["chunks"]}
    assert reasons <= {None, "never_precomputed"}, reasons


def _version(service: Service, name: str) -> int:
    """0: there is none."""
    try:
        service.retriever.document(name)
    except UnknownDocumentError:
        return 0
    return int(service.retriever.document_text(name).split(" in version ")[1].split(".")[0])


async def _finished(service: Service) -> None:
    """What was cut short has been done: all KV is there, and none but it."""
    report = await precompute(service)
    assert report.failed == 0, report
    again = await precompute(service)
    assert (again.done, again.failed) == (0, 0), again
    await service.precomputer.sweep()
    names = {service.keys.source(chunk.id) for d in service.retriever.documents() for chunk in
             service.retriever.chunks(d.id)} | {service.keys.prefix_ref().source}  # fmt: skip
    strays = [entry.key.hex for entry in service.engine.store.entries() if entry.source not in names]
    assert not strays, f"KV of documents that are gone: {strays}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise_lives(live)
