"""What a reader hands to `parse`: clean text and whatever the file says about itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from retriever.types import Scalar


@dataclass(frozen=True)
class Item:
    """`raw` identifies the item (its own bytes); `pages` are (number, start, stop) character ranges of `text`."""

    text: str
    raw: bytes
    title: str | None = None
    id: str | None = None
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    pages: tuple[tuple[int, int, int], ...] = ()
