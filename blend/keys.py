"""Keys and compile jobs: which context each chunk of a document is compiled behind.

The context is always ours: the canonical prefix, then (``document``) the chunks before it in the same document up to a
token budget. It never holds a user's text, so nobody can write into another answer's KV (HijackKV, arXiv 2607.19957).
The context's hash is part of the key, so an edited earlier chunk gives the later ones new keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blend.prompt import ChunkRef
from blend.types import CompileJob
from store.key import context_hash, make_key, source_of
from store.types import KVKey, KVLayout

CompileContext = Literal["prefix", "document"]


@dataclass(frozen=True)
class KeyMaker:
    """Makes keys and jobs for one model, tokenizer, tenant and canonical ``prefix``.

    ``context`` is ``prefix`` or ``document``; ``budget`` the most document tokens (chunk included) one pass holds.
    """

    layout: KVLayout
    tokenizer: str
    tenant_salt: bytes
    prefix: tuple[int, ...]
    context: CompileContext = "document"
    budget: int = 4096

    def prefix_ref(self) -> ChunkRef:
        """The canonical prefix itself: compiled behind nothing, at position 0, so its KV is exact."""
        return ChunkRef("prefix", self.prefix, self._key((), self.prefix), self._source("\0prefix"))

    def document(self, names: Sequence[str], chunks: Sequence[tuple[int, ...]]) -> list[ChunkRef]:
        """References of a document's chunks, in reading order. ``names`` are chunk ids, ``chunks`` token ids."""
        refs: list[ChunkRef] = []
        for start, stop in self._windows(chunks):
            before: tuple[int, ...] = self.prefix + _join(chunks[start : len(refs)])
            for i in range(len(refs), stop):
                refs.append(ChunkRef(names[i], chunks[i], self._key(before, chunks[i]), self._source(names[i])))
                before = self.prefix if self.context == "prefix" else before + chunks[i]
        return refs

    def jobs(self, refs: Sequence[ChunkRef], wanted: Sequence[bool] | None = None) -> list[CompileJob]:
        """Passes that compile the ``wanted`` (default all) of a document's ``refs``; each pass one window."""
        chunks = [r.token_ids for r in refs]
        need = list(wanted) if wanted is not None else [True] * len(refs)
        jobs: list[CompileJob] = []
        done = 0
        for start, stop in self._windows(chunks):
            todo = [i for i in range(done, stop) if need[i]]
            done = stop
            if not todo:
                continue
            first, last = todo[0], todo[-1]
            head = () if self.context == "prefix" else _join(chunks[start:first])
            group = refs[first : last + 1]
            jobs.append(
                CompileJob(
                    id=group[0].key.hex[:16],
                    context=self.prefix + head,
                    chunks=tuple(r.token_ids for r in group),
                    keys=tuple(r.key for r in group),
                    sources=tuple(r.source for r in group),
                )
            )
        return jobs

    def prefix_job(self) -> CompileJob:
        ref = self.prefix_ref()
        return CompileJob(ref.key.hex[:16], (), (ref.token_ids,), (ref.key,), (ref.source,))

    def _windows(self, chunks: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
        """``(start, stop)``: chunks ``.. stop`` of one pass, whose context begins at chunk ``start``.

        ``prefix`` context: one chunk a pass. ``document``: as many as fit the budget; the next window keeps the
        second half of the budget as context, so no chunk but the first ones lacks at least half a budget of it.
        """
        if self.context == "prefix":
            return [(i, i + 1) for i in range(len(chunks))]
        windows: list[tuple[int, int]] = []
        start = stop = 0
        while stop < len(chunks):
            used = sum(len(c) for c in chunks[start:stop])
            first = stop
            while stop < len(chunks) and (stop == first or used + len(chunks[stop]) <= self.budget):
                used += len(chunks[stop])
                stop += 1
            windows.append((start, stop))
            start, kept = stop, 0
            while start > 0 and kept + len(chunks[start - 1]) <= self.budget // 2:
                start -= 1
                kept += len(chunks[start])
        return windows

    def _key(self, before: tuple[int, ...], token_ids: tuple[int, ...]) -> KVKey:
        return make_key(
            layout=self.layout,
            tokenizer=self.tokenizer,
            tenant_salt=self.tenant_salt,
            context=context_hash(before),
            token_ids=token_ids,
        )

    def _source(self, name: str) -> bytes:
        return source_of(self.tenant_salt, name)


def _join(chunks: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(t for c in chunks for t in c)
