"""What every request passes: an id, the API key, the size limit, the error table, a count."""

from __future__ import annotations

import hmac
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLargeError, UnauthorizedError, failure
from app.metrics import Metrics
from app.settings import Limits

MIB = 1 << 20
OPEN_PATHS = frozenset({"/livez"})
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger(__name__)


class Gate:
    """Outermost layer: nothing leaves without ``x-request-id``, no exception leaves without OpenAI's error shape."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, limits: Limits, metrics: Metrics | None) -> None:
        self._app, self._limits, self.metrics = app, limits, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, self._limited(headers, receive), answer)
        except Exception as e:
            failed = failure(e, method=scope["method"], path=scope["path"])
            if failed.status >= 500:
                log.error("request %s failed", request_id, exc_info=e)
            if (
                status
            ):  # too late for a status: the connection is cut, and the client sees a broken answer, not a short one
                raise
            await JSONResponse(failed.body, failed.status, failed.headers)(scope, receive, answer)
        finally:
            if self.metrics is not None:
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(status or 499)).inc()

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in OPEN_PATHS:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
            raise UnauthorizedError("a valid API key is needed: send 'Authorization: Bearer KEY'")

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """``receive`` that stops a body at its limit, announced or not."""
        upload = headers.get("content-type", "").startswith("multipart/form-data")
        mib = self._limits.upload_mib if upload else self._limits.body_mib
        error = BodyTooLargeError(f"the body is larger than {mib:g} MiB; send less at once")
        if (length := headers.get("content-length", "")).isascii() and length.isdigit() and int(length) > mib * MIB:
            raise error
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > mib * MIB:
                raise error
            return message

        return counted
