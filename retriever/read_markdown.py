"""Markdown stays Markdown: a language model reads it well. Only front matter is taken off."""

import re

from retriever.clean import clean, clean_line
from retriever.headings import headings
from retriever.item import Item

_FRONT_MATTER = re.compile(r"---[ \t]*\n(.{0,20000}?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE = re.compile(r"^title:[ \t]*(.+)$", re.MULTILINE | re.IGNORECASE)


def read_markdown(text: str, raw: bytes) -> Item:
    """The title is that of the front matter, else the first heading."""
    body = clean(text).lstrip("\n")
    title = None
    front = _FRONT_MATTER.match(body)
    if front:
        found = _TITLE.search(front.group(1))
        title = clean_line(found.group(1)).strip("\"'") if found else None
        body = body[front.end() :]
    body = body.strip("\n")
    if not title:
        first = next(iter(headings(body)), None)
        title = first.text if first else None
    return Item(text=body, raw=raw, title=title)
