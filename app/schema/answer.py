"""Answers of ``/v1/chat/completions``: OpenAI's shapes, with ``rag`` and citation details beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class UrlCitation(BaseModel):
    start_index: int
    end_index: int
    title: str
    url: str


class Annotation(BaseModel):
    """OpenAI types ``url_citation``; the rest stands beside it and survives OpenAI's client."""

    type: Literal["url_citation"] = "url_citation"
    url_citation: UrlCitation
    file_id: str
    chunk_id: str
    filename: str
    score: float | None
    quote: str
    page: int | None


class Message(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[Annotation] = []


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Result(BaseModel):
    """One retrieved chunk. ``score`` and ``collection`` are ``null`` for a document that came with the request."""

    chunk_id: str
    file_id: str
    filename: str
    title: str
    collection: str | None
    score: float | None
    text: str
    tokens: int
    ordinal: int
    start: int
    stop: int
    page: int | None
    heading: str | None
    url: str


class CacheChunk(BaseModel):
    chunk_id: str
    tokens: int
    tier: str | None
    reused: int
    recomputed: int
    missing: int
    miss_reason: str | None


class Cache(BaseModel):
    """``reused + recomputed + missing == tokens``: the context rows, our prefix included.

    ``computed_share``: rows x layers run through the model for the context, over all there are (a full prefill is 1).
    """

    mode: str
    why: str | None
    selector: str | None
    tokens: int
    reused: int
    recomputed: int
    missing: int
    computed_share: float
    chunks: list[CacheChunk]


class LayoutSegment(BaseModel):
    """Of a dry run: prompt rows ``start <= row < stop``; ``cached`` says whether the store has their KV."""

    kind: str
    chunk_id: str | None
    start: int
    stop: int
    cached: bool | None


class Rag(BaseModel):
    results: list[Result] | None = None
    dropped: list[Result] | None = None
    timings_ms: dict[str, float]
    cache: Cache | None = None
    layout: list[LayoutSegment] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    rag: Rag | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail
