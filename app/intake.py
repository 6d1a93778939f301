"""A chat request, checked and resolved: which model, which collections, which prompt, how to sample and blend."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

from app.errors import BadRequestError, ModelNotFoundError, UnsupportedParameterError
from app.rag import Grounding, Query, RequestDocument
from app.schema.chat import NOT_SUPPORTED, REFUSED, ChatRequest, Message, RagDocument, RagRequest
from blend.certificate import Certificate
from blend.decide import settle
from blend.select import open_selector
from blend.types import BlendOptions, Prompt, Request, Sampling
from retriever.search import Mode
from store.errors import StoreError

if TYPE_CHECKING:
    from app.service import Service
    from app.settings import Limits, Settings

log = logging.getLogger(__name__)
DEFAULT_MAX_TOKENS = 256
_OPENAI_RANKERS = ("none", "auto", "default-2024-08-21", "default-2024-11-15")
_HARMLESS: dict[str, tuple[Any, ...]] = {  # values that ask for nothing we lack
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "logit_bias": ({},),
}


@dataclass(frozen=True)
class Call:
    """One chat call, ready for the engine. ``grounding`` is ``None`` without retrieval; ``guarded`` says why the guard
    wants more recomputation than was asked for, if it does."""

    id: str
    begin: float
    created: int
    body: ChatRequest
    question: str
    prompt: Prompt
    grounding: Grounding | None
    blend: BlendOptions
    guarded: str | None
    requests: tuple[Request, ...]

    @property
    def dry_run(self) -> bool:
        return self.body.rag is not None and self.body.rag.dry_run


def refuse(value: dict[str, Any]) -> None:
    """Stop at fields that are never taken from a client, and at those whose silent loss would change the answer."""
    for name in REFUSED:
        if value.get(name) is not None:
            raise UnsupportedParameterError(f"{name} is not accepted from clients; remove it", param=name)
    for name in NOT_SUPPORTED:
        given = value.get(name)
        if given is not None and given not in _HARMLESS.get(name, ()):
            raise UnsupportedParameterError(f"{name} is not supported yet; remove it", param=name)
        value.pop(name, None)


async def prepare(service: Service, body: ChatRequest) -> Call:
    """Check ``body``, retrieve, build the prompt. Raises what the table in ``app.errors`` lists."""
    begin, settings = time.perf_counter(), service.settings
    collection = resolve_model(body.model, settings.served_name)
    _check_limits(body, settings.limits)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, max(1, service.rag.max_context // 4))
    messages = [_plain_message(m, i) for i, m in enumerate(body.messages)]
    query = make_query(body.rag, collection, settings)
    grounding: Grounding | None = None
    guarded: str | None = None
    if query is None:
        blend = BlendOptions(mode="full")
        prompt = await asyncio.to_thread(service.rag.plain, messages, max_tokens)
    else:
        blend = _blend_options(body.rag, settings, service.engine.certificate)
        open_selector(blend.selector, layers=service.engine.info.layout.layers)
        grounding = await asyncio.to_thread(service.rag.ground, messages, query, max_tokens)
        prompt = grounding.prompt
        blend, guarded = service.guard.adjust(blend, grounding.collections)
        if settings.store.prefetch and blend.mode != "full" and not (body.rag and body.rag.dry_run):
            await asyncio.to_thread(_prefetch, service, prompt)
    call_id = f"chatcmpl-{uuid.uuid4().hex}"
    requests = tuple(
        Request(f"{call_id}-{i}", prompt, _sampling(body, max_tokens, i), blend, service.tenant_salt)
        for i in range(body.n or 1)
    )
    question = next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")
    return Call(call_id, begin, int(time.time()), body, question, prompt, grounding, blend, guarded, requests)


def _prefetch(service: Service, prompt: Prompt) -> None:
    """Fetch the chunks' KV ahead of the engine's turn: from here on it comes from the device while requests queue."""
    try:
        service.engine.store.prefetch([s.key for s in prompt.segments if s.key is not None])
    except StoreError as e:
        log.warning("prefetch failed, the chunks are read when their turn comes: %s", e)


def resolve_model(name: str, served: str) -> str | None:
    """``NAME`` -> ``None``, ``NAME:COLLECTION`` -> the collection. Raises ``ModelNotFoundError``."""
    if name == served:
        return None
    if name.startswith(served + ":"):
        return name[len(served) + 1 :]
    raise ModelNotFoundError(
        f"no model {name[:200]!r}; this server has {served!r}, and {served + ':COLLECTION'!r} to ask a collection"
    )


def make_query(rag: RagRequest | None, collection: str | None, settings: Settings) -> Query | None:
    """What to retrieve; ``None``: nothing. Retrieval runs only when the model name or ``rag`` asks for it."""
    if (rag is None and collection is None) or (rag is not None and not rag.enabled):
        return None
    rag = rag or RagRequest()
    documents = tuple(_document(d, i) for i, d in enumerate(rag.documents or ()))
    if rag.vector_store_ids is not None:
        collections = tuple(dict.fromkeys(rag.vector_store_ids))
    elif collection is not None:
        collections = (collection,)
    else:
        collections = () if documents else ("default",)
    if not collections and not documents:
        raise BadRequestError(
            "rag.vector_store_ids is empty and there are no rag.documents; name a collection",
            param="rag.vector_store_ids",
        )
    k = rag.max_num_results or settings.retrieval.max_num_results
    if k > settings.limits.max_num_results:
        raise BadRequestError(
            f"rag.max_num_results is {k}; at most {settings.limits.max_num_results} are allowed",
            param="rag.max_num_results",
        )
    ranking = rag.ranking_options
    return Query(
        collections=collections,
        k=k,
        neighbours=settings.retrieval.neighbours,
        mode=_ranker(ranking.ranker if ranking else None, settings),
        filters=rag.filters,
        score_threshold=ranking.score_threshold if ranking else None,
        max_context_tokens=rag.max_context_tokens,
        documents=documents,
    )


def _ranker(name: str | None, settings: Settings) -> Mode:
    if name is None or name in _OPENAI_RANKERS:
        return settings.retrieval.mode
    if name not in get_args(Mode):
        choices = ", ".join((*get_args(Mode), *_OPENAI_RANKERS))
        raise BadRequestError(
            f"rag.ranking_options.ranker {name[:100]!r} is unknown; choose one of {choices}",
            param="rag.ranking_options.ranker",
        )
    return cast(Mode, name)


def _document(document: RagDocument, index: int) -> RequestDocument:
    data, where = document.data or {}, f"rag.documents[{index}]"
    text = document.text if document.text is not None else data.get("text", data.get("snippet"))
    if not isinstance(text, str) or not text.strip():
        raise BadRequestError(f"{where} has no text; give text, or data.text or data.snippet", param=f"{where}.text")
    title = document.title if document.title is not None else data.get("title")
    name = document.id or f"document-{index}"
    return RequestDocument(name, title if isinstance(title, str) else name, text)


def _blend_options(rag: RagRequest | None, settings: Settings, certificate: Certificate | None) -> BlendOptions:
    asked, default = rag.blend if rag else None, settings.blend
    selector = (asked.selector if asked else None) or default.selector
    ratio = asked.recompute_ratio if asked else None
    mode = (asked.mode if asked else None) or default.mode
    return settle(mode, selector, default.recompute_ratio if ratio is None else ratio, certificate)


def _check_limits(body: ChatRequest, limits: Limits) -> None:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for name, value, most in (
        ("messages", len(body.messages), limits.messages),
        ("n", body.n or 1, limits.n),
        ("stop", len(stop), limits.stop),
        ("top_logprobs", body.top_logprobs or 0, limits.top_logprobs),
    ):
        if value > most:
            raise BadRequestError(f"{name}: {value} is more than the {most} allowed here", param=name)
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise BadRequestError("stream_options needs stream to be true", param="stream_options")
    if any(not s for s in stop):
        raise BadRequestError("stop holds an empty string", param="stop")


def _sampling(body: ChatRequest, max_tokens: int, index: int) -> Sampling:
    """Sampling of answer ``index``: with a seed each of ``n`` answers has its own, or all would be equal."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=None if body.seed is None else (body.seed + index + 2**63) % 2**64 - 2**63,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _plain_message(message: Message, index: int) -> dict[str, Any]:
    """Role and text; nothing else of a message reaches the template."""
    content = message.content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if part.type not in ("text", "input_text"):
                raise UnsupportedParameterError(
                    f"messages[{index}].content[{i}] is of type {part.type[:50]!r}; only text can be served",
                    param=f"messages[{index}].content[{i}].type",
                )
        content = "\n".join(part.text or "" for part in content)
    if content is None and message.role != "assistant":
        raise BadRequestError(f"messages[{index}].content is missing", param=f"messages[{index}].content")
    return {"role": message.role, "content": content or ""}
