"""Damage of any kind is found, never served, and healed by the next put."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
import xxhash

from store import ChunkKV, KVKey, KVStore, LostError, Miss, StoreConfig, StoreIOError, Want
from store.codec import open_codec
from store.entry import Header, decode_header, encode
from store.errors import CorruptEntryError
from store.ssd import SsdStore
from store.ssd.database import Tables
from store.ssd.rows import INLINE, PLACE_BYTES, Place, pack_place, parse_place

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]

CORRUPT = Miss("checksum_failed")


@dataclass(frozen=True)
class Raw:
    """A closed store, to do anything to."""

    path: Path
    txn: Any
    entries: Any
    payloads: Any
    usage: Any
    segments: Any

    def row(self, key: KVKey) -> bytes:
        return bytes(self.txn.get(key.digest, db=self.entries))

    def place(self, key: KVKey) -> Place:
        return parse_place(key.digest, self.row(key))

    def header(self, key: KVKey) -> Header:
        return decode_header(self.row(key)[PLACE_BYTES:])

    def file(self, key: KVKey) -> Path:
        return self.path / "segments" / f"{self.place(key).segment:08d}.seg"

    def extent(self, key: KVKey, layer: int) -> tuple[int, int]:
        """Where a plane starts and stops in its file, or in its payload."""
        place, header = self.place(key), self.header(key)
        start = place.offset + place.head if place.segment != INLINE else 0
        return start + header.offsets[layer], start + header.offsets[layer + 1]

    def read(self, key: KVKey, start: int, stop: int) -> bytes:
        if self.place(key).segment == INLINE:
            return bytes(self.txn.get(key.digest, db=self.payloads))[start:stop]
        with self.file(key).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, key: KVKey, start: int, new: bytes) -> None:
        if self.place(key).segment == INLINE:
            whole = bytearray(self.txn.get(key.digest, db=self.payloads))
            whole[start : start + len(new)] = new
            self.txn.put(key.digest, bytes(whole), db=self.payloads)
            return
        with self.file(key).open("r+b") as file:
            file.seek(start)
            file.write(new)


@contextmanager
def raw(path: Path) -> Iterator[Raw]:
    env = lmdb.open(str(path), max_dbs=len(Tables._fields), map_size=256 << 20)
    try:
        tables = [env.open_db(name) for name in (b"entries", b"payloads", b"usage", b"segments")]
        with env.begin(write=True) as txn:
            yield Raw(path, txn, *tables)
    finally:
        env.close()


def flip_a_bit(blob: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(blob) * 8)
    out = bytearray(blob)
    out[at // 8] ^= 1 << at % 8
    return bytes(out)


def zero_a_page(blob: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(0, len(blob), 512)
    out = bytearray(blob)
    out[at : at + 512] = bytes(len(out[at : at + 512]))
    return bytes(out)


def overwrite(blob: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(blob))


def truncate(blob: bytes, rng: random.Random) -> bytes:
    return blob[: rng.randrange(len(blob))]


def extend(blob: bytes, rng: random.Random) -> bytes:
    return blob + rng.randbytes(rng.randint(1, 64))


def hurt_planes(store: Raw, key: KVKey, other: KVKey, layers: int, rng: random.Random) -> None:
    """Some of an entry's planes are not what was written: in its segment, or in its payload."""
    layer = rng.randrange(layers)
    start, stop = store.extent(key, layer)
    was = store.read(key, start, stop)
    kind = rng.randrange(6)
    if kind < 3:
        store.write(key, start, (flip_a_bit, zero_a_page, overwrite)[kind](was, rng))
    elif kind == 3:  # the same layer of another entry, sound
        store.write(key, start, store.read(other, *store.extent(other, layer)))
    elif kind == 4:  # two layers exchanged
        first, last = store.extent(key, (layer + 1) % layers)
        second = store.read(key, first, last)
        store.write(key, first, was)
        store.write(key, start, second)
    elif store.place(key).segment == INLINE:  # the payload is cut, grown or gone
        new = rng.choice((truncate, extend))(store.read(key, 0, 1 << 30), rng)
        store.txn.delete(key.digest, db=store.payloads)
        if rng.random() < 0.7:
            store.txn.put(key.digest, new, db=store.payloads)
    else:  # blocks that never reached the device
        at = start // 4096 * 4096
        store.write(key, max(at, store.place(key).offset + 4096), bytes(4096))


def hurt_row(store: Raw, key: KVKey, other: KVKey, layers: int, rng: random.Random) -> None:
    """The index is not what was written."""
    row, foreign = store.row(key), store.row(other)
    kind = rng.randrange(8)
    if kind < 5:
        new = (flip_a_bit, zero_a_page, overwrite, truncate, extend)[kind](row, rng)
        new = row[:-1] if new == row else new
    elif kind == 5:  # another entry's row, sound in itself
        new = foreign
    elif kind == 6:  # another entry's header behind this one's place
        new = row[:PLACE_BYTES] + foreign[PLACE_BYTES:]
    else:  # a sound place, but another entry's, or none's
        place = store.place(key)
        stray = (
            store.place(other) if place.segment != INLINE and rng.random() < 0.5 else place._replace(segment=1 << 31)
        )
        new = pack_place(key.digest, stray) + row[PLACE_BYTES:]
    store.txn.put(key.digest, new, db=store.entries)


