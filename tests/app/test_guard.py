"""The guard at work: answers that differ from full prefill's are noticed, and then no longer served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.server import create_app
from app.service import Service
from retriever.embed import HashEmbedder
from tests.blend.tiny import sentence, write_model
from tests.certificates import passing

from .conftest import OpenKit, make_settings
from .guarded import GUARD, UNFAITHFUL, ask, count, counts, gauge, guarded_kit
from .test_chat import ANSWER


async def test_answers_that_differ_raise_the_ratio_step_by_step_and_then_are_prefilled_in_full(
    open_kit: OpenKit, caplog: pytest.LogCaptureFixture
) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL)
    seen = [await ask(kit) for _ in range(6)]
    assert [text for text, _ in seen] == [ANSWER[::-1]] * 4 + [ANSWER] * 2
    assert [cache["mode"] for _, cache in seen] == ["blend"] * 4 + ["full"] * 2
    shares = [cache["recomputed"] / cache["tokens"] for _, cache in seen[:4]]
    assert shares == pytest.approx([0.1, 0.1, 0.3, 0.3], abs=0.02)
    assert [cache["why"] for _, cache in seen] == [
        *[None] * 2,
        *["guard: agreement 0.00 below 0.9, ratio raised to 0.3"] * 2,
        *["guard: agreement 0.00 below 0.9, full prefill"] * 2,
    ]
    assert counts(kit) == {"differ": 4}  # a full prefill is its own truth
    assert [gauge(kit, name) for name in ("agreement", "level")] == [None, 1.0]
    said = [r.message for r in caplog.records if r.name.startswith("app.guard")]
    assert len(said) == 2
    assert "ratio raised to 0.3" in said[0]
    assert "full prefill" in said[1]
    assert not [line for line in said if "Mara" in line or "born" in line]


async def test_it_stops_at_the_ratio_at_which_answers_agree(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, 0.2)
    for _ in range(12):
        text, cache = await ask(kit)
    assert (text, cache["mode"]) == (ANSWER, "blend")
    assert "ratio raised to 0.3" in cache["why"]
    assert counts(kit) == {"differ": 2, "agree": 10}
    assert (gauge(kit, "agreement"), gauge(kit, "kl"), gauge(kit, "level")) == (1.0, 0.0, 0.3)


async def test_good_answers_change_nothing(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, 0.0)
    for _ in range(6):
        _, cache = await ask(kit)
        assert cache["why"] is None
    assert counts(kit) == {"agree": 6}
    assert gauge(kit, "level") == 0.0


async def test_what_a_client_chose_is_left_alone_and_moves_no_level(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL)
    for chosen in ({"mode": "blend"}, {"mode": "reuse"}, {"recompute_ratio": 0.0}, {"selector": "heads"}):
        for _ in range(3):
            _, cache = await ask(kit, rag={"blend": chosen})
            assert cache["why"] is None
    assert (count(kit, "differ", "client"), count(kit, "differ")) == (12, 0)
    for _ in range(2):
        await ask(kit)
    assert gauge(kit, "level") == 0.3
    _, explicit = await ask(kit, rag={"blend": {"mode": "blend", "recompute_ratio": 0.0}})
    assert (explicit["why"], explicit["recomputed"]) == (None, 0)
    _, below = await ask(kit, rag={"blend": {"recompute_ratio": 0.2}})
    assert "ratio raised to 0.3" in below["why"]
    _, above = await ask(kit, rag={"blend": {"recompute_ratio": 0.6}})
    assert above["why"] is None
    assert above["recomputed"] / above["tokens"] == pytest.approx(0.6, abs=0.02)


async def test_collections_are_judged_apart_and_a_prompt_of_several_by_the_worst(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL, guard={"ladder": []})
    await kit.ingest([{"id": "other", "text": "Mara Venn also wrote books about the sea."}], collection="other")
    for _ in range(2):
        await ask(kit)
    assert (await ask(kit))[1]["mode"] == "full"
    both = {"vector_store_ids": ["other", "default"]}
    assert (await ask(kit, model="trivial", rag=both))[1]["mode"] == "full"
    assert (await ask(kit, model="trivial:other", rag={"blend": {"mode": "auto"}}))[1]["why"] is None


async def test_after_a_while_less_is_tried_again(open_kit: OpenKit) -> None:
    kit = await guarded_kit(open_kit, UNFAITHFUL, guard={"ladder": [], "recover_after_s": 0.2})
    for _ in range(2):
        await ask(kit)
    assert (await ask(kit))[1]["mode"] == "full"
    kit.engine.faithful_ratio = 0.0  # whatever was wrong is repaired
    await asyncio.sleep(0.2)
    for _ in range(5):
        assert (await ask(kit))[1]["mode"] == "blend"
    assert gauge(kit, "level") == 0.0
    switches = {d: {"collection": "default", "direction": d} for d in ("up", "down")}
    registry = kit.service.metrics.registry
    assert all(registry.get_sample_value("ragblend_guard_switches_total", s) == 1 for s in switches.values())


async def test_a_server_that_compares_nothing_tries_nothing(open_kit: OpenKit) -> None:
    first = await guarded_kit(open_kit, UNFAITHFUL, guard={"ladder": [], "recover_after_s": 0.05})
    for _ in range(2):
        await ask(first)
    await first.service.close()
    kit = await open_kit(guard=GUARD | {"share": 0, "recover_after_s": 0.05})
    await kit.ingest()
    await asyncio.sleep(0.1)
    assert (await ask(kit))[1]["why"] == "guard: agreement 0.00 below 0.9, full prefill"


async def test_a_real_model_whose_reuse_is_wrong_ends_in_full_prefill(tmp_path: Path) -> None:
    """Random weights, chunks compiled alone, nothing recomputed: greedy answers differ from full prefill's."""
    settings = make_settings(
        tmp_path, model=str(write_model(tmp_path / "model", "llama")), engine="transformers", dtype="float32",
        device="cpu", compile={"context": "prefix"}, blend={"recompute_ratio": 0.0}, guard=GUARD | {"ladder": []},
    )  # fmt: skip
    service = await Service.open(settings, embedder=HashEmbedder())
    service.engine.certificate = passing(service.engine.info)
    try:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            documents = [
                {"id": f"d{i}", "text": "\n\n".join(sentence(10 * i + j, 30) for j in range(3))} for i in range(2)
            ]
            job = await client.post("/ingest?wait=true", json={"documents": documents})
            assert job.json()["state"] == "precomputed", job.text

            async def chat(mode: str) -> dict[str, Any]:
                body = {
                    "model": f"{settings.served_name}:default", "max_tokens": 8, "rag": {"blend": {"mode": mode}},
                    "messages": [{"role": "user", "content": "Who painted the old bridge in winter?"}],
                }  # fmt: skip
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                await service.guard.settled()
                found: dict[str, Any] = answer.json()
                return found

            truth = (await chat("full"))["choices"]
            first, _, third = [await chat("auto") for _ in range(3)]
            assert first["rag"]["cache"]["mode"] == "blend"
            assert first["choices"] != truth
            assert third["rag"]["cache"]["why"] == "guard: agreement 0.00 below 0.9, full prefill"
            assert third["choices"] == truth
            [level] = (await client.get("/guard")).json()["data"]
            assert level["least_ratio"] == 1.0
    finally:
        await service.close()
