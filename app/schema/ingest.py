"""Request of ``POST /ingest``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.schema.body import Body

Scalar = str | int | float | bool
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Scalar], Field(max_length=16)]


class IngestDocument(Body):
    """Text to be chunked, or ready-made ``chunks``."""

    id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    title: Annotated[str, Field(max_length=512)] | None = None
    filename: Annotated[str, Field(max_length=255)] | None = None
    text: str | None = None
    chunks: Annotated[list[str], Field(min_length=1)] | None = None
    metadata: Metadata | None = None


class IngestRequest(Body):
    documents: Annotated[list[IngestDocument], Field(min_length=1, max_length=2000)]
    collection: str = "default"


class FormFields(Body):
    """Fields beside the files of a multipart request; ``metadata`` is JSON text there."""

    collection: str = "default"
    title: Annotated[str, Field(max_length=512)] | None = None
    metadata: Metadata | None = None
