"""A prompt for models without a chat template: instruction, chunks and question as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from blend.prompt import ChunkRef, PromptLayout
from blend.types import Prompt, Segment

__all__ = ["Layout", "PlainLayout", "PromptLayout"]


class Layout(Protocol):
    """What a workbench asks of a prompt layout: ``blend.prompt.PromptLayout``, or plain text."""

    prefix: tuple[int, ...]

    def chunk_ids(self, text: str) -> tuple[int, ...]: ...

    def build(self, chunks: Sequence[ChunkRef], messages: Sequence[Mapping[str, Any]], prefix: ChunkRef) -> Prompt: ...


class PlainLayout:
    """``instruction``, chunks and question as they are written, behind the token that the tokenizer begins texts with.

    ``tokenizer`` is a Hugging Face tokenizer. Control tokens inside a chunk or a question are tokenised as text.
    """

    def __init__(self, tokenizer: Any, *, instruction: str) -> None:
        self.tokenizer = tokenizer
        begin = getattr(tokenizer, "bos_token_id", None)
        with_begin = tokenizer(instruction, add_special_tokens=True)["input_ids"]
        self.prefix = ((begin,) if begin is not None and begin in with_begin[:1] else ()) + self.chunk_ids(instruction)
        if not self.prefix:
            raise ValueError("the instruction of a plain prompt is empty, so there is nothing to compile chunks behind")

    def chunk_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def build(self, chunks: Sequence[ChunkRef], messages: Sequence[Mapping[str, Any]], prefix: ChunkRef) -> Prompt:
        """Prefix, ``chunks`` in the given order, then the messages' texts one after the other."""
        segments = [Segment("prefix", 0, len(self.prefix), prefix.key, prefix.source, "prefix")]
        ids = list(self.prefix)
        for c in chunks:
            segments.append(Segment("chunk", len(ids), len(ids) + len(c.token_ids), c.key, c.source, c.name))
            ids.extend(c.token_ids)
        question = self.chunk_ids("".join(str(m["content"]) for m in messages))
        segments.append(Segment("question", len(ids), len(ids) + len(question)))
        return Prompt(tuple(ids) + question, tuple(segments))
