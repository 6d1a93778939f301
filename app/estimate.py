"""What precomputing would take, before any of it is done: tokens, bytes in every codec, minutes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.rag import References
from app.rates import Rate
from app.settings import Settings
from blend.keys import KeyMaker
from blend.prompt import ChunkRef, PromptLayout
from blend.types import CompileJob
from retriever.chunk import chunk
from retriever.errors import UnknownDocumentError
from retriever.types import Document, DocumentInfo
from store.base import KVStore
from store.codec import CODECS
from store.types import KVKey, KVLayout

GIB = 2**30


@dataclass
class Work:
    """What would be compiled: ``chunks`` of ``documents``, ``tokens`` of theirs whose KV would be stored, and
    ``compile_tokens`` that run through the model for it, contexts included, in ``passes``.

    ``present``: chunks that the store has already. ``bytes``: payload by codec. ``assumed``: chunks whose neighbours
    are not known yet; for each, as many tokens as usual stand in front. ``longest``: the largest pass.
    """

    documents: int = 0
    chunks: int = 0
    present: int = 0
    tokens: int = 0
    compile_tokens: int = 0
    passes: int = 0
    assumed: int = 0
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CODECS, 0))
    longest: CompileJob | None = None


class Estimator:
    """Adds documents up in ``work``. ``store`` ``None``: nothing is stored yet."""

    def __init__(self, keys: KeyMaker, layout: PromptLayout, store: KVStore | None, settings: Settings) -> None:
        self._keys, self._layout, self._store, self._settings = keys, layout, store, settings
        self._seen: set[KVKey] = set()
        self.work = Work()
        prefix = keys.prefix_ref()
        if not self._has(prefix.key):
            self._add([keys.prefix_job()])

    def ingested(self, references: References, documents: Iterable[DocumentInfo]) -> None:
        """Documents of the catalogue."""
        for document in documents:
            try:
                self._document(references.of(document))
            except UnknownDocumentError:
                continue  # deleted meanwhile

    def incoming(self, documents: Iterable[Document]) -> None:
        """Documents as ingesting them would cut them."""
        for document in documents:
            found = chunk(document, self._layout.count_tokens, chunk_tokens=self._settings.chunk_tokens)
            self.ready_made([c.text for c in found])

    def ready_made(self, texts: Sequence[str]) -> None:
        """One document of these chunks."""
        ids = [self._layout.chunk_ids(text) for text in texts]
        # Their names are in no key, and neither the store nor anybody else hears of them.
        self._document(self._keys.document([""] * len(ids), ids, [()] * len(ids)))

    def _document(self, refs: Sequence[ChunkRef]) -> None:
        wanted = [not self._has(r.key) for r in refs]
        self.work.documents += 1
        self.work.chunks += len(refs)
        self.work.present += len(refs) - sum(wanted)
        self._add(self._keys.jobs(refs, wanted))
        if self._keys.context == "neighbours" and refs:
            usual = self._settings.compile.neighbours * sum(len(r.token_ids) for r in refs) // len(refs)
            for ref in (r for r, w in zip(refs, wanted, strict=True) if w and not r.behind):
                self.work.assumed += 1
                self.work.compile_tokens += max(0, min(usual, self._keys.budget - len(ref.token_ids)))

    def _add(self, jobs: Iterable[CompileJob]) -> None:
        work = self.work
        for job in jobs:
            work.passes += 1
            work.compile_tokens += job.tokens
            if work.longest is None or job.tokens > work.longest.tokens:
                work.longest = job
            for ids, key in zip(job.chunks, job.keys, strict=True):
                if self._has(key):  # compiled along, between two that are missing
                    continue
                self._seen.add(key)
                work.tokens += len(ids)
                for name, codec in CODECS.items():
                    work.bytes[name] += self._keys.layout.layers * codec.plane_bytes(self._keys.layout, len(ids))

    def _has(self, key: KVKey) -> bool:
        return key in self._seen or (self._store is not None and self._store.contains(key))


@dataclass(frozen=True)
class Estimate:
    """``work``, and what it means here. ``room_bytes``: what the store may still take, by ``store.max_gib`` and by the
    device. ``rate`` ``None``: it was never measured here, so nobody knows how long it takes."""

    work: Work
    layout: KVLayout
    codec: str
    stored_bytes: int
    limit_bytes: int | None
    room_bytes: int
    rate: Rate | None

    @property
    def bytes(self) -> int:
        """In the codec that is set; ``auto``: at most."""
        return self.work.bytes[self.codec] if self.codec in self.work.bytes else max(self.work.bytes.values())

    @property
    def fits(self) -> bool:
        """Without evicting anything."""
        return self.bytes <= self.room_bytes

    @property
    def seconds(self) -> float | None:
        return None if self.rate is None else self.work.compile_tokens / self.rate.tokens_per_s

    def view(self) -> dict[str, Any]:
        w, rate = self.work, self.rate
        return {
            "object": "estimate",
            "documents": w.documents,
            "chunks": w.chunks,
            "precomputed": w.present,
            "tokens": w.tokens,
            "compile_tokens": w.compile_tokens,
            "passes": w.passes,
            "assumed_neighbours": w.assumed,
            "dtype": self.layout.dtype,
            "codec": self.codec,
            "gib": _gib(self.bytes),
            "gib_by_codec": {name: _gib(size) for name, size in w.bytes.items()},
            "stored_gib": _gib(self.stored_bytes),
            "max_gib": None if self.limit_bytes is None else _gib(self.limit_bytes),
            "room_gib": _gib(self.room_bytes),
            "fits": self.fits,
            "minutes": None if self.seconds is None else self.seconds / 60,
            "tokens_per_s": None if rate is None else rate.tokens_per_s,
            "measured_at": None if rate is None else int(rate.measured),
        }


def estimate(
    work: Work, keys: KeyMaker, store: KVStore | None, settings: Settings, rate: Rate | None, codec: str | None = None
) -> Estimate:
    """``work`` for this machine and these settings, in ``codec`` (default: as set). Raises ``StoreError``."""
    held = 0
    if store is not None:
        stats = store.stats()
        # The tier on disk is the last one, and what it takes counts, dead bytes too.
        held = stats.tiers[-1].held_bytes if stats.tiers else stats.bytes
    limit = settings.store_config.max_bytes
    free = shutil.disk_usage(_existing(settings.store_dir)).free
    room = free if limit is None else min(free, max(0, limit - held))
    return Estimate(work, keys.layout, codec or settings.store.codec, held, limit, room, rate)


def summary(found: Mapping[str, Any]) -> list[str]:
    """What an estimate's ``view`` says, in lines."""
    todo = found["chunks"] - found["precomputed"]
    lines = [
        f"{found['documents']} documents, {found['chunks']} chunks, {found['precomputed']} of them precomputed; "
        f"{todo} to compile: {found['tokens']} tokens to store, {found['compile_tokens']} through the model"
    ]
    limit = "no limit is set" if found["max_gib"] is None else f"of {found['max_gib']:.3g} GiB, the limit"
    lines.append(
        f"{found['gib']:.3g} GiB in {found['codec']} ({found['dtype']}); {found['stored_gib']:.3g} GiB are stored, "
        f"{limit}; there is room for {found['room_gib']:.3g}: "
        + ("it fits" if found["fits"] else "it does NOT fit, the least valuable chunks will go")
    )
    if todo and found["minutes"] is not None:
        lines.append(f"about {found['minutes']:.3g} minutes at {found['tokens_per_s']:.0f} tokens/s, as measured here")
    elif todo:
        lines.append("how long it takes is not known: this model was not compiled with here yet (try --measure)")
    if found["assumed_neighbours"]:
        lines.append(f"{found['assumed_neighbours']} chunks have no neighbours yet; some were assumed for their time")
    return lines


def _gib(size: int) -> float:
    return size / GIB


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
