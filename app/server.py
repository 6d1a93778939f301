"""The HTTP application, and the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app.errors import BadRequestError, StartError, failure
from app.middleware import Gate
from app.routes import cache, chat, ingest, models, ops
from app.schema.answer import Error
from app.schema.body import field_path
from app.service import Service
from app.settings import Settings

GRACE_S = 10
log = logging.getLogger(__name__)


def create_app(service_or_settings: Service | Settings) -> FastAPI:
    """The application. A given ``Service`` stays its owner's to close; with ``Settings`` the app opens its own."""
    given = service_or_settings if isinstance(service_or_settings, Service) else None
    settings = given.settings if given else service_or_settings
    assert isinstance(settings, Settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if given is not None:
            yield
            return
        service = await Service.open(settings)
        app.state.service, app.state.gate.metrics = service, service.metrics
        try:
            yield
        finally:
            app.state.service = None
            await service.close()

    # The interactive pages of FastAPI load scripts from a CDN; /openapi.json is enough.
    app = FastAPI(
        title="ragblend", version="1", docs_url=None, redoc_url=None, lifespan=lifespan,
        responses={"default": {"model": Error, "description": "Any failure, in OpenAI's shape"}},
    )  # fmt: skip
    app.state.service = given
    for routes in (chat, ingest, cache, models, ops):
        app.include_router(routes.router)
    app.add_exception_handler(HTTPException, _http_failure)
    app.add_exception_handler(RequestValidationError, _parameter_failure)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    app.add_middleware(_gate(app), api_key=key, limits=settings.limits, metrics=given.metrics if given else None)
    return app


Prepare = Callable[[Service], Awaitable[None]]


def run_server(settings: Settings, *, prepare: Prepare | None = None) -> None:
    """Serve until SIGINT or SIGTERM; ``prepare`` runs before the first request is taken. Raises ``StartError`` and what
    ``Service.open`` raises."""
    with suppress(asyncio.CancelledError):  # a signal while it was still starting
        asyncio.run(serve(settings, prepare=prepare))


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``: uvicorn raises them again when it is done, and SIGTERM would end the process
    before the engine's own processes are stopped."""

    announcement = ""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Who reads the announcement may connect: it comes when the server listens."""
        await super().startup(sockets)
        log.info("%s", self.announcement)


async def serve(settings: Settings, *, prepare: Prepare | None = None) -> None:
    """Bind first (a taken port is known before a model is loaded), open the service, serve, close."""
    starting = asyncio.current_task()
    server: _Server | None = None

    def stop() -> None:
        if server is not None:
            server.should_exit, server.force_exit = True, server.should_exit  # the second signal does not wait
        elif starting is not None:
            starting.cancel()

    with _on_signals(stop), _bound(settings.host, settings.port) as listener:
        service = await Service.open(settings)
        try:
            if prepare is not None:
                await prepare(service)
            config = uvicorn.Config(
                create_app(service), timeout_graceful_shutdown=GRACE_S, log_level="info", access_log=False,
                server_header=False, lifespan="off",
            )  # fmt: skip
            server = _Server(config)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            server.announcement = f"serving {settings.served_name} on http://{shown}:{port}"
            await server.serve(sockets=[listener])
        finally:
            await service.close()


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # only the main thread is told of signals
        numbers = ()
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as e:
        raise StartError(f"host {host!r} cannot be used: {e.strerror or e}") from e
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as e:
        listener.close()
        raise StartError(f"cannot bind {host}:{port}: {e.strerror or e}; choose another port") from e
    return listener


def _gate(app: FastAPI) -> Any:
    """The middleware's factory; it leaves the instance where the lifespan finds it."""

    def make(inner: Any, **options: Any) -> Gate:
        app.state.gate = Gate(inner, **options)
        return app.state.gate  # type: ignore[no-any-return]

    return make


async def _http_failure(request: Request, error: Exception) -> JSONResponse:
    failed = failure(error, method=request.method, path=request.url.path)
    return JSONResponse(failed.body, failed.status, failed.headers)


async def _parameter_failure(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = field_path(first["loc"][1:])
    failed = failure(BadRequestError(f"{where}: {first['msg']}", param=where))
    return JSONResponse(failed.body, failed.status, failed.headers)
