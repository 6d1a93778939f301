"""What can be known of a service without its engine: addresses, references and the store, from the folders alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.bench import workbench
from app.choose import prefix_source
from app.control import Control
from app.errors import StartError
from app.pins import Pins
from app.rag import References
from app.service import compile_budget, read_salt
from app.settings import Settings
from app.stored import REMEDY
from blend.fingerprint import model_fingerprint, tokenizer_fingerprint
from blend.keys import KeyMaker
from blend.prompt import PromptLayout
from blend.rope import rope_from_config
from blend.support import check_supported, head_dim, kv_heads
from retriever.embed import open_embedder
from retriever.retriever import Retriever
from store.base import KVStore
from store.config import StoreConfig
from store.ssd import DamagedError, LostIndexError, SsdStore, put_aside
from store.types import DTYPES, KVLayout


@dataclass(frozen=True)
class Offline:
    """``references`` and ``retriever``: ``None`` before anything was ingested; ``store``: or stored."""

    engine: str
    keys: KeyMaker
    layout: PromptLayout
    retriever: Retriever | None
    references: References | None
    store: KVStore | None


@contextmanager
def open_control(settings: Settings, *, readonly: bool) -> Iterator[Control | None]:
    """Control of the stored KV, beside a running server or without one; ``None`` if nothing is stored yet.

    Raises ``StoreError``, ``RetrieverError``, ``StartError``.
    """
    if not settings.store_dir.is_dir():
        yield None
        return
    with ExitStack() as stack:
        store = stack.enter_context(open_disk(settings, readonly=readonly))
        retriever = stack.enter_context(_retriever(settings))
        yield Control(store, retriever, read_salt(settings.data_dir) or bytes(32), Pins(settings.data_dir))


@contextmanager
def open_offline(settings: Settings) -> Iterator[Offline]:
    """Everything that a service over ``settings`` would address its chunks by.

    Reads the weights once, for their fingerprint. Raises ``EngineError`` and ``UnsupportedModelError`` for a folder
    that cannot be served, ``StartError``, ``StoreError``, ``RetrieverError``.
    """
    folder = Path(settings.model)
    config = _config(folder)
    check_supported(config)
    engine = workbench.resolve_engine(settings.engine)
    kv = KVLayout(
        model=model_fingerprint(folder),
        layers=int(config["num_hidden_layers"]),
        heads=kv_heads(config),
        head_dim=head_dim(config),
        dtype=settings.dtype or _usual_dtype(engine, config),
        rope=rope_from_config(config, head_dim(config)).signature,
    )
    layout = PromptLayout(workbench.load_tokenizer(settings.model))
    salt = read_salt(settings.data_dir) or bytes(32)  # without a salt nothing was stored
    longest = settings.max_context or int(config["max_position_embeddings"])
    with ExitStack() as stack:
        store = None
        if settings.store_dir.is_dir():
            store = stack.enter_context(open_disk(settings, readonly=True))
            if settings.dtype is None:
                kv = _stored_layout(kv, store, salt)
        keys = KeyMaker(
            layout=kv,
            tokenizer=tokenizer_fingerprint(folder),
            tenant_salt=salt,
            prefix=layout.prefix,
            context=settings.compile.context,
            budget=compile_budget(settings, longest - len(layout.prefix), layout),
        )
        retriever = stack.enter_context(_retriever(settings))
        references = References(retriever, layout, keys) if retriever is not None else None
        yield Offline(engine, keys, layout, retriever, references, store)


@contextmanager
def open_disk(settings: Settings, *, readonly: bool, repair: bool = False) -> Iterator[SsdStore]:
    """This process's own view of the store on disk; made if it is not there, unless ``readonly``.

    ``repair``: an index that cannot be opened is put aside and made anew from the segments. That of another program or
    format is not: its segments would be lost. Raises ``StoreError``; what repair would mend says so.
    """
    config = settings.store_config
    try:
        store = _opened(config.reading() if readonly else replace(config, ram_bytes=0), repair)
        try:
            yield store
        finally:
            store.close()
    except (DamagedError, LostIndexError) as error:
        if repair:
            raise
        raise type(error)(f"{error}; stop the server, and {REMEDY}") from error


def _opened(config: StoreConfig, repair: bool) -> SsdStore:
    try:
        return SsdStore(config)
    except (DamagedError, LostIndexError):
        if not repair or config.path is None:
            raise
    put_aside(config.path)
    return SsdStore(config)


@contextmanager
def _retriever(settings: Settings) -> Iterator[Retriever | None]:
    """The catalogue, ``None`` if there is none yet: looking must not make one."""
    if not settings.index_dir.is_dir():
        yield None
        return
    # Nothing is chunked or embedded here: no tokenizer is needed, and the embedder's model is never loaded.
    with Retriever.open(settings.index_dir, open_embedder(settings.embedder), len) as retriever:
        yield retriever


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise StartError(f"model folder {folder} has no readable config.json: {e}") from e
    if not isinstance(found, dict):
        raise StartError(f"{folder / 'config.json'} must hold an object")
    return found


def _usual_dtype(engine: str, config: dict[str, Any]) -> str:
    """What the engine chooses when none is set: see ``blend.engines``."""
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if engine == "transformers":
        import torch

        return own if torch.cuda.is_available() and own in DTYPES else "float32"
    return "bfloat16" if own == "float32" or own not in DTYPES else own  # vLLM's "auto" halves float32


def _stored_layout(layout: KVLayout, store: KVStore, salt: bytes) -> KVLayout:
    """That of this model's stored prefix, whichever dtype an engine has chosen; else ``layout``."""
    source = prefix_source(salt)
    newest = max((e for e in store.entries() if e.source == source), key=lambda e: e.created, default=None)
    candidates = (replace(layout, dtype=name) for name in DTYPES)
    return next((c for c in candidates if newest and c.digest.hex() == newest.layout), layout)
