"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from app.chat import complete, stream
from app.errors import MalformedBodyError, failure
from app.intake import refuse
from app.routes.common import ServiceOf, json_bytes, json_schema, while_connected
from app.schema.answer import Completion
from app.schema.body import check, parse_json, warning_header
from app.schema.chat import ChatRequest

FIRST_EVENT_S = 5.0
PING_S = 15
GRACE_S = 8.0  # a stopping server lets streams end, a little shorter than it waits itself
router = APIRouter()
log = logging.getLogger(__name__)


@router.post("/v1/chat/completions", response_model=Completion, openapi_extra=json_schema(ChatRequest))
async def chat_completions(request: Request, service: ServiceOf) -> Response:
    """A chat answer, grounded in a collection when the model name or ``rag`` asks for it; SSE with ``stream``."""
    value = parse_json(await json_bytes(request))
    if not isinstance(value, dict):
        raise MalformedBodyError("the body must be a JSON object")
    refuse(value)
    body, unknown = check(value, ChatRequest, strict=service.settings.strict)
    headers = warning_header(unknown)
    if not body.stream:
        return JSONResponse(await while_connected(request, complete(service, body)), headers=headers)
    events = Events(stream(service, body))
    try:
        await while_connected(request, events.prime(FIRST_EVENT_S))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(events, headers)


class Events:
    """Server-sent events of a stream of chunks.

    A failure before the first chunk is still an HTTP status, so the first is awaited before the answer starts; but not
    for long, or a proxy would give up on a slow prefill. Later failures become an event.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self._chunks = chunks
        self._first: asyncio.Task[dict[str, Any]] | None = None

    async def prime(self, patience_s: float) -> None:
        """Wait for the first chunk, at most ``patience_s``; raises what it raises."""
        self._first = asyncio.ensure_future(anext(self._chunks))
        done, _ = await asyncio.wait([self._first], timeout=patience_s)
        if done and (error := self._first.exception()) is not None:
            raise error

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        try:
            if self._first is not None:
                yield _data(await self._first)
            async for chunk in self._chunks:
                yield _data(chunk)
        except Exception as e:
            failed = failure(e)
            if failed.status >= 500:
                log.error("a stream failed", exc_info=e)
            yield _data(failed.body)
        yield "[DONE]"

    async def aclose(self) -> None:
        """Abort what still runs. Safe at any point, and more than once."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.wait([self._first])
        await self._chunks.aclose()


class EventStream(EventSourceResponse):
    """The response; however it ends, the events are closed before it returns."""

    def __init__(self, events: Events, headers: dict[str, str]) -> None:
        super().__init__(aiter(events), headers=headers, ping=PING_S, sep="\n", shutdown_grace_period=GRACE_S)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _data(chunk: dict[str, Any]) -> str:
    # One line whatever the answer holds: JSON escapes line ends, and U+2028 is one for some SSE readers.
    return (
        json.dumps(chunk, ensure_ascii=False)
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
        .replace("\x85", "\\u0085")
    )
