"""Which retrieved passages an answer rests on.

Two kinds of evidence, and nothing is cited without one: a marker ``[n]`` the model wrote (n counts the passages in
prompt order), or words of the answer in a sentence of a passage. Spans are character offsets into the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote

# Markers stand on their own, one or several: `a[0][1]` in code is none.
_MARKERS = re.compile(r"(?: |(?<![\w\])]))(?:\[\d{1,3}\])+")
_MARKER = re.compile(r"\[(\d{1,3})\]")
_OPEN = re.compile(r"(?: |(?<![\w\])]))(?:\[\d{1,3}\])*(?:\[\d{0,3})?\Z")
_WORD = re.compile(r"[^\W_]+(?:['’.\-][^\W_]+)*")
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|(?=\n\s*\n)|$)", re.DOTALL)
_STOP = frozenset(
    "a about after all also an and any are as at be because been before being but by can could did do does for "
    "from had has have he her here hers him his how i if in into is it its itself just me more most my no not of "
    "on one only or other our out over own she so some such than that the their them then there these they this "
    "those to too under up very was we were what when where which while who whom whose why will with would yes "
    "you your".split()
)
MAX_CITATIONS = 20
MAX_SENTENCE_WORDS = 60


@dataclass(frozen=True)
class Passage:
    """A retrieved chunk as it stood in the prompt. ``score`` ``None``: sent with the request, not retrieved."""

    chunk_id: str
    document_id: str
    title: str
    filename: str
    text: str
    score: float | None = None
    page: int | None = None
    heading: str | None = None

    @property
    def url(self) -> str:
        """Where the document can be read, with the place of this chunk."""
        page = f"&page={self.page}" if self.page is not None else ""
        return f"/v1/files/{quote(self.document_id, safe='')}/content#chunk={quote(self.chunk_id, safe='')}{page}"


@dataclass(frozen=True)
class Citation:
    """``answer[start:stop]`` rests on ``quote``, a sentence of ``passage``."""

    start: int
    stop: int
    passage: Passage
    quote: str


@dataclass(frozen=True)
class _Words:
    """Normalised words of a text and where each stands in it."""

    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    proper: frozenset[str]

    @property
    def content(self) -> frozenset[str]:
        return frozenset(w for w in self.words if w not in _STOP)


@dataclass(frozen=True)
class _Sentence:
    passage: Passage
    text: str
    words: _Words


class MarkerFilter:
    """Takes an answer piece by piece and holds back what may become a marker; removes markers of no passage.

    ``removed`` counts them (``ragblend_invalid_citations_total``).
    """

    def __init__(self, passages: int) -> None:
        self.passages = passages
        self.removed = 0
        self._held = ""
        self._before = ""

    def feed(self, text: str) -> str:
        """What can be shown now."""
        return self._clean(self._held + text, final=False)

    def close(self) -> str:
        """What was held back."""
        return self._clean(self._held, final=True)

    def _clean(self, text: str, *, final: bool) -> str:
        # The last character shown decides whether a bracket at the start of `text` stands on its own.
        whole = self._before + text
        at = len(self._before)
        unfinished = None if final or not self.passages else _OPEN.search(whole, at)
        end = unfinished.start() if unfinished else len(whole)
        self._held = whole[end:]
        shown, last = [], at
        for found in _MARKERS.finditer(whole, at, end) if self.passages else ():
            numbers = _MARKER.findall(found.group())
            known = [n for n in numbers if 1 <= int(n) <= self.passages]
            if len(known) < len(numbers):
                self.removed += len(numbers) - len(known)
                space = " " if known and found.group().startswith(" ") else ""
                shown += [whole[last : found.start()], space, *(f"[{n}]" for n in known)]
                last = found.end()
        shown.append(whole[last:end])
        out = "".join(shown)
        self._before = (self._before + out)[-1:]
        return out


def cite(answer: str, question: str, passages: Sequence[Passage]) -> list[Citation]:
    """Citations of ``answer``, in its order, at most ``MAX_CITATIONS``; each span at most once per passage."""
    if not passages or not answer.strip():
        return []
    sentences = [s for p in passages for s in _sentences(p)]
    asked = _words(question)
    found: list[Citation] = []
    for start, stop in islice(_sentence_spans(answer), 2 * MAX_CITATIONS):
        marked = list(_by_marker(answer, start, stop, passages, sentences))
        found += marked or _by_words(answer, start, stop, asked, sentences)
    return found[:MAX_CITATIONS]


def _by_marker(
    answer: str, start: int, stop: int, passages: Sequence[Passage], sentences: Sequence[_Sentence]
) -> Iterator[Citation]:
    """The sentence's markers, each with the sentence of its passage that shares most words; none shared, none cited."""
    said = _words(_MARKERS.sub(" ", answer[start:stop])).content
    markers = [m for group in _MARKERS.finditer(answer, start, stop) for m in _MARKER.finditer(answer, *group.span())]
    for marker in markers:
        number = int(marker.group(1))
        if not 1 <= number <= len(passages):
            continue
        own = [s for s in sentences if s.passage is passages[number - 1]]
        best = max(own, key=lambda s: len(said & s.words.content), default=None)
        if best is not None and said & best.words.content:
            yield Citation(marker.start(), marker.end(), best.passage, best.text)


