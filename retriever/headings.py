"""Headings of a Markdown text (HTML is turned into Markdown headings when it is read)."""

from dataclasses import dataclass
from itertools import pairwise

from markdown_it import MarkdownIt

from retriever.clean import clean_line


@dataclass(frozen=True)
class Heading:
    """`text` without its marks; characters [start, stop) are its line or lines."""

    text: str
    start: int
    stop: int


def headings(text: str) -> list[Heading]:
    """Top-level ATX and setext headings in order, code fences respected. Text must have "\\n" newlines."""
    # Only the block rules are needed; inline parsing would be most of the time.
    parser = MarkdownIt("commonmark").disable("inline")
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []
    tokens = parser.parse(text)
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open" or opening.level or opening.map is None:
            continue
        first, last = opening.map
        title = clean_line(inline.content)
        if title:
            found.append(Heading(title[:200], starts[first], min(starts[last] - 1, len(text))))
    return found
