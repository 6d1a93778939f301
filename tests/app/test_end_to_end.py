"""The whole service on the demo model, on each real engine: a newcomer's path, and what every answer must hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from app.demo.load import for_demo, load_demo
from app.demo.world import EVAL_SEEDS, demo_collection, make_example, questions_of
from app.server import create_app
from app.service import Service
from app.settings import load_settings

MODEL = Path(__file__).parents[2] / "models" / "demo"
LOOP = pytest.mark.asyncio(loop_scope="module")
ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]
pytestmark = [LOOP, pytest.mark.slow]


class Server:
    """One service behind ASGI, with the demo collection ingested and precomputed."""

    def __init__(self, service: Service, client: httpx.AsyncClient) -> None:
        self.service, self.client = service, client
        self.openai = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client)

    async def chat(self, question: str, **rag: Any) -> dict[str, Any]:
        body = {
            "model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": 6,
            "logprobs": True, "top_logprobs": 5, "rag": {"vector_store_ids": ["default"]} | rag,
        }  # fmt: skip
        answer = await self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest_asyncio.fixture(scope="module", params=ENGINES, loop_scope="module")
async def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp(f"e2e-{request.param}")
    settings = for_demo(
        load_settings(
            data_dir=folder, model=str(MODEL), engine=request.param, dtype="float32", max_context=4096, kv_cache_gib=1.0
        )
    )
    service = await Service.open(settings)
    try:
        await load_demo(service)
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            yield Server(service, client)
    finally:
        await service.close()


def tokens(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(t["token"], t["logprob"]) for t in answer["choices"][0]["logprobs"]["content"]]


def questions() -> list[tuple[str, str]]:
    """Question and answer of facts all over the demo collection: every fifth, by name and by pronoun."""
    asked = questions_of(demo_collection(), random.Random(1), wordings=1)
    return [(q.text, q.answer) for q in asked[::5]]


async def test_the_demo_collection_is_answered_with_citations_and_an_account_of_every_row(server: Server) -> None:
    right = 0
    for question, value in questions():
        answer = await server.chat(question)
        text, cache = answer["choices"][0]["message"]["content"], answer["rag"]["cache"]
        assert cache["mode"] == "blend"
        assert cache["reused"] + cache["recomputed"] + cache["missing"] == cache["tokens"]
        assert cache["reused"] > 0
        assert cache["missing"] == 0
        assert cache["recomputed"] <= 0.1 * cache["tokens"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cache["reused"]
        if value in text:
            right += 1
            notes = answer["choices"][0]["message"]["annotations"]
            assert any(value in n["quote"] for n in notes), f"{question} -> {text} cites {notes}"
    assert right >= 0.75 * len(questions())


async def test_recomputing_everything_is_full_prefill_through_the_api(server: Server) -> None:
    for question, _ in questions()[:4]:
        full = await server.chat(question, blend={"mode": "full"})
        exact = await server.chat(question, blend={"mode": "blend", "recompute_ratio": 1.0})
        assert exact["rag"]["cache"]["recomputed"] == exact["rag"]["cache"]["tokens"]
        assert [t for t, _ in tokens(exact)] == [t for t, _ in tokens(full)]
        for (_, a), (_, b) in zip(tokens(exact), tokens(full), strict=True):
            assert a == pytest.approx(b, abs=2e-3)


async def test_recomputing_everything_is_full_prefill_in_any_order_of_documents(server: Server) -> None:
    """Documents that come with the request keep the client's order."""
    example = make_example(EVAL_SEEDS.start + 77, documents=3, task="cross-chunk")
    documents = [{"id": d.id, "title": d.title, "text": d.chunks[0]} for d in example.documents]
    for order in itertools.permutations(documents):
        given: dict[str, Any] = {"vector_store_ids": [], "documents": list(order)}
        full = await server.chat(example.question.text, blend={"mode": "full"}, **given)
        exact = await server.chat(example.question.text, blend={"mode": "blend", "recompute_ratio": 1.0}, **given)
        assert [t for t, _ in tokens(exact)] == [t for t, _ in tokens(full)]
        for (_, a), (_, b) in zip(tokens(exact), tokens(full), strict=True):
            assert a == pytest.approx(b, abs=2e-3)


async def test_the_openai_client_streams_the_same_answer(server: Server) -> None:
    question, _ = questions()[0]
    whole = await server.chat(question)
    stream = await server.openai.chat.completions.create(
        model="demo:default", messages=[{"role": "user", "content": question}], stream=True, max_tokens=6
    )
    parts = [chunk async for chunk in stream]
    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert parts[0].model_extra is not None
    assert parts[0].model_extra["rag"]["cache"]["reused"] == whole["rag"]["cache"]["reused"]
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


async def test_a_context_too_long_is_refused_and_the_next_request_is_served(server: Server) -> None:
    long = await server.client.post(
        "/v1/chat/completions",
        json={"model": "demo", "messages": [{"role": "user", "content": "word " * 5000}], "max_tokens": 6},
    )
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert (await server.chat(questions()[0][0]))["choices"]


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_full_store_costs_speed_and_never_an_answer(engine: str, tmp_path: Path) -> None:
    """The store holds 4 MiB, the demo collection needs more."""
    settings = for_demo(
        load_settings(
            data_dir=tmp_path, model=str(MODEL), engine=engine, max_context=2048, kv_cache_gib=1.0,
            store={"max_gib": 4 / 1024, "codec": "raw"},
        )
    )  # fmt: skip
    service = await Service.open(settings)
    try:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            documents = [{"id": d.id, "title": d.title, "text": d.text} for d in demo_collection()]
            job = (await client.post("/ingest?wait=true", json={"documents": documents})).json()
            assert job["state"] == "searchable", job
            assert "full" in job["last_error"]["message"]
            missing = 0
            for question, _ in questions()[-6:]:
                body = {
                    "model": "demo:default", "messages": [{"role": "user", "content": question}], "max_tokens": 4,
                    "rag": {"blend": {"mode": "blend"}},
                }  # fmt: skip
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                missing += answer.json()["rag"]["cache"]["missing"]
            assert missing > 0, "the store was large enough after all; this test shows nothing"
            assert (await client.get("/readyz")).status_code == 200
    finally:
        await service.close()