def _by_words(answer: str, start: int, stop: int, asked: _Words, sentences: Sequence[_Sentence]) -> list[Citation]:
    """The longest run of the answer's words that a passage has too and that says more than the question did."""
    said = _words(answer[start:stop])
    new = said.content - asked.content
    if not new:
        return []
    best: tuple[tuple[float, ...], int, int, _Sentence] | None = None
    for sentence in sentences:
        if not new & sentence.words.content:
            continue
        first, length = _longest_run(said.words, sentence.words.words, new)
        if not length or not _informative(said, first, length, new, sentence):
            continue
        run = said.words[first : first + length]
        about = sentence.words.content | _words(f"{sentence.passage.title} {sentence.passage.heading or ''}").content
        grade = (
            float(sum(w in new for w in run)),
            len(asked.content & sentence.words.content) + 0.5 * len(asked.content & (about - sentence.words.content)),
            float(len(said.content & sentence.words.content)),
            sentence.passage.score if sentence.passage.score is not None else 1.0,
        )
        if best is None or grade > best[0]:
            best = (grade, first, length, sentence)
    if best is None:
        return []
    _, first, length, sentence = best
    begin, end = said.spans[first][0], said.spans[first + length - 1][1]
    return [Citation(start + begin, start + end, sentence.passage, sentence.text)]


def _informative(said: _Words, first: int, length: int, new: frozenset[str], sentence: _Sentence) -> bool:
    """One common word is chance, unless it is the whole answer, a name or a number."""
    run = said.words[first : first + length]
    content = [w for w in run if w not in _STOP]
    if len(content) >= 2 or said.content <= set(content):
        return True
    return any(w in new and (w in sentence.words.proper or w[0].isdigit()) for w in content)


def _longest_run(said: Sequence[str], there: Sequence[str], new: frozenset[str]) -> tuple[int, int]:
    """``(first, length)`` of the longest run of ``said`` that stands in ``there`` and holds a word of ``new``."""
    at: dict[str, list[int]] = {}
    for j, word in enumerate(there):
        at.setdefault(word, []).append(j)
    best = (0, 0)
    ending: dict[int, int] = {}  # position in `there` -> length of the common run that ends there
    for i, word in enumerate(said):
        ending = {j: ending.get(j - 1, 0) + 1 for j in at.get(word, ())}
        for length in ending.values():
            if length > best[1] and any(w in new for w in said[i - length + 1 : i + 1]):
                best = (i - length + 1, length)
    return best


def _sentences(passage: Passage) -> Iterator[_Sentence]:
    for start, stop in _sentence_spans(passage.text):
        text = passage.text[start:stop]
        yield _Sentence(passage, text, _words(text))


def _sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Sentences; what has no full stop (a table, a list) in pieces, so that a quote stays short and matching cheap."""
    for found in _SENTENCE.finditer(text):
        start = found.start()
        for n, word in enumerate(_WORD.finditer(text, *found.span())):
            if n and n % MAX_SENTENCE_WORDS == 0:
                yield start, start + len(text[start : word.start()].rstrip())
                start = word.start()
        yield start, found.end()


def _words(text: str) -> _Words:
    found = list(_WORD.finditer(text))
    words = tuple(
        unicodedata.normalize("NFKC", w.group()).casefold().removesuffix("'s").removesuffix("’s") for w in found
    )
    proper = frozenset(w for i, (w, m) in enumerate(zip(words, found, strict=True)) if i and m.group()[0].isupper())
    return _Words(words, tuple(m.span() for m in found), proper)
