"""Reading a JSON body: syntax, types, unknown fields; every fault names the field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from app.errors import BadRequestError, MalformedBodyError, UnknownParameterError


class Body(BaseModel):
    """A part of a request. Types are strict (``"1"`` is not 1); unknown fields are kept aside to be reported."""

    model_config = ConfigDict(extra="allow", strict=True)


B = TypeVar("B", bound=Body)


def parse_json(data: bytes) -> Any:
    """The JSON value of ``data``. Refuses NaN, lone surrogates and absurd nesting. Raises ``MalformedBodyError``."""
    try:
        return pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as e:
        raise MalformedBodyError(f"the body is not valid JSON: {e}") from e


def read_body(data: bytes, model: type[B], *, strict: bool) -> tuple[B, list[str]]:
    """``data`` as ``model``, and the names of fields nobody knows (an error instead, if ``strict``)."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise MalformedBodyError("the body must be a JSON object")
    return check(value, model, strict=strict)


def check(value: dict[str, Any], model: type[B], *, strict: bool) -> tuple[B, list[str]]:
    """``value`` as ``model``; see ``read_body``."""
    try:
        body = model.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        where = field_path(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BadRequestError(f"{where}: {message}" if where else message, param=where or None) from e
    unknown = list(_unknown(body))
    if unknown and strict:
        raise UnknownParameterError(f"unknown field {unknown[0][:100]!r}", param=unknown[0][:100])
    return body, unknown


def warning_header(unknown: Sequence[str]) -> dict[str, str]:
    """The header that tells a client which of its fields were ignored; ASCII on one line, whatever was sent."""
    if not unknown:
        return {}
    names = ", ".join(ascii(name)[1:-1][:80] for name in unknown[:10])
    more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
    return {"x-ragblend-warning": f"ignored unknown fields: {names}{more}"}


def field_path(loc: Sequence[int | str]) -> str:
    """``messages[0].content`` of a pydantic location; the names of union branches are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
    return path


def _unknown(value: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all fields that no model declares."""
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            yield f"{path}{name}"
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _unknown(item, f"{path[:-1]}[{i}].")
