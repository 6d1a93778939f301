"""Chat answers: OpenAI's shape, honest accounting, and streams that end when their client does."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from app.chat import stream
from app.routes import chat as chat_route
from app.schema.chat import ChatRequest
from blend.errors import EngineError
from blend.types import Delta, Request

from .conftest import Kit, OpenKit

ANSWER = "Mara Venn was a painter."


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, without the closing mark (which must be there)."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(d) for d in data[:-1]]


async def test_an_answer_is_grounded_cited_and_accounted_for(kit: Kit) -> None:
    body = (await kit.chat()).json()
    [choice] = body["choices"]
    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"
    [cited] = choice["message"]["annotations"]
    assert (cited["type"], cited["file_id"], cited["quote"]) == ("url_citation", "doc-mara", ANSWER)
    span = cited["url_citation"]
    assert ANSWER[span["start_index"] : span["end_index"]] == ANSWER.rstrip(".")
    assert (await kit.client.get(span["url"])).text.startswith("Mara Venn was a painter.")
    cache = body["rag"]["cache"]
    assert cache["mode"] == "blend"
    assert cache["reused"] > 0
    assert cache["recomputed"] > 0
    assert cache["missing"] == 0
    assert cache["computed_share"] == pytest.approx(cache["recomputed"] / cache["tokens"], abs=1e-6)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == cache["reused"]
    assert body["usage"]["completion_tokens"] == len(ANSWER)
    assert {"embed", "search", "kv_load", "blend", "ttft"} <= set(body["rag"]["timings_ms"])


async def test_a_request_may_compose_its_selector(kit: Kit) -> None:
    spec = "heads(rows=2):0.2+question(rounds=2,pool=3):0.8"
    body = (await kit.chat(rag={"blend": {"selector": spec, "mode": "blend"}})).json()
    assert body["rag"]["cache"]["selector"] == spec


@pytest.mark.parametrize("mode", ["auto", "blend", "reuse", "full"])
@pytest.mark.parametrize("ratio", [0.0, 0.15, 1.0])
async def test_reused_recomputed_and_missing_are_all_context_tokens(kit: Kit, mode: str, ratio: float) -> None:
    await kit.ingest([{"id": "cold", "text": "Mara Venn also wrote."}], collection="cold")
    for entry in list(kit.engine.store.entries()):
        kit.engine.store.delete(entry.key, evicted=True) if entry.tokens == len("Mara Venn also wrote.\n\n") else None
    stores = {"vector_store_ids": ["default", "cold"], "blend": {"mode": mode, "recompute_ratio": ratio}}
    cache = (await kit.chat(model="trivial", rag=stores)).json()["rag"]["cache"]
    for part in (cache, *cache["chunks"]):
        assert part["reused"] + part["recomputed"] + part["missing"] == part["tokens"]
    assert sum(c["tokens"] for c in cache["chunks"]) == cache["tokens"]
    cold = next(c for c in cache["chunks"] if c["tokens"] == 23)
    if mode == "full":
        assert (cache["reused"], cache["missing"]) == (0, 0)
    else:
        assert (cold["missing"], cold["miss_reason"]) == (23, "evicted")
        assert cache["recomputed"] == 0 if mode == "reuse" or ratio == 0 else cache["recomputed"] > 0


async def test_an_unknown_kv_is_slower_never_wrong(open_kit: OpenKit) -> None:
    kit = await open_kit(precompute_on_ingest=False)
    assert (await kit.ingest())["state"] == "searchable"
    body = (await kit.chat(rag={"blend": {"mode": "blend"}})).json()
    assert body["choices"][0]["message"]["content"] == ANSWER
    cache = body["rag"]["cache"]
    assert cache["missing"] == cache["tokens"]
    assert {c["miss_reason"] for c in cache["chunks"]} == {"never_precomputed"}


async def test_plain_chat_retrieves_nothing(kit: Kit) -> None:
    for change in ({"model": "trivial"}, {"rag": {"enabled": False}}):
        body = (await kit.chat(**change)).json()
        assert "rag" not in body
        assert body["choices"][0]["message"]["annotations"] == []
        assert body["choices"][0]["message"]["content"] == "Where was Mara Venn born?"


@pytest.mark.parametrize(
    "rag", [{}, {"vector_store_ids": ["default"]}, {"vector_store_ids": ["default", "default"], "max_num_results": 50}]
)
async def test_the_rag_object_asks_for_retrieval_too(kit: Kit, rag: dict[str, Any]) -> None:
    body = (await kit.chat(model="trivial", rag=rag)).json()
    assert len(body["rag"]["results"]) == 4
    assert body["choices"][0]["message"]["content"] == ANSWER


async def test_filters_thresholds_and_budgets_are_passed_on(kit: Kit) -> None:
    only = {"filters": {"type": "eq", "key": "document_id", "value": "doc-otto"}}
    body = (await kit.chat(rag=only)).json()
    assert {r["file_id"] for r in body["rag"]["results"]} == {"doc-otto"}
    nothing = {"ranking_options": {"score_threshold": 1.0, "ranker": "text"}}
    body = (await kit.chat(rag=nothing)).json()
    assert body["rag"]["results"] == []
    little = (await kit.chat(rag={"max_context_tokens": 60})).json()["rag"]
    assert (len(little["results"]), len(little["dropped"])) == (1, 3)
    assert "results" not in {k for k, v in (await kit.chat(rag={"include_results": False})).json()["rag"].items() if v}


@pytest.mark.parametrize(
    "document",
    [
        {"title": "Mine", "text": "Eastford lies by the sea. More."},
        {"id": "x", "data": {"title": "Mine", "snippet": "Eastford lies by the sea. More."}},
    ],
)
async def test_documents_of_the_request_are_read_in_both_forms(kit: Kit, document: dict[str, Any]) -> None:
    body = (await kit.chat(model="trivial", rag={"documents": [document], "blend": {"mode": "blend"}})).json()
    [result] = body["rag"]["results"]
    assert (result["title"], result["score"], result["collection"]) == ("Mine", None, None)
    assert body["choices"][0]["message"]["content"] == "Eastford lies by the sea."
    assert body["rag"]["cache"]["missing"] == result["tokens"]


async def test_a_dry_run_shows_the_layout_and_generates_nothing(kit: Kit) -> None:
    body = (await kit.chat(rag={"dry_run": True})).json()
    assert body["choices"] == []
    layout = body["rag"]["layout"]
    assert [s["kind"] for s in layout] == ["prefix", *["chunk"] * 4, "question"]
    assert [s["cached"] for s in layout] == [True] * 5 + [None]
    assert layout[-1]["stop"] == body["usage"]["prompt_tokens"]
    [chunk] = events(await kit.chat(rag={"dry_run": True}, stream=True))
    assert chunk["rag"]["layout"] == layout


async def test_a_stream_says_what_the_whole_answer_says(kit: Kit) -> None:
    whole = (await kit.chat(logprobs=True, top_logprobs=1)).json()
    chunks = events(await kit.chat(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=1))
    assert len({c["id"] for c in chunks}) == 1
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    assert [d["role"] for d in deltas if "role" in d] == ["assistant"]
    assert "role" in deltas[0]
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]] == [None] * (len(deltas) - 1) + ["stop"]
    assert deltas[-1] == {}
    assert deltas[-2]["annotations"] == whole["choices"][0]["message"]["annotations"]
    first = chunks[0]["rag"]
    assert first["results"] == whole["rag"]["results"]
    assert first["cache"] == whole["rag"]["cache"]
    assert all("rag" not in c for c in chunks[1:])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(c["usage"] is None for c in chunks[:-1])
    tokens = [t for c in chunks[:-1] for t in ((c["choices"][0]["logprobs"] or {}).get("content") or [])]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    assert len(tokens) == len(ANSWER)
    token = {"token": "M", "logprob": 0.0, "bytes": [77]}
    assert tokens[0] == token | {"top_logprobs": [token]}


async def test_several_answers_have_their_own_index(kit: Kit) -> None:
    whole = (await kit.chat(n=3)).json()
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2]
    assert whole["usage"]["completion_tokens"] == 3 * len(ANSWER)
    chunks = events(await kit.chat(n=3, stream=True))
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == ANSWER
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "stop"
    assert sum("rag" in c for c in chunks) == 1


async def test_stop_and_length_end_an_answer(kit: Kit) -> None:
    for change, text, reason in (
        ({"stop": " was"}, "Mara Venn", "stop"),
        ({"stop": ["zzz", "Venn"]}, "Mara ", "stop"),
        ({"max_tokens": 4}, "Mara", "length"),
        ({"max_completion_tokens": 4, "max_tokens": 9}, "Mara", "length"),
    ):
        choice = (await kit.chat(**change)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


async def test_content_parts_system_messages_and_returned_turns_are_read(kit: Kit) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who was"}, {"type": "text", "text": "Mara Venn?"}]},
        {"role": "assistant", "content": "A painter.", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": "Where was Mara Venn born?"},
    ]
    body = (await kit.chat(messages=messages)).json()
    assert body["choices"][0]["message"]["content"] == ANSWER


async def test_a_question_without_text_is_not_searched_for(kit: Kit) -> None:
    answer = await kit.chat(messages=[{"role": "user", "content": "  "}])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


async def test_harmless_values_of_unsupported_fields_pass(kit: Kit) -> None:
    answer = await kit.chat(tools=[], response_format={"type": "text"}, tool_choice="auto", user="me", store=False)
    assert answer.status_code == 200
    assert "x-ragblend-warning" not in answer.headers


async def test_line_separators_in_an_answer_do_not_break_the_stream(open_kit: OpenKit) -> None:
    kit = await open_kit()
    text = "A\u2028b\u2029c\u0085d 😀 ünï\r\nzwei."
    chunks = events(await kit.chat(model="trivial", messages=[{"role": "user", "content": text}], stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text


class FailsLate:
    """An engine that breaks after its first word."""

    def __init__(self, kit: Kit, error: Exception) -> None:
        self._generate, self._error = kit.engine.generate, error

    async def __call__(self, request: Request) -> Any:
        async for delta in self._generate(request):
            yield delta
            raise self._error


@pytest.mark.parametrize("error", [EngineError("at /srv/secret"), RuntimeError("at /srv/secret")])
async def test_a_failure_in_a_stream_is_an_error_event(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(kit.engine, "generate", FailsLate(kit, error))
    chunks = events(await kit.chat(stream=True))
    assert set(chunks[-1]) == {"error"}
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in json.dumps(chunks)
    assert (await kit.chat()).status_code >= 500


async def test_an_aborted_answer_is_an_error_not_a_short_answer(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    async def aborted(request: Request) -> Any:
        yield Delta("Mara", (1,), finish_reason="abort")

    monkeypatch.setattr(kit.engine, "generate", aborted)
    assert (await kit.chat()).status_code == 503


async def test_too_slow_is_a_timeout(open_kit: OpenKit) -> None:
    kit = await open_kit(delay_s=0.5, limits={"request_s": 0.2})
    for streamed in (False, True):
        answer = await kit.chat(model="trivial", stream=streamed)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert not kit.engine.running


async def test_a_stream_starts_before_a_slow_first_token(open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_route, "FIRST_EVENT_S", 0.01)
    kit = await open_kit(delay_s=0.1)
    chunks = events(await kit.chat(model="trivial", stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Where was Mara Venn born?"


async def test_too_many_requests_are_refused_at_the_door(open_kit: OpenKit) -> None:
    kit = await open_kit(delay_s=0.1, limits={"requests": 2})
    answers = await asyncio.gather(*(kit.chat(model="trivial") for _ in range(5)))
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429]
    refused = next(a for a in answers if a.status_code == 429)
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert (await kit.chat(model="trivial")).status_code == 200


async def test_two_interleaved_requests_are_the_same_two_alone(kit: Kit) -> None:
    def ask(name: str) -> Any:
        only = {"filters": {"type": "eq", "key": "document_id", "value": name}}
        return kit.chat(rag=only)

    def told(answer: httpx.Response) -> Any:
        body = answer.json()
        return body["choices"], body["rag"]["results"], body["rag"]["cache"], body["usage"]

    alone = [told(await ask(name)) for name in ("doc-mara", "doc-otto")]
    together = await asyncio.gather(*(ask(name) for name in ("doc-mara", "doc-otto") * 8))
    assert [told(a) for a in together] == alone * 8


@pytest.mark.parametrize("taken", range(6))
async def test_closing_the_stream_at_any_chunk_frees_the_engine(open_kit: OpenKit, taken: int) -> None:
    kit = await open_kit(delay_s=0.001)
    body = ChatRequest(model="trivial", n=2, messages=[{"role": "user", "content": "one two three four"}])  # type: ignore[list-item]
    chunks = stream(kit.service, body)
    for _ in range(taken):
        await anext(chunks)
    await chunks.aclose()
    assert not kit.engine.running
    assert kit.service.traffic.running == 0


async def test_metrics_count_what_the_answers_said(kit: Kit) -> None:
    cache = (await kit.chat()).json()["rag"]["cache"]
    await kit.chat(model="gpt-4")
    text = (await kit.client.get("/metrics")).text
    for kind in ("reused", "recomputed", "missing"):
        assert f'ragblend_context_tokens_total{{kind="{kind}"}} {float(cache[kind])}' in text
    assert 'ragblend_chunk_lookups_total{result="hit",tier="ram"} 5.0' in text
    assert 'ragblend_requests_total{route="/v1/chat/completions",status="404"} 1.0' in text
    assert 'ragblend_ttft_seconds_count{path="blend"} 1.0' in text
    assert 'ragblend_ingest_documents_total{result="searchable"} 2.0' in text
    assert "ragblend_store_bytes" in text
    assert "trivial_running 0" in text


async def test_models_are_the_base_and_one_alias_per_collection(kit: Kit) -> None:
    await kit.ingest([{"text": "More."}], collection="notes")
    models = (await kit.client.get("/v1/models")).json()["data"]
    assert [m["id"] for m in models] == ["trivial", "trivial:default", "trivial:notes"]
    assert (await kit.client.get("/v1/models/trivial:notes")).json()["documents"] == 1


async def test_ready_is_told_with_every_part(kit: Kit) -> None:
    body = (await kit.client.get("/readyz")).json()
    assert body["status"] == "ready"
    assert {name: part["ok"] for name, part in body["parts"].items()} == {"engine": True, "store": True, "index": True}
    assert body["parts"]["store"]["entries"] == 5
