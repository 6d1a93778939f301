"""Damage of any kind is found, never served, and healed by the next put."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import xxhash

from store import ChunkKV, KVKey, KVStore, LmdbStore, MemoryStore, Miss, StoreIOError
from store.codec import CorruptEntryError, decode_header, encode

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]

CORRUPT = Miss("checksum_failed")


@contextmanager
def raw(path: Path) -> Iterator[Any]:
    """The tables of a closed store, to write anything into: (transaction, headers, planes)."""
    env = lmdb.open(str(path), max_dbs=5, map_size=64 << 20)
    try:
        headers, planes = env.open_db(b"headers"), env.open_db(b"planes")
        with env.begin(write=True) as txn:
            yield txn, headers, planes
    finally:
        env.close()


def flip_a_bit(blob: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(blob) * 8)
    out = bytearray(blob)
    out[at // 8] ^= 1 << at % 8
    return bytes(out)


def truncate(blob: bytes, rng: random.Random) -> bytes:
    return blob[: rng.randrange(len(blob))]


def extend(blob: bytes, rng: random.Random) -> bytes:
    return blob + rng.randbytes(rng.randint(1, 64))


def zero_a_page(blob: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(0, len(blob), 512)
    out = bytearray(blob)
    out[at : at + 512] = bytes(len(out[at : at + 512]))
    return bytes(out)


def overwrite(blob: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(blob))


DAMAGE = (flip_a_bit, truncate, extend, zero_a_page, overwrite)


def damage(txn: Any, headers: Any, planes: Any, key: KVKey, other: KVKey, layers: int, rng: random.Random) -> None:
    """Harm the entry ``key`` in one random way; ``other`` is a sound entry of the same shape."""
    layer = rng.randrange(layers)
    plane, foreign = (k.digest + layer.to_bytes(2, "big") for k in (key, other))
    kind = rng.randrange(9)
    if kind < 5:
        table, at = (headers, key.digest) if rng.random() < 0.4 else (planes, plane)
        was = txn.get(at, db=table)
        txn.put(at, DAMAGE[kind](was, rng), db=table)
    elif kind == 5:  # the same layer of another entry
        txn.put(plane, txn.get(foreign, db=planes), db=planes)
    elif kind == 6:  # two layers of this entry exchanged
        second = key.digest + ((layer + 1) % layers).to_bytes(2, "big")
        a, b = txn.get(plane, db=planes), txn.get(second, db=planes)
        txn.put(plane, b, db=planes)
        txn.put(second, a, db=planes)
    elif kind == 7:  # all of another entry, header and planes, sound but under the wrong key
        txn.put(key.digest, txn.get(other.digest, db=headers), db=headers)
        for n in range(layers):
            at = n.to_bytes(2, "big")
            txn.put(key.digest + at, txn.get(other.digest + at, db=planes), db=planes)
    else:
        txn.delete(plane, db=planes)


def test_200_random_corruptions_are_all_found_and_healed(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    maker = make_with(tokens=40)  # planes of 5 KiB: on LMDB overflow pages as in production
    chunks = [maker(n) for n in range(40)]
    rng = random.Random(2026)
    found = 0
    for _ in range(10):
        store = LmdbStore(tmp_path / "kv")
        for chunk in chunks:
            store.put(chunk)
        store.close()
        hurt = rng.sample(chunks, 20)
        sound = [chunk for chunk in chunks if chunk not in hurt]
        with raw(tmp_path / "kv") as (txn, headers, planes):
            for chunk in hurt:
                damage(txn, headers, planes, chunk.key, rng.choice(sound).key, chunk.layout.layers, rng)

        reader = LmdbStore(tmp_path / "kv", readonly=True)
        assert set(reader.verify().bad) == {chunk.key for chunk in hurt}
        assert all(get(reader, chunk) == CORRUPT for chunk in hurt)
        assert reader.corrupt == len(hurt)
        reader.close()

        store = LmdbStore(tmp_path / "kv")
        for chunk in hurt:
            assert get(store, chunk) == CORRUPT
            assert not store.contains(chunk.key)
            assert get(store, chunk) == Miss("never_precomputed")  # deleted, so a put is not taken for a repeat
            assert store.put(chunk) > 0
        assert store.corrupt == len(hurt)
        assert all(same(get(store, chunk), chunk) for chunk in chunks)
        assert store.verify() == replace(store.verify(), checked=40, bad=(), repaired=0)
        assert store.stats().bytes == sum(entry.bytes for entry in store.entries())
        found += len(hurt)
        store.close()
    assert found == 200


def test_a_put_over_a_corrupt_entry_replaces_it_without_a_get(tmp_path: Path, make: Make, get: Get, same: Same) -> None:
    chunk = make(1)
    store = LmdbStore(tmp_path / "kv")
    store.put(chunk)
    store.close()
    with raw(tmp_path / "kv") as (txn, _, planes):
        txn.put(chunk.key.digest + b"\0\0", b"x", db=planes)
    store = LmdbStore(tmp_path / "kv")
    assert store.put(chunk) > 0
    assert same(get(store, chunk), chunk)
    store.close()


def test_verify_finds_orphans_and_repair_deletes_them(tmp_path: Path, make: Make, get: Get) -> None:
    chunks = [make(n) for n in range(6)]
    store = LmdbStore(tmp_path / "kv")
    for chunk in chunks:
        store.put(chunk)
    store.close()
    with raw(tmp_path / "kv") as (txn, headers, planes):
        txn.delete(chunks[0].key.digest, db=headers)  # planes without a header
        for layer in range(3):  # a header without planes
            txn.delete(chunks[1].key.digest + layer.to_bytes(2, "big"), db=planes)
        txn.put(chunks[2].key.digest + b"\0\3", b"a plane too many", db=planes)
        txn.put(b"\xff" * 32 + b"\0\0", b"nobody's plane", db=planes)
    store = LmdbStore(tmp_path / "kv")
    bad = {*(chunk.key for chunk in chunks[:3]), KVKey(b"\xff" * 32)}
    report = store.verify()
    assert (set(report.bad), report.checked, report.repaired) == (bad, 5, 0)
    assert [entry.key for entry in store.entries()] == sorted(c.key for c in chunks[1:])
    assert store.verify(repair=True).repaired == 4
    assert store.verify() == replace(report, checked=3, bad=())
    assert (store.stats().entries, store.stats().bytes) == (3, sum(e.bytes for e in store.entries()))
    store.close()


def test_memory_that_went_bad_is_not_served(make: Make, get: Get, same: Same) -> None:
    store, chunk = MemoryStore(), make(1)
    store.put(chunk)
    held = store._held[chunk.key]
    store._held[chunk.key] = replace(held, planes=(flip_a_bit(held.planes[0], random.Random(1)), *held.planes[1:]))
    assert store.verify().bad == (chunk.key,)
    assert get(store, chunk) == CORRUPT and store.corrupt == 1
    assert store.put(chunk) > 0 and same(get(store, chunk), chunk)


def test_a_header_that_was_forged_with_a_right_checksum_is_still_refused(make: Make) -> None:
    header, _ = encode(make(1))
    body = header[:-16]
    for forged in (
        body.replace(b'"codec":"raw"', b'"codec":"zip"'),
        body.replace(b'"heads":2', b'"heads":x'),
        body.replace(b'"float32"', b'"float99"'),
        body.replace(b'"layers":3', b'"layers":4'),
        body + b"\0",
        body[:8] + struct.pack("<I", 2) + body[12:],
        body[:12] + struct.pack("<I", 1 << 31) + body[16:],
        b"",
    ):
        assert forged != body
        with pytest.raises(CorruptEntryError):
            decode_header(forged + xxhash.xxh3_128_digest(forged))
    assert decode_header(header).key == make(1).key


def test_every_single_byte_of_a_header_counts(make: Make) -> None:
    header, _ = encode(make(1))
    for at in range(len(header)):
        broken = bytearray(header)
        broken[at] ^= 0x40
        with pytest.raises(CorruptEntryError):
            decode_header(bytes(broken))
        with pytest.raises(CorruptEntryError):
            decode_header(header[:at])


def test_a_truncated_data_file_neither_kills_the_process_nor_serves_zeros(
    tmp_path: Path, make: Make, get: Get, same: Same
) -> None:
    chunks = [make(n) for n in range(40)]
    store = LmdbStore(tmp_path / "kv")
    for chunk in chunks:
        store.put(chunk)
    store.close()
    data = tmp_path / "kv" / "data.mdb"
    whole = data.read_bytes()
    for keep in range(len(whole) - 4096, len(whole) // 2, -4096 * 11):
        data.write_bytes(whole[:keep])
        try:
            store = LmdbStore(tmp_path / "kv")
        except StoreIOError as error:
            if "damaged" in str(error):  # LMDB's own root pages were in the lost part
                continue
            raise
        for chunk in chunks:
            got = get(store, chunk)
            assert got == CORRUPT or same(got, chunk), got
        store.close()
