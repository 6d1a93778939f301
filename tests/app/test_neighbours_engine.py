"""The compile context ``neighbours`` end to end, on a real (tiny) model: the stored KV is what that model computes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.precompute import precompute
from app.server import create_app
from app.service import Service
from app.settings import load_settings
from retriever.embed import HashEmbedder
from retriever.types import DocumentInfo
from store import Miss, Want
from tests.blend.tiny import Truth, sentence, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("neighbours") / "tiny", "llama")


@pytest.fixture
async def service(model: Path, tmp_path: Path) -> AsyncIterator[Service]:
    settings = load_settings(
        data_dir=tmp_path, model=str(model), engine="transformers", dtype="float32", chunk_tokens=32,
        compile={"context": "neighbours", "neighbours": 2}, guard={"share": 0},
        store={"codec": "raw"},  # compared to the bit
    )  # fmt: skip
    service = await Service.open(settings, embedder=HashEmbedder())
    try:
        yield service
    finally:
        await service.close()


async def ask(service: Service, mode: str, ratio: float = 0.0) -> tuple[str, dict[str, int]]:
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        body = {
            "model": f"{service.settings.served_name}:default", "max_tokens": 8,
            "messages": [{"role": "user", "content": sentence(3)}],
            "rag": {"blend": {"mode": mode, "recompute_ratio": ratio}},
        }  # fmt: skip
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["choices"][0]["message"]["content"], found["rag"]["cache"]


def document(n: int, text: int | None = None) -> dict[str, Any]:
    text = n if text is None else text
    return {"id": f"d{n}", "title": "t", "chunks": [sentence(text), sentence(text + 100)]}


def differences(service: Service, truth: Truth, documents: list[DocumentInfo]) -> list[float]:
    """Of each stored chunk, from the rows that plain transformers computes behind the same texts."""
    found = []
    layout = service.layout
    for d in documents:
        hood = service.retriever.neighbourhood(d.id, d.collection)
        for own, near, ref in zip(hood.chunks, hood.neighbours, service.references.of(d), strict=True):
            assert len(near) == 2
            before = list(layout.prefix) + [t for n in near[::-1] for t in layout.chunk_ids(n.text)]
            k, v = truth.kv(before + list(ref.token_ids))
            info = service.engine.info
            wanted = Want(ref.key, info.layout, ref.token_ids, service.keys.source(own.id), info.tokenizer)
            stored = service.engine.store.get(wanted)
            assert not isinstance(stored, Miss), (own.id, stored)
            assert stored.k_position == len(before)
            found.append(max(float((stored.k - k[:, len(before) :]).abs().max()),
                             float((stored.v - v[:, len(before) :]).abs().max())))  # fmt: skip
    return found


async def test_the_stored_kv_is_what_the_model_computes_behind_the_neighbours(service: Service, model: Path) -> None:
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        given = {"documents": [document(n) for n in range(5)]}
        assert (await client.post("/ingest?wait=true", json=given)).json()["state"] == "precomputed"
        truth, documents = Truth(model), service.retriever.documents()
        found = differences(service, truth, documents)
        assert len(found) == 10
        assert max(found) < 1e-4

        full, _ = await ask(service, "full")
        exact, cache = await ask(service, "blend", 1.0)
        assert exact == full
        assert cache["missing"] == 0
        _, cache = await ask(service, "reuse")
        assert cache["reused"] == cache["tokens"]

        edited = {"documents": [document(2, text=7)]}
        job = (await client.post("/ingest?wait=true", json=edited)).json()
        assert job["state"] == "precomputed"
        assert job["cascaded"] > 0
    assert max(differences(service, truth, service.retriever.documents())) < 1e-4
    assert service.engine.store.stats().entries == 11, "ten chunks and the prefix; the old KV is gone"
    _, cache = await ask(service, "reuse")
    assert cache["reused"] == cache["tokens"]
    assert (await precompute(service)).done == 0


def test_the_truth_would_notice_other_neighbours(model: Path) -> None:
    """What the test above measures is not blind: the same chunk behind another text has other KV."""
    truth = Truth(model)
    (k, v), (other_k, other_v) = (truth.kv([*near, 30, 31, 32]) for near in ([5, 6, 7, 8], [5, 9, 7, 8]))
    assert torch.allclose(k[0, 4:], other_k[0, 4:]), "layer 0 sees no context"
    assert (k[1:, 4:] - other_k[1:, 4:]).abs().max() > 0.1
    assert (v[1:, 4:] - other_v[1:, 4:]).abs().max() > 0.1
