"""Requests of ``/cache/*``: which chunks are meant, and what is to be done to them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.choose import Selection
from app.schema.body import Body

_Ids = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=1000)]


class SelectRequest(Body):
    """Each field narrows the selection down, several values of one are alternatives; ``all``: everything but the
    canonical prefix, which is the chunk id ``prefix``."""

    collections: _Ids = Field(default_factory=list)
    file_ids: _Ids = Field(default_factory=list)
    chunk_ids: _Ids = Field(default_factory=list)
    all: bool = False

    @property
    def selection(self) -> Selection:
        """Raises ``BadRequestError`` unless it says what is meant."""
        chosen = Selection(tuple(self.collections), tuple(self.file_ids), tuple(self.chunk_ids), self.all)
        return chosen.require()


class MoveRequest(SelectRequest):
    """``ram``: into the memory of the process that blends; ``ssd``: out of it."""

    tier: Literal["ram", "ssd"]


class VerifyRequest(Body):
    """``repair``: delete what is bad; it is compiled again when it is needed."""

    repair: bool = False


class GcRequest(Body):
    """``full``: leave no dead bytes."""

    full: bool = False
