"""Document -> chunks: whole paragraphs where they fit, never more tokens than allowed, no overlap.

Not semchunk: it splits on any run of newlines before it looks at sentences, keeps a global cache per tokenizer, and
knows no headings. The rule here is one loop: take as many units as fit; a unit that alone does not fit is replaced
by its parts, one level finer.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise

from retriever.headings import Heading, headings
from retriever.types import Chunk, Document

CountTokens = Callable[[str], int]
Span = tuple[int, int]
_Unit = tuple[int, int, int]  # start, stop, level: an index into _SPLITTERS, the next finer way to split it

_WITH_HEADINGS = {"text/markdown", "text/html", "application/json", "application/jsonl"}
_BLANK_LINES = re.compile(r"\n\s*\n\s*")
# Found from the whitespace backwards: a pattern that starts at the full stop is quadratic on "......".
_GAP = re.compile(r"\s+|[。！？]+\s*")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]{0,4}$")
_LINE_END = re.compile(r"\n\s*")
_WORD_END = re.compile(r"\s+")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|mr|mrs|ms|dr|prof|st|no|vs|etc|fig|e\.g|i\.e)\.$", re.IGNORECASE)


def chunk(document: Document, count_tokens: CountTokens, *, chunk_tokens: int = 512) -> list[Chunk]:
    """Chunks of at most `chunk_tokens` tokens by `count_tokens`, in order, covering all text but whitespace.

    Paragraphs are packed greedily. One that alone exceeds the limit is split at sentences, then lines, words,
    characters, each only when needed. A heading stays with what follows it. `count_tokens` is asked for
    O(n log n) characters in all.

    Ids are "chk_" + 24 hex of sha256 over document id, ordinal and text. Raises `ValueError` when a single character
    has more than `chunk_tokens` tokens.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    marks = headings(document.text) if document.media_type in _WITH_HEADINGS else []
    blocks = _blocks(document.text, marks)
    spans = _pack(document.text, blocks, lambda piece: count_tokens(piece) <= chunk_tokens)
    return chunks_at(document, spans, marks)


def chunks_at(document: Document, spans: list[Span], marks: list[Heading]) -> list[Chunk]:
    """Chunks at the given character ranges, with the page and heading in force at the start of each."""
    heading_starts = [mark.start for mark in marks]
    page_starts = [page.start for page in document.pages]
    chunks = []
    for ordinal, (start, stop) in enumerate(spans):
        text = document.text[start:stop]
        heading = bisect_right(heading_starts, start)
        page = bisect_right(page_starts, start)
        chunks.append(
            Chunk(
                id=_chunk_id(document.id, ordinal, text),
                document_id=document.id,
                ordinal=ordinal,
                text=text,
                start=start,
                stop=stop,
                page=document.pages[page - 1].number if page else None,
                heading=marks[heading - 1].text if heading else None,
            )
        )
    return chunks


def _chunk_id(document_id: str, ordinal: int, text: str) -> str:
    # Document ids hold no whitespace, so the three parts cannot run into one another.
    return "chk_" + hashlib.sha256(f"{document_id}\n{ordinal}\n{text}".encode()).hexdigest()[:24]


def _blocks(text: str, marks: list[Heading]) -> list[Span]:
    """Paragraphs; a heading opens a new one and takes the paragraph after it along."""
    cuts = sorted({0, len(text), *(m.end() for m in _BLANK_LINES.finditer(text)), *(m.start for m in marks)})
    pieces = list(_trimmed(text, cuts))
    heading_stops = {mark.start: mark.stop for mark in marks}
    blocks: list[Span] = []
    opened: int | None = None  # start of the headings that wait for their paragraph
    for start, stop in pieces:
        line_start = text.rfind("\n", 0, start) + 1
        if stop <= heading_stops.get(line_start, -1):
            opened = start if opened is None else opened
            continue
        blocks.append((start if opened is None else opened, stop))
        opened = None
    if opened is not None:
        blocks.append((opened, pieces[-1][1]))
    return blocks


def _pack(text: str, blocks: list[Span], fits: Callable[[str], bool]) -> list[Span]:
    """Greedy packing. The stack holds what is left, next unit last."""
    stack: list[_Unit] = [(start, stop, 0) for start, stop in reversed(blocks)]
    packed: list[Span] = []
    while stack:
        start, stop, level = stack[-1]
        if not fits(text[start:stop]):
            stack.pop()
            stack.extend(reversed(_finer(text, start, stop, level)))
            continue
        # Double the number of units until they no longer fit, then halve the gap: few and short token counts.
        count, limit = 1, len(stack)
        while count < limit:
            tried = min(2 * count, len(stack))
            if not fits(text[start : stack[-tried][1]]):
                limit = tried
                break
            count = tried
        while limit - count > 1:
            middle = (count + limit) // 2
            if fits(text[start : stack[-middle][1]]):
                count = middle
            else:
                limit = middle
        packed.append((start, stack[-count][1]))
        del stack[-count:]
    return packed


def _finer(text: str, start: int, stop: int, level: int) -> list[_Unit]:
    """The unit in parts, by the first splitter at or after `level` that has more than one part."""
    for finer in range(level, len(_SPLITTERS)):
        parts = _SPLITTERS[finer](text, start, stop)
        if len(parts) > 1:
            return [(a, b, finer + 1) for a, b in parts]
    raise ValueError(f"chunk_tokens is too small: {text[start:stop]!r} alone has more tokens")


def _sentences(text: str, start: int, stop: int) -> list[Span]:
    cuts = [start]
    for gap in _GAP.finditer(text, start, stop):
        before = text[max(cuts[-1], gap.start() - 8) : gap.start()]
        if not gap.group().isspace() or (_SENTENCE_END.search(before) and not _ABBREVIATION.search(before)):
            cuts.append(gap.end())
    return list(_trimmed(text, [*cuts, stop]))


def _split_at(pattern: re.Pattern[str]) -> Callable[[str, int, int], list[Span]]:
    def split(text: str, start: int, stop: int) -> list[Span]:
        cuts = [start, *(match.end() for match in pattern.finditer(text, start, stop)), stop]
        return list(_trimmed(text, cuts))

    return split


def _characters(text: str, start: int, stop: int) -> list[Span]:
    return [(at, at + 1) for at in range(start, stop)]


_SPLITTERS = (_sentences, _split_at(_LINE_END), _split_at(_WORD_END), _characters)


def _trimmed(text: str, cuts: list[int]) -> Iterator[Span]:
    """The ranges between cuts without surrounding whitespace; empty ones are dropped."""
    for start, stop in pairwise(cuts):
        piece = text[start:stop]
        left = len(piece) - len(piece.lstrip())
        right = len(piece.rstrip())
        if left < right:
            yield start + left, start + right
