"""Request of ``POST /v1/chat/completions``: OpenAI's names, and our ``rag`` object."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from app.schema.body import Body

# Never taken from a client: they would rewrite the prompt around our prefix, or reach into the engine's caches.
REFUSED = (
    "add_generation_prompt",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "kv_transfer_params",
    "prompt_embeds",
    "prompt_logprobs",
    "prompt_token_ids",
    "vllm_xargs",
)
# OpenAI fields that change what an answer means; ignoring them would be a wrong answer.
NOT_SUPPORTED = (
    "audio",
    "function_call",
    "functions",
    "logit_bias",
    "modalities",
    "prediction",
    "response_format",
    "tool_choice",
    "tools",
    "web_search_options",
)

_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class ContentPart(Body):
    """A part of a message; only text parts can be served."""

    type: str
    text: str | None = None


class Message(Body):
    """One turn. Fields that clients send back from earlier answers are known and ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class RankingOptions(Body):
    """``ranker``: OpenAI's names mean the server's default; ``hybrid``, ``dense``, ``text`` choose one."""

    ranker: str | None = None
    score_threshold: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class BlendRequest(Body):
    mode: Literal["auto", "blend", "reuse", "full"] | None = None
    selector: str | None = None
    recompute_ratio: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class RagDocument(Body):
    """A document of this request only: ``{title, text}``, or Cohere's ``{id, data: {title, snippet}}``."""

    id: Annotated[str, Field(max_length=256)] | None = None
    title: str | None = None
    text: str | None = None
    data: dict[str, Any] | None = None


class RagRequest(Body):
    enabled: bool = True
    vector_store_ids: Annotated[list[str], Field(max_length=16)] | None = None
    max_num_results: Annotated[int, Field(ge=1)] | None = None
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions | None = None
    max_context_tokens: Annotated[int, Field(ge=1)] | None = None
    documents: list[RagDocument] | None = None
    include_results: bool = True
    dry_run: bool = False
    blend: BlendRequest | None = None


class ChatRequest(Body):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: _Int64 | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    rag: RagRequest | None = None

    # accepted and ignored: they ask for nothing that changes the answer
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
