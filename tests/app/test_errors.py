"""Whatever is sent, the answer is OpenAI's error object with a request id, never a stack trace and never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from app.errors import TABLE, OverloadedError, failure, shape_of
from blend.errors import BlendError, EngineError
from retriever.errors import RetrieverError
from store.errors import StoreError

from .conftest import Kit, OpenKit

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GOOD: dict[str, Any] = {"model": "trivial", "messages": [{"role": "user", "content": "Hello there."}]}


def is_error(answer: httpx.Response, status: int, *, param: str | None = None, code: str | None = None) -> str:
    """The answer has OpenAI's shape; returns the message."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert answer.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return str(error["message"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe\x00",
        b'{"model": "\xc3\x28"}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"temperature": NaN}',
        b"[" * (1 << 20),
        b'{"a":' * (1 << 18),
        b"9" * (1 << 20),
        b'{"seed": 1' + b"0" * 5000 + b"}",
    ],
)
async def test_a_body_that_is_no_json_object_is_told_so(empty_kit: Kit, body: bytes) -> None:
    for route in (CHAT, "/ingest"):
        is_error(await empty_kit.client.post(route, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x"}] * 513}, "messages"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"rag": {"blend": {"mode": "fast"}}}, "rag.blend.mode"),
        ({"rag": {"blend": {"selector": "magic"}}}, "rag.blend.selector"),
        ({"rag": {"blend": {"selector": "heads(rows=0)"}}}, "rag.blend.selector"),
        ({"rag": {"blend": {"selector": "heads:0.6+question:0.6"}}}, "rag.blend.selector"),
        ({"rag": {"blend": {"selector": "question(layers=1)"}}}, "rag.blend.selector"),  # the model has layer 0
        ({"rag": {"blend": {"selector": "heads+" * 10_000}}}, "rag.blend.selector"),
        ({"rag": {"blend": {"recompute_ratio": 1.01}}}, "rag.blend.recompute_ratio"),
        ({"rag": {"max_num_results": 51}}, "rag.max_num_results"),
        ({"rag": {"max_context_tokens": 0}}, "rag.max_context_tokens"),
        ({"rag": {"vector_store_ids": []}}, "rag.vector_store_ids"),
        ({"rag": {"vector_store_ids": [1]}}, "rag.vector_store_ids[0]"),
        ({"rag": {"documents": [{"title": "no text"}]}}, "rag.documents[0].text"),
        ({"rag": {"filters": {"type": "near"}}}, "rag.filters"),
        ({"rag": {"ranking_options": {"ranker": "best"}}}, "rag.ranking_options.ranker"),
        ({"rag": True}, "rag"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
    ],
)
async def test_a_bad_field_is_named(empty_kit: Kit, change: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        answer = await empty_kit.client.post(CHAT, json={"stream": stream} | GOOD | change)
        message = is_error(answer, 400, param=param)
        assert len(message) < 500


async def test_a_prompt_that_does_not_fit_is_context_length_exceeded(kit: Kit) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 40000}]}
    for change in (long, long | {"rag": {}}, {"max_tokens": 40000}):
        is_error(await kit.client.post(CHAT, json=GOOD | change), 400, code="context_length_exceeded")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "gpt-4"}, "model_not_found"),
        ({"model": "trivial2:default"}, "model_not_found"),
        ({"model": "trivial:nowhere"}, "collection_not_found"),
        ({"model": "trivial:"}, "collection_not_found"),
        ({"model": "trivial:../../etc"}, "collection_not_found"),
        ({"model": "trivial:größe\u0000"}, "collection_not_found"),
        ({"rag": {"vector_store_ids": ["default", "nowhere"]}}, "collection_not_found"),
    ],
)
async def test_what_does_not_exist_is_not_found(empty_kit: Kit, change: dict[str, Any], code: str) -> None:
    is_error(await empty_kit.client.post(CHAT, json=GOOD | change), 404, code=code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/ingest", 405),
        ("GET", "/jobs/job_none", 404),
        ("GET", "/jobs?limit=0", 400),
        ("GET", "/jobs?limit=abc", 400),
        ("POST", "/ingest?wait=perhaps", 400),
        ("GET", "/v1/files/none/content", 404),
        ("GET", "/v1/files/..%2F..%2Fetc%2Fpasswd/content", 404),
        ("GET", "/v1/models/other", 404),
    ],
)
async def test_routes_fail_in_the_same_shape(empty_kit: Kit, method: str, path: str, status: int) -> None:
    is_error(await empty_kit.client.request(method, path), status)