@pytest.mark.parametrize(
    "rounds", [2, pytest.param(25, marks=pytest.mark.slow)], ids=["80 corruptions", "1000 corruptions"]
)
def test_random_corruptions_are_all_found_and_healed(
    tmp_path: Path, make_with: Any, get: Get, same: Same, rounds: int
) -> None:
    # Half of them small enough for the index, half in segments of a few records each.
    chunks = [make_with(tokens=40 if n % 2 else 100)(n) for n in range(80)]
    config = StoreConfig(path=tmp_path / "kv", segment_bytes=256 << 10)
    rng = random.Random(2026)
    found = 0
    for _ in range(rounds):
        store = SsdStore(config)
        store.put_many(chunks)
        store.close()
        hurt = rng.sample(chunks, 40)
        sound = [chunk for chunk in chunks if chunk not in hurt]
        with raw(tmp_path / "kv") as opened:
            for chunk in hurt:
                others = [other.key for other in sound if len(other.token_ids) == len(chunk.token_ids)]
                kind = hurt_row if rng.random() < 0.4 else hurt_planes
                kind(opened, chunk.key, rng.choice(others), chunk.layout.layers, rng)

        reader = SsdStore(config.reading())
        assert set(reader.verify().bad) == {chunk.key for chunk in hurt}
        assert all(get(reader, chunk) == CORRUPT for chunk in hurt)
        assert reader.stats().counters["corrupt"] >= len(hurt)
        reader.close()

        store = SsdStore(config)
        before = store.stats().counters.get("corrupt", 0)
        for chunk in hurt:
            assert get(store, chunk) == CORRUPT
            assert not store.contains(chunk.key)
            assert get(store, chunk) == Miss("never_precomputed")  # deleted, so a put is not taken for a repeat
        assert store.stats().counters["corrupt"] == before + len(hurt)
        assert all(size > 0 for size in store.put_many(hurt))
        assert all(same(get(store, chunk), chunk) for chunk in chunks)
        assert store.verify() == replace(store.verify(), checked=80, bad=(), repaired=0)
        assert store.stats().bytes == sum(entry.bytes for entry in store.entries())
        found += len(hurt)
        store.close()
    assert found == 40 * rounds


@pytest.mark.parametrize("tokens", [16, 300])
def test_a_put_over_a_corrupt_entry_replaces_it_without_a_get(
    tmp_path: Path, make_with: Any, get: Get, same: Same, tokens: int
) -> None:
    chunk = make_with(tokens=tokens)(1)
    config = StoreConfig(path=tmp_path / "kv")
    store = SsdStore(config)
    store.put(chunk)
    store.close()
    with raw(tmp_path / "kv") as opened:
        opened.write(chunk.key, opened.extent(chunk.key, 1)[0], b"x" * 100)
    store = SsdStore(config)
    assert store.put(chunk) > 0 and store.stats().counters["corrupt"] == 1
    assert same(get(store, chunk), chunk)
    store.close()


def test_repair_drops_what_is_bad_and_counts_anew(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=16 if n < 3 else 300)(n) for n in range(6)]
    config = StoreConfig(path=tmp_path / "kv")
    store = SsdStore(config)
    store.put_many(chunks)
    store.close()
    with raw(tmp_path / "kv") as opened:
        opened.txn.delete(chunks[0].key.digest, db=opened.payloads)
        opened.txn.put(b"\xff" * 32, b"nobody's planes", db=opened.payloads)
        opened.txn.put(b"\xfe" * 32, b"nobody's life", db=opened.usage)
        opened.txn.delete(chunks[1].key.digest, db=opened.usage)
        opened.txn.delete(chunks[3].key.digest, db=opened.entries)  # its record is an orphan
        opened.txn.put(chunks[4].key.digest, b"short", db=opened.entries)
    store = SsdStore(config)
    report = store.verify()
    assert (set(report.bad), report.checked, report.repaired) == ({chunks[0].key, chunks[4].key}, 5, 0)
    assert store.verify(repair=True).repaired == 2
    assert store.verify() == replace(report, checked=3, bad=())
    stats = store.stats()
    assert (stats.entries, stats.bytes) == (3, sum(entry.bytes for entry in store.entries()))
    assert all(same(get(store, chunk), chunk) for chunk in (chunks[1], chunks[2], chunks[5]))
    assert all(entry.frequency > 0 for entry in store.entries())
    store.gc(full=True)
    assert store.stats().tiers[0].held_bytes < stats.tiers[0].held_bytes  # the orphan's bytes too
    store.close()


