"""The errors of this room, and the one table that turns any exception into an HTTP status and an OpenAI error.

Rooms raise what went wrong in their own words; nothing outside this file knows a status code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from blend import errors as blend
from retriever import errors as retriever
from store import errors as store


class AppError(Exception):
    """Base of everything this room raises. ``param`` is the request field at fault, as OpenAI names it."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after


class SettingsError(AppError):
    """A setting is unknown or has a bad value; the message names it and the choices."""


class StartError(AppError):
    """The service cannot start; the message says what is missing and what to do."""


class BadRequestError(AppError):
    """A field has a value that cannot be served."""


class MalformedBodyError(AppError):
    """The body is not what its content type says."""


class UnknownParameterError(AppError):
    """Strict mode met a field that does not exist."""


class UnsupportedParameterError(AppError):
    """The field exists elsewhere and is refused or not supported here."""


class ContextLengthError(AppError):
    """Prompt and asked-for answer do not fit the model."""


class ModelNotFoundError(AppError):
    """No such model."""


class JobNotFoundError(AppError):
    """No such job."""


class NotGuardedError(AppError):
    """The guard has compared no answer of this collection."""


class UnauthorizedError(AppError):
    """No API key, or a wrong one."""


class BodyTooLargeError(AppError):
    """The request is larger than its limit."""


class UnsupportedMediaError(AppError):
    """The content type of the request cannot be read."""


class OverloadedError(AppError):
    """A bounded queue is full; try again."""


class NotReadyError(AppError):
    """The service is starting, stopping or broken."""


class RequestTimeoutError(AppError):
    """The request took longer than its limit."""


class ClientGoneError(AppError):
    """The client closed the connection; nobody reads this answer."""


class StorageError(AppError):
    """The data directory could not be written."""


@dataclass(frozen=True)
class Shape:
    """How one kind of exception looks to a client. ``show``: its message is for clients; else it may hold paths."""

    status: int
    type: str
    code: str | None
    show: bool = True
    retry_after: int | None = None
    param: str | None = None


_BAD, _SERVER = "invalid_request_error", "server_error"

TABLE: dict[type[BaseException], Shape] = {
    BadRequestError: Shape(400, _BAD, "invalid_value"),
    MalformedBodyError: Shape(400, _BAD, "malformed_body"),
    UnknownParameterError: Shape(400, _BAD, "unknown_parameter"),
    UnsupportedParameterError: Shape(400, _BAD, "unsupported_parameter"),
    ContextLengthError: Shape(400, _BAD, "context_length_exceeded"),
    blend.PromptTooLongError: Shape(400, _BAD, "context_length_exceeded", param="messages"),
    blend.UnknownSelectorError: Shape(400, _BAD, "invalid_value", param="rag.blend.selector"),
    retriever.FilterError: Shape(400, _BAD, "invalid_filter", param="rag.filters"),
    retriever.UnsupportedFormatError: Shape(400, _BAD, "unsupported_file"),
    retriever.ParseError: Shape(400, _BAD, "invalid_file"),
    UnauthorizedError: Shape(401, _BAD, "invalid_api_key"),
    ModelNotFoundError: Shape(404, _BAD, "model_not_found", param="model"),
    JobNotFoundError: Shape(404, _BAD, "job_not_found"),
    NotGuardedError: Shape(404, _BAD, "collection_not_found"),
    retriever.UnknownCollectionError: Shape(404, _BAD, "collection_not_found"),
    retriever.UnknownDocumentError: Shape(404, _BAD, "file_not_found"),
    BodyTooLargeError: Shape(413, _BAD, "body_too_large"),
    UnsupportedMediaError: Shape(415, _BAD, "unsupported_media_type"),
    OverloadedError: Shape(429, "rate_limit_error", "overloaded", retry_after=5),
    NotReadyError: Shape(503, _SERVER, "not_ready", retry_after=10),
    RequestTimeoutError: Shape(504, _SERVER, "timeout"),
    store.StoreFullError: Shape(507, _SERVER, "storage_full"),
    store.StoreError: Shape(500, _SERVER, "storage_error", show=False),
    retriever.CatalogueError: Shape(507, _SERVER, "catalogue_error", show=False),
    retriever.RetrieverError: Shape(500, _SERVER, "retriever_error", show=False),
    blend.EngineError: Shape(503, _SERVER, "engine_error", show=False, retry_after=10),
    blend.BlendError: Shape(500, _SERVER, "blend_error", show=False),
    ClientGoneError: Shape(499, _BAD, "client_closed_request"),
    StorageError: Shape(507, _SERVER, "storage_full"),
    AppError: Shape(500, _SERVER, "server_error", show=False),
}
_UNKNOWN = Shape(500, _SERVER, "server_error", show=False)
_HIDDEN = "the server failed on this request; its log has the cause under this request id"
_HTTP = {
    404: ("not_found", "no such route: {method} {path}"),
    405: ("method_not_allowed", "{method} is not allowed on {path}"),
}


@dataclass(frozen=True)
class Failure:
    """One failed request: what goes over the wire."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def shape_of(error: BaseException) -> Shape:
    """The nearest row of the table for ``error``."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _UNKNOWN)


def failure(error: BaseException, *, method: str = "", path: str = "") -> Failure:
    """How ``error`` is answered. ``method`` and ``path`` only serve the messages of 404 and 405."""
    if isinstance(error, HTTPException):
        code, text = _HTTP.get(error.status_code, ("http_error", str(error.detail)))
        kind = _SERVER if error.status_code >= 500 else _BAD
        message = text.format(method=method, path=path)
        return Failure(error.status_code, error_body(message, kind, None, code), dict(error.headers or {}))
    shape = shape_of(error)
    headers = {}
    wait = getattr(error, "retry_after", None) or shape.retry_after
    if wait is not None:
        headers["retry-after"] = str(min(int(wait), 60))
    if shape.status == 401:
        headers["www-authenticate"] = "Bearer"
    message = str(error) if shape.show else _HIDDEN
    param = getattr(error, "param", None) or shape.param
    return Failure(shape.status, error_body(message, shape.type, param, shape.code), headers)


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
