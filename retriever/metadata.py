"""Metadata values are scalars, so that filters can compare them and JSON can carry them."""

import math
from collections.abc import Mapping

from retriever.clean import clean, clean_line
from retriever.errors import UnreadableDocumentError
from retriever.types import Scalar


def is_scalar(value: object) -> bool:
    """A string, a boolean, or a finite number."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def clean_metadata(entries: Mapping[str, object], where: str) -> dict[str, Scalar]:
    """Keys and strings cleaned; None left out; `UnreadableDocumentError` for anything that is not a scalar."""
    metadata: dict[str, Scalar] = {}
    for key, value in entries.items():
        if value is None:
            continue
        if not isinstance(value, str | int | float) or not is_scalar(value):
            raise UnreadableDocumentError(f"{where}: metadata {key!r} must be a string, a finite number or a boolean")
        metadata[clean_line(key)] = clean(value) if isinstance(value, str) else value
    return metadata
