"""Keys and compile jobs: which context each chunk of a document is compiled behind.

The context is always ours: the canonical prefix, then up to a token budget (``document``) the chunks before it in the
same document or (``neighbours``) the chunks most like it. It never holds a user's text, so nobody can write into
another answer's KV (HijackKV, arXiv 2607.19957). The context's hash is part of the key, so an edited chunk in front
gives the later ones new keys.

``neighbours`` is FusionRAG's offline stage (arXiv 2601.12904) with one change: FusionRAG prefills a chunk over the
neighbours' KVs as each was compiled alone, laid side by side; here the neighbours are prefilled causally in the chunk's
own pass, so the second has read the first. Only the chunk's rows are kept. Whoever can write a document that becomes a
neighbour writes into the chunk's KV, so the caller takes neighbours from one trust domain: one tenant, one collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blend.prompt import ChunkRef
from blend.types import CompileJob
from store.key import context_hash, make_key, source_of
from store.types import KVKey, KVLayout

CompileContext = Literal["prefix", "document", "neighbours"]
_Chunks = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class KeyMaker:
    """Makes keys and jobs for one model, tokenizer, tenant and canonical ``prefix``.

    ``budget`` is the most document tokens (chunk included) one pass holds.
    """

    layout: KVLayout
    tokenizer: str
    tenant_salt: bytes
    prefix: tuple[int, ...]
    context: CompileContext = "document"
    budget: int = 4096

    def prefix_ref(self) -> ChunkRef:
        """The canonical prefix itself: compiled behind nothing, at position 0, so its KV is exact."""
        return ChunkRef("prefix", self.prefix, self._key((), self.prefix), self.source("\0prefix"))

    def document(
        self, names: Sequence[str], chunks: _Chunks, neighbours: Sequence[_Chunks] | None = None
    ) -> list[ChunkRef]:
        """References of a document's chunks, in reading order. ``names`` are chunk ids, ``chunks`` token ids.

        ``neighbours[i]`` are the chunks to stand in front of chunk i, the nearest last; the first ones are left out
        until the rest and chunk i fit the budget. Only context ``neighbours`` reads them, and it needs them: raises
        ``ValueError`` unless there is one (maybe empty) list for each chunk.
        """
        refs: list[ChunkRef] = []
        if self.context == "neighbours":
            if neighbours is None or len(neighbours) != len(chunks):
                given = "none" if neighbours is None else str(len(neighbours))
                raise ValueError(f"context neighbours needs a list for each of the {len(chunks)} chunks; {given} given")
            for name, chunk, near in zip(names, chunks, neighbours, strict=True):
                behind = self._fitting(near, chunk)
                key = self._key(self.prefix + _join(behind), chunk)
                refs.append(ChunkRef(name, chunk, key, self.source(name), behind))
            return refs
        for start, stop in self._windows(chunks):
            before: tuple[int, ...] = self.prefix + _join(chunks[start : len(refs)])
            for i in range(len(refs), stop):
                after = refs[-1].key if i > start else None
                key = self._key(before, chunks[i])
                refs.append(ChunkRef(names[i], chunks[i], key, self.source(names[i]), after=after))
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
            # No chunk has both: ``behind`` is empty unless the context is ``neighbours``, whose windows hold one chunk.
            head = _join(chunks[start:first]) + _join(refs[first].behind)
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

    def source(self, name: str) -> bytes:
        """What names chunk ``name`` in the store, whatever it was compiled behind and by which model."""
        return source_of(self.tenant_salt, name)

    def prefix_job(self) -> CompileJob:
        ref = self.prefix_ref()
        return CompileJob(ref.key.hex[:16], (), (ref.token_ids,), (ref.key,), (ref.source,))

    def _windows(self, chunks: _Chunks) -> list[tuple[int, int]]:
        """``(start, stop)``: chunks ``.. stop`` of one pass, whose context begins at chunk ``start``.

        ``document`` context: as many chunks as fit the budget; the next window keeps the second half of the budget as
        context, so no chunk but the first ones lacks at least half a budget of it. Otherwise one chunk a pass.
        """
        if self.context != "document":
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

    def _fitting(self, near: _Chunks, chunk: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The last of ``near`` that fit the budget together with ``chunk``."""
        room = self.budget - len(chunk)
        first = len(near)
        while first > 0 and len(near[first - 1]) <= room:
            first -= 1
            room -= len(near[first])
        return tuple(near[first:])

    def _key(self, before: tuple[int, ...], token_ids: tuple[int, ...]) -> KVKey:
        return make_key(
            layout=self.layout,
            tokenizer=self.tokenizer,
            tenant_salt=self.tenant_salt,
            context=context_hash(before),
            token_ids=token_ids,
        )


def _join(chunks: _Chunks) -> tuple[int, ...]:
    return tuple(t for c in chunks for t in c)