async def test_only_json_is_read_as_json(kit: Kit) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = await kit.client.post(CHAT, content=json.dumps(GOOD), headers={"content-type": kind})
        is_error(answer, 415)


async def test_a_body_over_the_limit_is_refused_announced_or_not(open_kit: OpenKit) -> None:
    kit = await open_kit(limits={"body_mib": 0.01})
    body = json.dumps(GOOD | {"user": "x" * 20000}).encode()
    is_error(await kit.client.post(CHAT, content=body, headers=JSON), 413)

    async def pieces() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    is_error(await kit.client.post(CHAT, content=pieces(), headers=JSON), 413)
    assert (await kit.client.post(CHAT, json=GOOD)).status_code == 200


async def test_unknown_fields_are_an_error_in_strict_mode_and_a_warning_otherwise(open_kit: OpenKit) -> None:
    change = {
        "temprature": 1,
        "rag": {"enabled": False, "blendd": {}},
        "messages": [GOOD["messages"][0] | {"nmae": "x"}],
    }
    loose = await open_kit()
    answer = await loose.client.post(CHAT, json=GOOD | change)
    assert answer.status_code == 200
    warning = answer.headers["x-ragblend-warning"]
    assert all(name in warning for name in ("temprature", "rag.blendd", "messages[0].nmae"))
    await loose.service.close()
    strict = await open_kit(strict=True)
    is_error(await strict.client.post(CHAT, json=GOOD | change), 400, code="unknown_parameter")
    assert (await strict.client.post(CHAT, json=GOOD)).status_code == 200


async def test_an_unknown_field_cannot_write_headers(kit: Kit) -> None:
    answer = await kit.client.post(CHAT, json=GOOD | {"a\r\nset-cookie: x=1\r\n\U0001f600": 1})
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-ragblend-warning"].isascii()


async def test_a_request_id_is_taken_over_if_it_is_harmless(kit: Kit) -> None:
    assert (await kit.client.get("/livez", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    strange = (await kit.client.get("/livez", headers={"x-request-id": "a b;c"})).headers["x-request-id"]
    assert strange.startswith("req_")


async def test_with_a_key_every_route_but_livez_needs_it(open_kit: OpenKit) -> None:
    kit = await open_kit(api_key="s3cret")
    key = {"authorization": "Bearer s3cret"}
    openapi = (await kit.client.get("/openapi.json", headers=key)).json()
    paths = [(method.upper(), path) for path, methods in openapi["paths"].items() for method in methods]
    assert len(paths) >= 9
    for method, path in [*paths, ("GET", "/openapi.json"), ("GET", "/nope")]:
        status = 200 if path == "/livez" else 401
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
        ):
            answer = await kit.client.request(method, path, headers=headers)
            assert answer.status_code == status, (method, path, headers)
        if status == 401:
            is_error(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    good = await kit.client.post(CHAT, json=GOOD, headers=key)
    assert good.status_code == 200


async def test_a_dead_engine_is_503_with_a_time_to_retry_and_not_ready(kit: Kit) -> None:
    await kit.engine.stop()
    for change in ({}, {"stream": True}):
        answer = await kit.client.post(CHAT, json=GOOD | change)
        is_error(answer, 503, code="engine_error")
        assert 0 < int(answer.headers["retry-after"]) <= 60
    answer = await kit.client.get("/readyz")
    is_error(answer, 503, code="not_ready")
    assert answer.json()["parts"]["engine"]["ok"] is False
    assert answer.json()["parts"]["index"]["ok"] is True
    assert (await kit.client.get("/livez")).status_code == 200


async def test_a_fault_of_ours_shows_no_inside(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /srv/x")

    monkeypatch.setattr(kit.service.rag, "plain", broken)
    answer = await kit.client.post(CHAT, json=GOOD)
    assert "secret" not in is_error(answer, 500)


def test_every_row_of_the_table_can_be_sent() -> None:
    for kind, shape in TABLE.items():
        failed = failure(kind("what was wrong"))
        assert failed.status == shape.status
        assert (failed.body["error"]["message"] == "what was wrong") == shape.show
        assert ("retry-after" in failed.headers) == (shape.status in (429, 503))


def test_every_error_of_every_room_has_a_row() -> None:
    def leaves(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(leaf for sub in kind.__subclasses__() for leaf in leaves(sub))]

    for root in (BlendError, EngineError, RetrieverError, StoreError):
        for kind in leaves(root):
            assert shape_of(kind.__new__(kind)).code is not None


def test_retry_after_never_exceeds_a_minute() -> None:
    assert failure(OverloadedError("full", retry_after=3600)).headers["retry-after"] == "60"
