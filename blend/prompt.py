"""Prompt layout: canonical prefix, chunks, then everything the user said.

    prefix   BOS, the served chat template's system header, our instruction
    chunk    each chunk tokenised on its own (so its ids never depend on its neighbours), joined by ids
    question the rest of the template: client system text, history, the last user message, generation prompt

The passages stand inside the system message, so the prefix is the same for every request and any number of turns may
follow. Nothing is tokenised across a segment boundary; that is what makes a chunk's ids position-independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from blend.errors import BlendError
from blend.types import Prompt, Segment
from store.types import KVKey

INSTRUCTION = "Answer the question from the passages."
CHUNK_END = "\n\n"
_MARK = "\u2063passages\u2063"


class TemplateError(BlendError):
    """The chat template cannot place passages; the message says why."""


@dataclass(frozen=True)
class ChunkRef:
    """One chunk ready for a prompt: the caller's ``name``, its ids, and where its KV is stored.

    ``behind``: the neighbours it is compiled behind, the nearest last; only in the compile context ``neighbours``.
    ``after``: the chunk of its document that it is compiled right behind; only in the compile context ``document``.
    """

    name: str
    token_ids: tuple[int, ...]
    key: KVKey
    source: bytes
    behind: tuple[tuple[int, ...], ...] = ()
    after: KVKey | None = None


class PromptLayout:
    """Builds prompts for one tokenizer with a chat template (a Hugging Face tokenizer).

    ``prefix`` is the canonical prefix as token ids. Control tokens of the template inside a chunk or a message are
    tokenised as plain text, so a document cannot end the system message.
    """

    def __init__(self, tokenizer: Any, *, instruction: str = INSTRUCTION) -> None:
        self.tokenizer = tokenizer
        self.instruction = instruction
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
        self.prefix, _ = self._split([{"role": "user", "content": "x"}])

    # -- public ---------------------------------------------------------------------------------------------------

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        """Ids of one chunk, ``text`` followed by a blank line, control tokens taken as text."""
        return self._text_ids(text.strip() + CHUNK_END)

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` as a chunk would have them, for the chunker."""
        return len(self._text_ids(text))

    def build(self, chunks: Sequence[ChunkRef], messages: Sequence[Mapping[str, Any]], prefix: ChunkRef) -> Prompt:
        """Prefix, then ``chunks`` in the given order, then ``messages``. ``prefix`` addresses the prefix's own KV."""
        segments = [Segment("prefix", 0, len(self.prefix), prefix.key, prefix.source, "prefix")]
        ids = list(self.prefix)
        read: set[KVKey] = set()  # chunks whose whole compile context stands before them
        for c in chunks:
            lacking = c.after is not None and c.after not in read
            if not lacking:
                read.add(c.key)
            segments.append(Segment("chunk", len(ids), len(ids) + len(c.token_ids), c.key, c.source, c.name, lacking))
            ids.extend(c.token_ids)
        before, question = self._split(messages)
        if before != self.prefix:
            raise TemplateError("the chat template's opening depends on the messages; blending needs a constant one")
        segments.append(Segment("question", len(ids), len(ids) + len(question)))
        return Prompt(tuple(ids) + question, tuple(segments))

    def plain(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """The template as it is, without retrieval: one question segment."""
        marked = [{"role": _role(m), "content": f"{_MARK}{i};"} for i, m in enumerate(messages)]
        ids = self._fill(str(self._render(marked)), [_text(m) for m in messages])
        return Prompt(ids, (Segment("question", 0, len(ids)),))

    @property
    def digest(self) -> str:
        """Hex identity of the canonical prefix (template and instruction), for reports."""
        return hashlib.sha256(repr((self.prefix, CHUNK_END)).encode()).hexdigest()[:16]

    # -- template -------------------------------------------------------------------------------------------------

    def _split(self, messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and after the place of the passages.

        Message contents are rendered as marks and tokenised on their own afterwards, so nothing a client writes is
        ever parsed as a control token. The client's own system text follows the passages.
        """
        system = "\n\n".join(_text(m) for m in messages if m.get("role") in _SYSTEM_ROLES)
        said = [m for m in messages if m.get("role") not in _SYSTEM_ROLES]
        contents = [_text(m) for m in said]
        turns = [{"role": _role(m), "content": f"{_MARK}{i};"} for i, m in enumerate(said)]
        rendered = self._render([{"role": "system", "content": f"{_MARK}s;"}, *turns], quiet=True)
        if rendered is None or f"{_MARK}s;" not in rendered:  # no system role: the passages open the first user turn
            first = next((m for m in turns if m.get("role") == "user"), None)
            if first is None:
                raise TemplateError("the messages hold no user message")
            first["content"] = f"{_MARK}s;{first['content']}"
            rendered = str(self._render(turns))
        head, _, tail = rendered.partition(f"{_MARK}s;")
        if _MARK in head:
            raise TemplateError("the chat template moves a message in front of the system text")
        before = self._template_ids(head) + self._text_ids(self.instruction + CHUNK_END)
        after = self._text_ids(system) if system else ()
        return before, after + self._fill(tail, contents)

    def _fill(self, rendered: str, contents: Sequence[str]) -> tuple[int, ...]:
        ids: tuple[int, ...] = ()
        parts = rendered.split(_MARK)
        ids += self._template_ids(parts[0])
        for part in parts[1:]:
            number, _, text = part.partition(";")
            if not number.isdigit():
                raise TemplateError("the chat template repeats the system text")
            ids += self._text_ids(contents[int(number)]) + self._template_ids(text)
        return ids

    def _render(self, messages: Sequence[Mapping[str, Any]], *, quiet: bool = False) -> str | None:
        """The template's text, or None with ``quiet`` when the template refuses the messages."""
        try:
            # Llama 3's template would print today's date into the prefix and change every key at midnight.
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
            )
        except jinja2.TemplateError as e:
            if quiet:
                return None
            raise TemplateError(f"the chat template refuses these messages: {e}") from e
        return str(text)

    def _template_ids(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_ids(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


_SYSTEM_ROLES = ("system", "developer")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _role(message: Mapping[str, Any]) -> str:
    """The template's name of the role; another one could carry control tokens, and most templates know only these."""
    role = message.get("role")
    if role not in _ROLES:
        raise TemplateError(f"role {role!r} is not supported; choose one of {', '.join(_ROLES)}")
    return _ROLES[role]


def _text(message: Mapping[str, Any]) -> str:
    """The message's text; OpenAI content parts are joined, anything but text is refused."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part.get("type") not in ("text", "input_text"):
            raise TemplateError(f"content part of type {part.get('type')!r} is not supported; send text")
        parts.append(str(part.get("text", "")))
    return "\n".join(parts)
