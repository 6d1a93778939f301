"""Whatever changes about who made the KV, none of it is served any more, and each miss says what changed.

(The row "stale identity" of the service's promises: 0 hits across a change.) What is asked for after a change has
another address; that an address could be wrong is tried too: the same key with another identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from store import (
    ChunkKV,
    KVStore,
    Miss,
    StoreConfig,
    StoreFormatError,
    Want,
    context_hash,
    make_key,
)
from store import codec as codecs
from store.ssd import SsdStore
from tests.store.conftest import SALT, Make

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]

COUNT = 20
LAYOUTS: dict[str, dict[str, Any]] = {
    "weights": {"model": "ffff"},
    "dtype": {"dtype": "bfloat16"},
    "rope": {"rope": "ffff"},
    "layers": {"layers": 4},
    "heads": {"heads": 4, "head_dim": 4},
}


@pytest.fixture
def filled(store: KVStore, make: Make) -> KVStore:
    for n in range(COUNT):
        store.put(make(n))
    return store


def reasons(store: KVStore, wants: list[Want]) -> set[object]:
    """What the store says to all of them."""
    return {got.reason if isinstance(got := store.get(want), Miss) else "a hit" for want in wants}


def wants(maker: Make, **changed: Any) -> list[Want]:
    chunks = [maker(n) for n in range(COUNT)]
    found = [Want(c.key, c.layout, c.token_ids, c.source, c.tokenizer) for c in chunks]
    return [replace(want, **changed) for want in found]


def test_unchanged_everything_is_a_hit(filled: KVStore, make: Make) -> None:
    assert reasons(filled, wants(make)) == {"a hit"}


@pytest.mark.parametrize("change", LAYOUTS)
def test_another_model_is_model_changed(filled: KVStore, make: Make, change: str) -> None:
    other = replace(make, layout=replace(make.layout, **LAYOUTS[change]))
    assert reasons(filled, wants(other)) == {"model_changed"}
    forged = [replace(want, key=make(n).key) for n, want in enumerate(wants(other))]
    assert reasons(filled, forged) == {"model_changed"}
    assert reasons(filled, wants(make)) == {"a hit"}  # nothing was deleted for being asked wrongly


def test_another_tokenizer_is_tokenizer_changed(filled: KVStore, make: Make) -> None:
    assert reasons(filled, wants(replace(make, tokenizer="ffff"))) == {"tokenizer_changed"}
    assert reasons(filled, wants(make, tokenizer="ffff")) == {"tokenizer_changed"}


def test_another_model_and_tokenizer_is_model_changed(filled: KVStore, make: Make) -> None:
    other = replace(make, layout=replace(make.layout, model="ffff"), tokenizer="ffff")
    assert reasons(filled, wants(other)) == {"model_changed"}


def test_another_template_or_instruction_was_never_precomputed(filled: KVStore, make: Make) -> None:
    """It is part of what a chunk is compiled behind, and that of its address."""
    keys = [
        make_key(
            layout=make.layout,
            tokenizer=make.tokenizer,
            tenant_salt=SALT,
            context=context_hash((1, 2, 4)),
            token_ids=make(n).token_ids,
        )
        for n in range(COUNT)
    ]
    changed = [replace(want, key=key) for want, key in zip(wants(make), keys, strict=True)]
    assert reasons(filled, changed) == {"never_precomputed"}


def test_another_tenant_finds_nothing_and_learns_nothing(filled: KVStore, make: Make) -> None:
    """Not even that somebody else has the text: the reason is that of a text nobody has."""
    assert reasons(filled, wants(replace(make, salt=b"t" * 32))) == {"never_precomputed"}


def test_other_token_ids_under_the_same_address_are_refused(filled: KVStore, make: Make) -> None:
    ids = make(0).token_ids
    for changed in (ids[:-1], (*ids[:-1], 0), (*ids, 0), ()):
        assert reasons(filled, wants(make, token_ids=changed)) == {"checksum_failed"}


def test_another_format_has_other_addresses(filled: KVStore, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {want.key for want in wants(make)}
    monkeypatch.setattr("store.key.FORMAT_VERSION", 999)
    assert not before & {want.key for want in wants(make)}
    assert reasons(filled, wants(make)) == {"never_precomputed"}


def test_a_store_of_another_format_is_refused_whole(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    store.put(make(0))
    store.close()
    for module in ("store.types", "store.entry", "store.ssd.database", "store.key"):
        monkeypatch.setattr(f"{module}.FORMAT_VERSION", 999)
    for readonly in (False, True):
        with pytest.raises(StoreFormatError, match="999"):
            SsdStore(StoreConfig(path=tmp_path / "kv", readonly=readonly))


@pytest.mark.parametrize("kind", ["ssd", "ssd inline"])
@pytest.mark.parametrize("name", ["raw", "int8"])
def test_a_codec_of_another_version_does_not_read_the_old_one_s_bytes(
    tmp_path: Path, make_with: Any, get: Get, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """It might read them without an error, as something else. They are dropped, so that they are written anew."""
    maker = make_with(tokens=16 if kind == "ssd inline" else 400)
    config = StoreConfig(path=tmp_path / "kv", codec=name)
    store = SsdStore(config)
    for n in range(3):
        store.put(maker(n))
    old = codecs.CODECS[name]
    monkeypatch.setattr(type(old), "version", old.version + 1)
    store.close()
    store = SsdStore(config)
    for n in range(3):
        assert get(store, maker(n)) == Miss("checksum_failed")
        assert store.put(maker(n)) > 0
        assert isinstance(get(store, maker(n)), ChunkKV)
    assert store.verify().bad == ()
    store.close()
