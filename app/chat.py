"""``/v1/chat/completions``: one call answered whole or as a stream of events, from the same parts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from app.citations import MarkerFilter, cite
from app.generation import Generation
from app.intake import Call, prepare
from app.report import annotation, fingerprint, layout_report, logprobs, rag_report, usage
from app.schema.answer import Annotation, Choice, Completion, Message, Rag, Usage
from app.schema.chat import ChatRequest
from blend.errors import EngineError
from blend.types import BlendStats, Delta

if TYPE_CHECKING:
    from app.service import Service


class _Answer:
    """One of ``n`` answers while it grows."""

    def __init__(self, call: Call) -> None:
        self.markers = MarkerFilter(len(call.grounding.passages) if call.grounding else 0)
        self.parts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.tokens = 0
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def take(self, delta: Delta) -> str:
        """Add a delta; returns the text that can be shown now."""
        shown = self.markers.feed(delta.text) if delta.text else ""
        if delta.finish_reason is not None:
            if delta.finish_reason == "abort":
                raise EngineError("the engine aborted the request")
            self.finish_reason = delta.finish_reason
            shown += self.markers.close()
        self.tokens += len(delta.token_ids)
        self.logprobs += logprobs(delta)
        self.parts.append(shown)
        return shown


class Chat:
    """A call in progress: its answers, and what the first delta told about the cache."""

    def __init__(self, service: Service, call: Call) -> None:
        self.service, self.call = service, call
        self.answers = [_Answer(call) for _ in call.requests]
        self.stats: BlendStats | None = None
        self.cached: int | None = None
        self.ttft_ms: float | None = None
        self.begin, self.alone = time.perf_counter(), service.traffic.running == 1 and len(call.requests) == 1
        self.watch = service.guard.watch(call)
        requests = call.requests if self.watch is None else (self.watch.request, *call.requests[1:])
        self.generation = Generation(service.engine, requests, service.settings.limits.request_s)

    def watched(self, index: int, delta: Delta) -> Delta:
        """``delta`` as the client asked for it, after the guard has seen it."""
        if self.watch is None or index != 0:
            return delta
        was_ready = self.watch.ready
        delta = self.watch.take(delta)
        if self.watch.ready and not was_ready:
            self.service.guard.offer(self.watch)
        return delta

    def take(self, index: int, delta: Delta) -> str:
        """Account for a delta of answer ``index``; returns the text that can be shown now."""
        if self.ttft_ms is None:
            seconds = time.perf_counter() - self.call.begin
            self.ttft_ms = round(seconds * 1000, 3)
            path = delta.stats.mode if delta.stats and self.call.grounding else "plain"
            self.service.metrics.ttft.labels(path).observe(seconds)
            if path == "full" and self.alone and self.service.traffic.running == 1:
                computed = len(self.call.prompt.token_ids) - (delta.cached_tokens or 0)
                self.service.metrics.prefill.saw_full(computed, time.perf_counter() - self.begin)
        if delta.stats is not None and self.call.grounding is not None:
            if self.stats is None:
                self.stats = delta.stats
            self.service.metrics.count_blend(delta.stats)
        if delta.cached_tokens is not None and self.cached is None:
            self.cached = delta.cached_tokens
        return self.answers[index].take(delta)

    async def annotations(self, index: int) -> list[Annotation]:
        answer = self.answers[index]
        if answer.markers.removed:
            self.service.metrics.invalid_citations.inc(answer.markers.removed)
        if self.call.grounding is None:
            return []
        found = await asyncio.to_thread(cite, answer.text, self.call.question, self.call.grounding.passages)
        return [annotation(c) for c in found]

    def rag(self) -> Rag | None:
        return rag_report(self.call, self.stats, self.ttft_ms)

    def usage(self) -> Usage:
        return usage(self.call, sum(a.tokens for a in self.answers), self.stats, self.cached)

    def unfinished(self) -> bool:
        return any(a.finish_reason is None for a in self.answers)


async def complete(service: Service, body: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    with service.traffic.enter():
        call = await prepare(service, body)
        chat = Chat(service, call)
        if call.dry_run:
            return await _dry_run(service, chat)
        async with chat.generation as deltas:
            async for index, delta in deltas:
                chat.take(index, chat.watched(index, delta))
        if chat.unfinished():
            raise EngineError("the engine ended an answer without a reason")
        choices = [
            Choice(
                index=i,
                message=Message(content=a.text, annotations=await chat.annotations(i)),
                logprobs={"content": a.logprobs, "refusal": None} if body.logprobs else None,
                finish_reason=a.finish_reason or "stop",
            )
            for i, a in enumerate(chat.answers)
        ]
        return _completion(service, chat, choices)


async def stream(service: Service, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    """OpenAI chunks: role and ``rag`` first, text as it comes, annotations with the last text, then the finish reason.

    Raises as ``complete`` does. Closing the iterator aborts the engine's requests.
    """
    with service.traffic.enter():
        call = await prepare(service, body)
        chat = Chat(service, call)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        base: dict[str, Any] = {
            "id": call.id,
            "object": "chat.completion.chunk",
            "created": call.created,
            "model": body.model,
            "system_fingerprint": fingerprint(service.engine.info),
        }
        if call.dry_run:
            yield base | {"choices": [], "rag": (await _dry_run(service, chat))["rag"]}
            return
        if include_usage:
            base["usage"] = None
        started: set[int] = set()
        async with chat.generation as deltas:
            async for index, delta in deltas:
                delta = chat.watched(index, delta)
                shown = chat.take(index, delta)
                if index not in started:
                    first = base | {"choices": [_piece(index, {"role": "assistant", "content": ""})]}
                    if not started and (rag := chat.rag()) is not None:
                        first["rag"] = rag.model_dump(mode="json", exclude_none=False, exclude={"layout"})
                    started.add(index)
                    yield first
                finish = chat.answers[index].finish_reason
                content: dict[str, Any] = {"content": shown}
                if finish is not None:
                    content["annotations"] = [a.model_dump(mode="json") for a in await chat.annotations(index)]
                tokens = {"content": logprobs(delta), "refusal": None} if body.logprobs and delta.logprobs else None
                if shown or tokens or content.get("annotations"):
                    yield base | {"choices": [_piece(index, content, tokens)]}
                if finish is not None:
                    yield base | {"choices": [_piece(index, {}, None, finish)]}
        if chat.unfinished():
            raise EngineError("the engine ended an answer without a reason")
        if include_usage:
            yield base | {"choices": [], "usage": chat.usage().model_dump(mode="json")}


def _piece(
    index: int, delta: dict[str, Any], tokens: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": tokens, "finish_reason": finish}


async def _dry_run(service: Service, chat: Chat) -> dict[str, Any]:
    """Everything but the generation."""
    answer = _completion(service, chat, [])
    layout = await asyncio.to_thread(layout_report, chat.call, service.engine.store)
    answer.setdefault("rag", Rag(timings_ms={}).model_dump(mode="json"))
    answer["rag"]["layout"] = [segment.model_dump(mode="json") for segment in layout]
    return answer


def _completion(service: Service, chat: Chat, choices: list[Choice]) -> dict[str, Any]:
    answer = Completion(
        id=chat.call.id,
        created=chat.call.created,
        model=chat.call.body.model,
        system_fingerprint=fingerprint(service.engine.info),
        choices=choices,
        usage=chat.usage(),
        rag=chat.rag(),
    ).model_dump(mode="json")
    if answer["rag"] is None:
        del answer["rag"]
    else:
        del answer["rag"]["layout"]
    return answer