def test_a_record_that_a_rebuild_would_miss_is_served_but_not_called_sound(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    chunk = make_with(tokens=300)(1)
    config = StoreConfig(path=tmp_path / "kv")
    store = SsdStore(config)
    store.put(chunk)
    for at in (3, 30, 200):  # magic, generation, header
        with (tmp_path / "kv" / "segments" / "00000001.seg").open("r+b") as file:
            file.seek(at)
            was = file.read(1)
            file.seek(at)
            file.write(bytes([was[0] ^ 1]))
            file.flush()
            assert same(get(store, chunk), chunk)
            assert store.verify().bad == (chunk.key,)
            file.seek(at)
            file.write(was)
        assert store.verify().bad == ()
    store.close()


def test_damage_between_finding_and_reading_is_found(
    tmp_path: Path, make_with: Any, want: Callable[[ChunkKV], Want]
) -> None:
    chunk = make_with(tokens=300)(1)
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    store.put(chunk)
    first, second = store.find(want(chunk)), store.find(want(chunk))
    assert not isinstance(first, Miss) and not isinstance(second, Miss)
    k, v = torch.empty(2, *chunk.k.shape[1:])
    first.read(0, k, v)
    with (tmp_path / "kv" / "segments" / "00000001.seg").open("r+b") as file:
        file.seek(8192)
        file.write(b"x" * 40_000)  # layers 0 and 1
    first.read(2, k, v)
    assert torch.equal(k, chunk.k[2])
    with pytest.raises(LostError) as lost:
        first.read(1, k, v)
    assert lost.value.reason == "checksum_failed"
    with pytest.raises(LostError) as lost:
        second.read(0, k, v)
    assert lost.value.reason == "evicted"  # the first reader has dropped it
    assert store.stats().counters["corrupt"] == 1
    store.close()


def test_a_header_that_was_forged_with_a_right_checksum_is_still_refused(make: Make) -> None:
    header, _ = encode(make(1), open_codec("raw"))
    body = header[:-16]
    for forged in (
        body.replace(b'"codec":"raw"', b'"codec":"zip"'),
        body.replace(b'"codec_version":1', b'"codec_version":9'),
        body.replace(b'"heads":2', b'"heads":x'),
        body.replace(b'"float32"', b'"float99"'),
        body.replace(b'"layers":3', b'"layers":4'),
        body + b"\0",
        body[:8] + struct.pack("<I", 1) + body[12:],
        body[:12] + struct.pack("<I", 1 << 31) + body[16:],
        b"",
    ):
        assert forged != body
        with pytest.raises(CorruptEntryError):
            decode_header(forged + xxhash.xxh3_128_digest(forged))
    assert decode_header(header).key == make(1).key


def test_every_single_byte_of_a_header_counts(make: Make) -> None:
    header, _ = encode(make(1), open_codec("raw"))
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
    config = StoreConfig(path=tmp_path / "kv")
    store = SsdStore(config)
    store.put_many(chunks)
    store.close()
    data = tmp_path / "kv" / "data.mdb"
    whole = data.read_bytes()
    outcomes: set[type] = set()
    refusals: list[str] = []
    for keep in range(len(whole) - 4096, len(whole) // 2, -4096 * 11):
        data.write_bytes(whole[:keep])
        try:
            store = SsdStore(config)
        except StoreIOError as error:
            refusals.append(str(error))  # LMDB's own root pages were in the lost part
            continue
        for chunk in chunks:
            got = get(store, chunk)
            # A damaged index may be put aside and made anew: then what was in it is not known any more.
            assert got in (CORRUPT, Miss("never_precomputed")) or same(got, chunk), got
            outcomes.add(type(got))
        store.close()
    assert all("damaged" in refusal for refusal in refusals)
    assert outcomes == {ChunkKV, Miss}, "the cuts were all too small or all too large: the test shows nothing"


def test_a_truncated_segment_loses_what_was_cut_and_nothing_else(
    tmp_path: Path, make_with: Any, get: Get, same: Same
) -> None:
    chunks = [make_with(tokens=300)(n) for n in range(6)]
    config = StoreConfig(path=tmp_path / "kv")
    segment = tmp_path / "kv" / "segments" / "00000001.seg"
    store = SsdStore(config)
    store.put_many(chunks[:5])
    length = segment.stat().st_size // 5
    os.truncate(segment, 3 * length + 5000)
    store.put(chunks[5])  # not behind a hole
    assert [get(store, chunk) for chunk in chunks[3:5]] == [CORRUPT] * 2
    assert all(same(get(store, chunk), chunk) for chunk in (*chunks[:3], chunks[5]))
    assert sorted(path.name for path in segment.parent.iterdir()) == ["00000001.seg", "00000002.seg"]
    assert store.verify().bad == ()
    store.close()


def test_a_missing_segment_is_a_miss_and_is_replaced(tmp_path: Path, make_with: Any, get: Get, same: Same) -> None:
    chunks = [make_with(tokens=300)(n) for n in range(3)]
    config = StoreConfig(path=tmp_path / "kv")
    store = SsdStore(config)
    store.put_many(chunks)
    store.close()
    (tmp_path / "kv" / "segments" / "00000001.seg").unlink()
    store = SsdStore(config)
    assert set(store.verify().bad) == {chunk.key for chunk in chunks}
    assert [get(store, chunk) for chunk in chunks] == [CORRUPT] * 3
    assert all(size > 0 for size in store.put_many(chunks))
    assert all(same(get(store, chunk), chunk) for chunk in chunks)
    assert store.verify().bad == ()
    store.close()
