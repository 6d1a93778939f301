"""The service: its parts, wired once, and their life cycle."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.certify.lookup import certificate_for_service, compiled_behind
from app.control import Control
from app.errors import StartError
from app.guard.guard import Guard
from app.ingest import Ingester
from app.jobs import JobRecords, Jobs
from app.metrics import Metrics
from app.pins import Pins
from app.precompute import Precomputer
from app.rag import Rag, References, TimedEmbedder
from app.rates import Rates
from app.settings import Settings
from app.traffic import Traffic
from app.upkeep import Upkeep
from blend.engines import Engine, EngineConfig, open_engine
from blend.errors import UnknownSelectorError
from blend.keys import KeyMaker
from blend.prompt import CHUNK_END, PromptLayout
from blend.select import open_selector
from retriever.embed import Embedder, open_embedder
from retriever.retriever import Retriever
from store.errors import StoreError

_SALT_BYTES = 32
log = logging.getLogger(__name__)


class SharedTokenizer:
    """A Hugging Face tokenizer that several threads may use.

    ``split_special_tokens`` is a switch inside the one tokenizer object: without the lock, one thread's template could
    turn another thread's document text into control tokens.
    """

    def __init__(self, inner: Any) -> None:
        self._inner, self._lock = inner, threading.Lock()
        self.chat_template = getattr(inner, "chat_template", None)

    def __call__(self, text: str, **options: Any) -> Any:
        with self._lock:
            return self._inner(text, **options)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        with self._lock:
            return self._inner.apply_chat_template(messages, **options)


class Service:
    """Everything one server holds. Open with ``await Service.open(settings)``, end with ``await service.close()``."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        layout: PromptLayout,
        retriever: Retriever,
        tenant_salt: bytes,
    ) -> None:
        info = engine.info
        try:
            open_selector(settings.blend.selector, layers=info.layout.layers)
        except UnknownSelectorError as e:
            raise StartError(f"blend.selector cannot be used: {e}") from e
        self.settings, self.engine, self.layout = settings, engine, layout
        self.retriever, self.tenant_salt = retriever, tenant_salt
        self.keys = KeyMaker(
            layout=info.layout,
            tokenizer=info.tokenizer,
            tenant_salt=tenant_salt,
            prefix=layout.prefix,
            context=settings.compile.context,
            budget=compile_budget(settings, info.max_context - len(layout.prefix), layout),
        )
        self.metrics = Metrics()
        self.traffic = Traffic(settings.limits.requests)
        self.references = References(retriever, layout, self.keys)
        self.rag = Rag(retriever, layout, self.references, info.max_context)
        self.rates, pins = Rates(settings.data_dir), Pins(settings.data_dir)
        self.control = Control(engine.store, retriever, tenant_salt, pins, self.references)
        self.upkeep = Upkeep(engine.store, self.metrics.store)
        self.precomputer = Precomputer(
            engine, retriever, self.references, self.traffic, neighbours=settings.compile.neighbours,
            pins=pins, rates=self.rates, prefill=self.metrics.prefill,
        )  # fmt: skip
        self.guard = Guard(
            engine, settings.guard, self.traffic, self.metrics, folder=settings.data_dir,
            timeout_s=settings.limits.request_s,
        )  # fmt: skip
        self.jobs: Jobs | None = None

    @classmethod
    async def open(
        cls,
        settings: Settings,
        *,
        engine: Engine | None = None,
        tokenizer: Any = None,
        embedder: Embedder | None = None,
        jobs: bool = True,
    ) -> Service:
        """Start every part. ``engine`` (closed with the service), ``tokenizer`` and ``embedder`` may be given;
        ``jobs=False`` leaves ingest and precompute to the caller and compares no answers. Raises ``StartError`` and
        the rooms' own errors."""
        if engine is None or tokenizer is None:
            _check_model(settings.model)
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
            salt = tenant_salt(settings.data_dir)
        except OSError as e:
            raise StartError(f"data_dir {settings.data_dir} cannot be used: {e.strerror or e}") from e
        if engine is None:
            engine = await open_engine(settings.engine, _engine_config(settings))
        retriever = None
        try:
            if tokenizer is None:
                tokenizer = await asyncio.to_thread(_load_tokenizer, settings.model)
            layout = PromptLayout(SharedTokenizer(tokenizer))
            if embedder is None:
                embedder = await asyncio.to_thread(open_embedder, settings.embedder)
            retriever = await asyncio.to_thread(_open_retriever, settings, TimedEmbedder(embedder), layout)
            if engine.certificate is None:
                engine.certificate = await asyncio.to_thread(
                    certificate_for_service,
                    settings.data_dir,
                    engine.info,
                    compiled_behind(settings.compile),
                    settings.store.codec,
                )
            service = cls(settings, engine, layout, retriever, salt)
            await asyncio.to_thread(service._keep_prefix)
            if jobs:
                service._start_jobs()
                service.guard.start()
            return service
        except BaseException:
            if retriever is not None:
                retriever.close()
            await engine.stop()
            raise

    async def close(self) -> None:
        """Stop taking work, finish the running compile pass, close every part. May be called twice."""
        await self.guard.close()
        jobs, self.jobs = self.jobs, None
        if jobs is not None:
            await jobs.close()
        await self.engine.stop()
        await self.upkeep.close()
        await asyncio.to_thread(self.retriever.close)

    def _keep_prefix(self) -> None:
        """Pin the canonical prefix: every prompt begins with it."""
        try:
            self.engine.store.pin([self.keys.prefix_ref().key])
        except StoreError as e:
            log.warning("the canonical prefix could not be pinned: %s", e)

    def _start_jobs(self) -> None:
        records = JobRecords(self.settings.data_dir)
        ingester = Ingester(self.retriever, self.precomputer, self.metrics, records)
        precompute = ingester.precompute if self.settings.precompute_on_ingest else None
        self.jobs = Jobs(records, ingester.ingest, precompute, limit=self.settings.limits.jobs)
        self.jobs.start()


