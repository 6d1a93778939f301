"""What routes share: the service, a JSON body, the client's presence."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from starlette.requests import Request

from app.errors import ClientGoneError, NotReadyError, UnsupportedMediaError
from app.service import Service

T = TypeVar("T")


def _service(request: Request) -> Service:
    service = request.app.state.service
    if service is None:
        raise NotReadyError("the service is starting or stopping; try again soon")
    assert isinstance(service, Service)
    return service


ServiceOf = Annotated[Service, Depends(_service)]


async def json_bytes(request: Request) -> bytes:
    """The body of a JSON request. Any other type is refused: a web page can post text or forms to localhost unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaError(f"content type {kind[:80]!r} cannot be read here; send application/json")
    return await request.body()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away first (``ClientGoneError``)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def json_schema(model: Any) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads its body itself."""
    schema = model.model_json_schema()
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inline(schema, schema.pop("$defs", {}))}},
        }
    }


def _inline(node: Any, defs: dict[str, Any]) -> Any:
    """The schema without references: OpenAPI has no place for a route's own definitions."""
    if isinstance(node, dict):
        if "$ref" in node:
            return _inline(defs[node["$ref"].rpartition("/")[2]], defs)
        return {k: _inline(v, defs) for k, v in node.items()}
    return [_inline(v, defs) for v in node] if isinstance(node, list) else node
