"""Retrieval to prompt: search, fit whole chunks into the budget, put them into reading order, address their KV."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from app.citations import Passage
from app.errors import BadRequestError, ContextLengthError
from blend.keys import KeyMaker
from blend.prompt import ChunkRef, PromptLayout, TemplateError
from blend.types import Prompt
from retriever.embed import Embedder, Vectors
from retriever.errors import UnknownDocumentError
from retriever.retriever import Retriever
from retriever.search import Mode
from retriever.types import DocumentInfo, Hit, Neighbourhood

Messages = Sequence[Mapping[str, Any]]
_spent: ContextVar[list[float] | None] = ContextVar("ragblend_embedding_seconds", default=None)


class TimedEmbedder:
    """An embedder that tells whoever set ``_spent`` how long it worked, so that a response can report it."""

    def __init__(self, inner: Embedder) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def dimension(self) -> int:
        return self.inner.dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        begin = time.perf_counter()
        try:
            return self.inner.embed(texts)
        finally:
            if (spent := _spent.get()) is not None:
                spent.append(time.perf_counter() - begin)


@dataclass(frozen=True)
class RequestDocument:
    """A document that came with the request and is not stored."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Query:
    """What one request wants to read. ``collections`` empty: only its own ``documents``."""

    collections: tuple[str, ...]
    k: int
    neighbours: int
    mode: Mode
    filters: Mapping[str, Any] | None = None
    score_threshold: float | None = None
    max_context_tokens: int | None = None
    documents: tuple[RequestDocument, ...] = ()


@dataclass(frozen=True)
class Retrieved:
    """A passage, where it comes from and its address in the store. ``collection`` ``None``: from the request."""

    passage: Passage
    ref: ChunkRef
    collection: str | None = None
    ordinal: int = 0
    start: int = 0
    stop: int = 0

    @property
    def tokens(self) -> int:
        return len(self.ref.token_ids)


@dataclass(frozen=True)
class Grounding:
    """The passages in prompt order, those that did not fit, the prompt, and milliseconds by step."""

    results: tuple[Retrieved, ...]
    dropped: tuple[Retrieved, ...]
    prompt: Prompt
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def passages(self) -> tuple[Passage, ...]:
        return tuple(r.passage for r in self.results)

    @property
    def collections(self) -> tuple[str, ...]:
        """Collections that the passages come from, by name."""
        return tuple(sorted({r.collection for r in self.results if r.collection is not None}))


class References:
    """Store addresses of documents' chunks. The last used documents are kept, up to ``limit`` chunks in all.

    A key depends on the chunks it is compiled behind, so a whole document is tokenised to address one of its chunks
    and, in the compile context ``neighbours``, its neighbours too. A chunk whose neighbours are not assigned yet is
    addressed behind the prefix alone.
    """

    def __init__(self, retriever: Retriever, layout: PromptLayout, keys: KeyMaker, *, limit: int = 65536) -> None:
        self._retriever, self._layout, self.keys = retriever, layout, keys
        self._limit, self._held = limit, 0
        self._known: OrderedDict[tuple[int, int], list[ChunkRef]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, document: DocumentInfo) -> list[ChunkRef]:
        """References of all chunks that ``document`` has now, in reading order. Raises ``UnknownDocumentError``.

        Now: whatever changed since ``document`` was read, the catalogue is asked, and no address of an earlier version
        of it or of its chunks' neighbours is returned.
        """
        version = self._retriever.version(document.id, document.collection)
        with self._lock:
            if (refs := self._known.get(version)) is not None:
                self._known.move_to_end(version)
                return refs
        found = self._retriever.neighbourhood(document.id, document.collection)
        refs = self._refs(found)
        with self._lock:
            if found.version not in self._known:
                self._known[found.version] = refs
                self._held += _size(refs)
            while self._held > self._limit and len(self._known) > 1:
                self._held -= _size(self._known.popitem(last=False)[1])
        return refs

    def _refs(self, found: Neighbourhood) -> list[ChunkRef]:
        names = [c.id for c in found.chunks]
        ids = [self._layout.chunk_ids(c.text) for c in found.chunks]
        if self.keys.context != "neighbours":
            return self.keys.document(names, ids)
        known = dict(zip(names, ids, strict=True))
        for chunk in {c.id: c for near in found.neighbours for c in near}.values():
            if chunk.id not in known:
                known[chunk.id] = self._layout.chunk_ids(chunk.text)
        # Kept nearest first, compiled nearest last: right before the chunk.
        return self.keys.document(names, ids, [[known[c.id] for c in reversed(near)] for near in found.neighbours])

    def alone(self, name: str, text: str) -> ChunkRef:
        """Reference of a text that belongs to no stored document: compiled behind the prefix only."""
        keys = dataclasses.replace(self.keys, context="prefix")
        return keys.document([name], [self._layout.chunk_ids(text)])[0]