def tenant_salt(data_dir: Path, tenant: str = "default") -> bytes:
    """The tenant's 32 secret bytes, made once. Losing the file loses no answer, only every cached KV.

    Written beside its place and linked there, so that two processes that start at once agree and a crash leaves no
    half secret. Raises ``StartError`` if the file holds anything else.
    """
    folder = data_dir / "tenants"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{tenant}.salt"
    if not path.exists():
        draft = folder / f".{secrets.token_hex(8)}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            f.write(secrets.token_bytes(_SALT_BYTES))
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            log.debug("another process made the salt first")
        finally:
            draft.unlink()
    salt = read_salt(data_dir, tenant)
    assert salt is not None
    return salt


def read_salt(data_dir: Path, tenant: str = "default") -> bytes | None:
    """``tenant_salt`` without making one. Raises ``StartError``."""
    path = data_dir / "tenants" / f"{tenant}.salt"
    try:
        salt = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StartError(f"{path} cannot be read: {e.strerror or e}") from e
    if len(salt) != _SALT_BYTES:
        raise StartError(f"{path} holds {len(salt)} bytes, a tenant salt has {_SALT_BYTES}; restore or remove it")
    return salt


def _engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        model=settings.model,
        store=settings.store_config,
        dtype=settings.dtype,
        max_context=settings.max_context,
        kv_cache_gib=settings.kv_cache_gib,
        load_timeout_s=settings.store.load_timeout_s or None,
        load_threads=settings.store.load_threads,
        device=settings.device,
        options={**settings.engine_options, "min_context_tokens": settings.blend.min_context_tokens},
    )


def _check_model(model: str) -> None:
    """A missing folder is told before anything heavy is loaded."""
    folder = Path(model)
    if not folder.is_dir():
        raise StartError(
            f"model {model!r} is not a folder; give the folder of a Hugging Face checkpoint (config.json, ...)"
        )
    if not (folder / "config.json").is_file():
        raise StartError(f"model folder {model!r} has no config.json; it does not hold a Hugging Face checkpoint")


def _load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer  # seconds to import; not needed where a tokenizer is given

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise StartError(f"the tokenizer of {model!r} cannot be loaded: {e}") from e


def _open_retriever(settings: Settings, embedder: Embedder, layout: PromptLayout) -> Retriever:
    return Retriever.open(settings.index_dir, embedder, layout.count_tokens, chunk_tokens=settings.chunk_tokens)


def compile_budget(settings: Settings, room: int, layout: PromptLayout) -> int:
    """Document tokens of one compile pass. Raises ``StartError`` if not even one chunk fits, with its neighbours."""
    chunk = settings.chunk_tokens + len(layout.chunk_ids(CHUNK_END))
    if chunk >= room:
        raise StartError(
            f"chunk_tokens {settings.chunk_tokens} does not fit the model: it leaves {room} tokens for documents"
        )
    budget = min(max(settings.compile.budget, chunk), room - 1)
    near = settings.compile.neighbours
    if settings.compile.context == "neighbours" and (near + 1) * chunk > budget:
        raise StartError(
            f"a chunk of {chunk} tokens behind compile.neighbours {near} needs {(near + 1) * chunk} tokens; "
            f"compile.budget {settings.compile.budget} and the model leave {budget}: set fewer neighbours, smaller "
            "chunk_tokens or a larger budget"
        )
    return budget
