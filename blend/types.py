"""What flows through a blend: prompts made of segments, options, statistics.

Rows are indices of prompt tokens (0-based) and equal their positions. N context rows come before the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from store.types import KVKey, MissReason

Mode = Literal["auto", "blend", "reuse", "full"]
SegmentKind = Literal["prefix", "chunk", "question"]


@dataclass(frozen=True)
class Segment:
    """A run of prompt rows ``start <= row < stop``.

    ``key`` addresses its stored KV (``None`` for the question: it is always computed); ``source`` is the store's
    model-independent name of the chunk, ``name`` the caller's id (a chunk id), for reports only. ``lacking``: its KV
    was compiled behind chunks of its document that do not stand before it here, so it knows more than the prompt says.
    """

    kind: SegmentKind
    start: int
    stop: int
    key: KVKey | None = None
    source: bytes = b""
    name: str = ""
    lacking: bool = False

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Prompt:
    """Token ids and the segments that tile them: ``prefix, chunk..., question`` in order, without holes."""

    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        at = 0
        for s in self.segments:
            if s.start != at or s.stop < s.start:
                raise ValueError(f"segment {s.kind} {s.start}..{s.stop} does not continue at row {at}")
            at = s.stop
        if at != len(self.token_ids):
            raise ValueError(f"segments end at row {at}, the prompt has {len(self.token_ids)} tokens")
        if not self.segments or self.segments[-1].kind != "question" or self.question.tokens == 0:
            raise ValueError("a prompt ends with a non-empty question segment")

    @property
    def question(self) -> Segment:
        return self.segments[-1]

    @property
    def context_tokens(self) -> int:
        """N: rows before the question."""
        return self.question.start


@dataclass(frozen=True)
class BlendOptions:
    """How one request wants its context: ``recompute_ratio`` of the context rows, chosen by ``selector``."""

    mode: Mode = "auto"
    selector: str = "auto"
    recompute_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "blend", "reuse", "full"):
            raise ValueError(f"blend mode {self.mode!r} is unknown; choose auto, blend, reuse or full")
        if not 0.0 <= self.recompute_ratio <= 1.0:
            raise ValueError(f"recompute_ratio {self.recompute_ratio} is not within 0..1")


@dataclass(frozen=True)
class ChunkStats:
    """What happened to one segment: rows reused and recomputed, or the reason it was not in the store."""

    name: str
    tokens: int
    reused: int
    recomputed: int
    missing: int
    tier: str | None = None
    miss_reason: MissReason | None = None


@dataclass(frozen=True)
class BlendStats:
    """Accounting of one request; ``reused + recomputed + missing == tokens`` (invariant 6).

    ``mode`` is what was done (``blend``, ``reuse`` or ``full``) and ``why`` one phrase when ``auto`` decided.
    Missing rows are computed too, but were never in the store. A row is ``recomputed`` if a selector chose it.
    ``computed_share``: context rows x layers run through the model, over all there are, the cost against full prefill.
    Check layers, rows left half way and second rounds count; above 1 if rows ran twice.

    Seconds: ``load_s`` stored KV was looked up and read, for the most part while something was computed; ``wait_s`` of
    them the blend stood still for it; ``blend_s`` is the rest of the blend, without ``wait_s``. ``loaded_bytes`` of K
    and V were read, in the layout's dtype.
    """

    mode: str
    tokens: int
    reused: int
    recomputed: int
    missing: int
    load_s: float = 0.0
    blend_s: float = 0.0
    selector: str | None = None
    why: str | None = None
    chunks: tuple[ChunkStats, ...] = ()
    computed_share: float = 0.0
    wait_s: float = 0.0
    loaded_bytes: int = 0

    def __post_init__(self) -> None:
        if self.reused + self.recomputed + self.missing != self.tokens:
            raise ValueError(
                f"reused {self.reused} + recomputed {self.recomputed} + missing {self.missing} "
                f"are not the {self.tokens} context tokens"
            )


@dataclass(frozen=True)
class Sampling:
    """Decoding parameters, OpenAI names and meanings; ``logprobs`` is the number of top log-probabilities or None."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token with its log-probability and the ``top`` alternatives ``(token id, text, logprob)``."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of a running answer.

    ``text`` and ``token_ids`` are what is new. The first delta of a request carries ``stats`` and ``cached_tokens``
    (prompt rows that were not computed). ``finish_reason`` (``stop``, ``length``, ``abort``) ends the stream.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stats: BlendStats | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Request:
    """One generation. ``tenant_salt`` (32 secret bytes) separates tenants in every cache.

    ``priority``: where requests wait for the engine, lower numbers go first.
    """

    id: str
    prompt: Prompt
    sampling: Sampling
    blend: BlendOptions
    tenant_salt: bytes
    extra: dict[str, Any] = field(default_factory=dict)
    priority: int = 0


@dataclass(frozen=True)
class CompileJob:
    """Compile one run of chunks behind one context.

    ``context`` are token ids whose rows are dropped (canonical prefix, and earlier chunks of the document);
    ``chunks`` follow it in order and are compiled in one pass: chunk i sees the context and chunks 0..i-1.
    ``keys[i]`` and ``sources[i]`` name chunk i in the store; ``owner`` (a tenant) is whose share of it they count
    against.
    """

    id: str
    context: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    keys: tuple[KVKey, ...]
    sources: tuple[bytes, ...]
    owner: str = "default"

    @property
    def tokens(self) -> int:
        return len(self.context) + sum(len(c) for c in self.chunks)


@dataclass(frozen=True)
class CompileResult:
    """Chunks compiled, tokens run through the model, bytes stored, seconds.

    ``refused`` chunks were not stored: a full store has nothing that is worth less.
    """

    chunks: int
    tokens: int
    bytes: int
    seconds: float
    refused: int = 0