class Rag:
    """Builds grounded prompts. All methods work on the CPU for a while: call them in a thread."""

    def __init__(self, retriever: Retriever, layout: PromptLayout, references: References, max_context: int) -> None:
        self._retriever, self._layout, self._references = retriever, layout, references
        self.max_context = max_context

    def plain(self, messages: Messages, max_tokens: int) -> Prompt:
        """The messages without retrieval. Raises ``ContextLengthError``."""
        try:
            prompt = self._layout.plain(messages)
        except TemplateError as e:
            raise BadRequestError(str(e), param="messages") from e
        self._room(prompt, max_tokens)
        return prompt

    def ground(self, messages: Messages, query: Query, max_tokens: int) -> Grounding:
        """Search for the last user message and build the prompt around what was found."""
        timings: dict[str, float] = {}
        prefix = self._references.keys.prefix_ref()
        try:
            bare = self._layout.build([], messages, prefix)
        except TemplateError as e:
            raise BadRequestError(str(e), param="messages") from e
        room = self._room(bare, max_tokens)
        hits = self._search(_question(messages), query, timings)
        begin = time.perf_counter()
        found = [self._own(d) for d in query.documents] + [self._stored(h) for h in hits]
        kept, dropped = _fit(found, min(room, query.max_context_tokens or room))
        kept = _reading_order(kept)
        prompt = self._layout.build([r.ref for r in kept], messages, prefix)
        timings["layout"] = _ms(begin)
        return Grounding(tuple(kept), tuple(dropped), prompt, timings)

    def _room(self, prompt: Prompt, max_tokens: int) -> int:
        """Tokens left for passages."""
        used = len(prompt.token_ids)
        if used + max_tokens > self.max_context:
            raise ContextLengthError(
                f"this model's context holds {self.max_context} tokens; the messages have {used} and {max_tokens} are "
                "asked for as the answer; shorten the messages or lower max_tokens",
                param="messages" if used >= self.max_context else "max_tokens",
            )
        return self.max_context - used - max_tokens

    def _search(self, question: str, query: Query, timings: dict[str, float]) -> list[Hit]:
        if not query.collections:
            return []
        if not question.strip():
            raise BadRequestError("the last user message is empty; there is nothing to search for", param="messages")
        spent: list[float] = []
        token = _spent.set(spent)
        begin = time.perf_counter()
        try:
            hits = self._retriever.search(
                list(query.collections),
                question,
                k=query.k,
                filters=query.filters,
                mode=query.mode,
                score_threshold=query.score_threshold,
                neighbours=query.neighbours,
            )
        finally:
            _spent.reset(token)
        timings["embed"] = round(sum(spent) * 1000, 3)
        timings["search"] = round(_ms(begin) - timings["embed"], 3)
        # Neighbours count: who asks for k results gets no more, and a hit's neighbours outrank far worse hits.
        return sorted(hits, key=lambda h: -h.score)[: query.k]

    def _stored(self, hit: Hit) -> Retrieved:
        chunk, document = hit.chunk, hit.document
        try:
            ref = _named(self._references.of(document), chunk.id)
        except UnknownDocumentError:
            ref = None
        if ref is None:  # deleted or replaced since the search a moment ago; its text is still a right answer
            ref = self._references.alone(chunk.id, chunk.text)
        passage = Passage(
            chunk.id,
            document.id,
            document.title,
            document.filename,
            chunk.text,
            hit.score,
            chunk.page,
            chunk.heading,
        )
        return Retrieved(passage, ref, document.collection, chunk.ordinal, chunk.start, chunk.stop)

    def _own(self, document: RequestDocument) -> Retrieved:
        passage = Passage(document.id, document.id, document.title, document.title, document.text)
        return Retrieved(passage, self._references.alone(document.id, document.text), stop=len(document.text))


def _named(refs: Sequence[ChunkRef], name: str) -> ChunkRef | None:
    return next((r for r in refs if r.name == name), None)


def _size(refs: Sequence[ChunkRef]) -> int:
    """Chunks whose token ids are kept."""
    return sum(1 + len(r.behind) for r in refs)


def _fit(found: Sequence[Retrieved], room: int) -> tuple[list[Retrieved], list[Retrieved]]:
    """Drop whole chunks, lowest score first, until the rest fits. The request's own documents go last."""
    kept, dropped = list(found), []
    used = sum(r.tokens for r in kept)
    while used > room:
        worst = min(range(len(kept)), key=lambda i: (_score(kept[i]), -i))
        used -= kept[worst].tokens
        dropped.append(kept.pop(worst))
    return kept, dropped


def _reading_order(found: Sequence[Retrieved]) -> list[Retrieved]:
    """Documents by their best score, the chunks of one document as they stand in it: pronouns need what came before."""
    best: dict[tuple[str | None, str], float] = {}
    for r in found:
        key = (r.collection, r.passage.document_id)
        best[key] = max(best.get(key, 0.0), _score(r))
    rank = {key: i for i, key in enumerate(sorted(best, key=lambda k: -best[k]))}
    return sorted(found, key=lambda r: (rank[r.collection, r.passage.document_id], r.ordinal))


def _score(r: Retrieved) -> float:
    return 2.0 if r.passage.score is None else r.passage.score  # scores are 0..1; what the client sent comes first


def _question(messages: Messages) -> str:
    """The last user message's text."""
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")


def _ms(begin: float) -> float:
    return round((time.perf_counter() - begin) * 1000, 3)
