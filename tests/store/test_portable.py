"""An export is whole or not there; an import puts only what is, byte for byte, what was exported."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from store import ChunkKV, KVStore, StoreConfig, StoreError, StoreFormatError, open_store
from store.base import Miss
from store.manifest import NAME
from store.portable import DamagedExportError, export, import_
from store.ssd import SsdStore
from store.types import FORMAT_VERSION

Get = Callable[[KVStore, ChunkKV], ChunkKV | Miss]
Same = Callable[[object, ChunkKV], bool]
Make = Callable[[int], ChunkKV]
Open = Callable[..., Any]


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Open]:
    """Opens stores by kind, closes them at the end."""
    with ExitStack() as stack:
        count = 0

        def make_one(kind: str = "memory", **options: Any) -> Any:
            nonlocal count
            count += 1
            path = None if kind == "memory" else tmp_path / f"store-{count}"
            ram_bytes = 16 << 20 if kind == "tiered" else 0
            store = open_store(StoreConfig(path=path, ram_bytes=ram_bytes, **options))
            stack.callback(store.close)
            return store

        yield make_one


@pytest.fixture
def exported(open_one: Open, tmp_path: Path, make: Make) -> Path:
    """Eight entries in files of three each."""
    store = open_one()
    for n in range(8):
        store.put(make(n))
    size = 3 * (make(0).layout.token_bytes * 16)
    assert export(store, tmp_path / "export", file_bytes=size).files == 3
    return tmp_path / "export"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The manifest changed by somebody who knows how to write one."""
    manifest = json.loads((folder / NAME).read_bytes())
    changed = change(manifest)
    (folder / NAME).write_text(json.dumps(manifest if changed is None else changed))


@pytest.mark.parametrize("source", ["memory", "ssd", "tiered"])
@pytest.mark.parametrize("target", ["memory", "ssd", "tiered"])
def test_what_was_exported_comes_back_to_the_bit(
    open_one: Open, tmp_path: Path, make: Make, get: Get, same: Same, source: str, target: str
) -> None:
    first, second = open_one(source), open_one(target)
    for n in range(5):
        first.put(make(n))
    out = export(first, tmp_path / "export")
    payload = first.stats().bytes
    assert (out.entries, out.tokens, out.bytes, out.left_out) == (5, 80, payload, 0)
    done = import_(second, tmp_path / "export", expect=out.manifest)
    assert (done.imported, done.bytes, done.present, done.refused, done.damaged) == (5, payload, 0, 0, ())
    assert all(same(get(second, make(n)), make(n)) for n in range(5))
    assert second.verify().bad == ()


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_no_entry_is_encoded_again(open_one: Open, tmp_path: Path, make: Make, codec: str) -> None:
    """The bytes travel as they are: exporting what was imported gives the same files."""
    first, second = open_one("memory", codec=codec), open_one("memory", codec="raw")
    for n in range(4):
        first.put(make(n))
    export(first, tmp_path / "a", [make(n).key for n in range(4)])
    import_(second, tmp_path / "a")
    assert {entry.codec for entry in second.entries()} == {codec}
    export(second, tmp_path / "b", [make(n).key for n in range(4)])
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_the_manifest_says_what_sha256sum_says(exported: Path) -> None:
    manifest = json.loads((exported / NAME).read_bytes())
    assert manifest["counts"]["entries"] == len(manifest["entries"]) == 8
    for file in manifest["files"]:
        data = (exported / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    for item in manifest["entries"]:
        data = (exported / item["file"]).read_bytes()[item["offset"] : item["offset"] + item["length"]]
        assert hashlib.sha256(data).hexdigest() == item["sha256"]
    assert sorted(p.name for p in exported.iterdir()) == sorted([NAME, *(f["name"] for f in manifest["files"])])
    assert all(p.stat().st_mode & 0o077 == 0 for p in exported.iterdir())  # KV tells what was read


def test_chosen_keys_only_and_what_is_gone_is_counted(open_one: Open, tmp_path: Path, make: Make) -> None:
    store, other = open_one("ssd"), open_one()
    for n in range(4):
        store.put(make(n))
    out = export(store, tmp_path / "export", [make(1).key, make(3).key, make(1).key, make(9).key])
    assert (out.entries, out.left_out) == (2, 1)
    import_(other, tmp_path / "export")
    assert {entry.key for entry in other.entries()} == {make(1).key, make(3).key}


def test_nothing_to_export_is_an_export_too(open_one: Open, tmp_path: Path) -> None:
    out = export(open_one(), tmp_path / "export")
    assert (out.entries, out.files) == (0, 0)
    assert import_(open_one(), tmp_path / "export", expect=out.manifest).imported == 0


def test_a_folder_that_holds_anything_is_left_alone(open_one: Open, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreFormatError, match=r"thesis\.txt"):
        export(open_one(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(open_one: Open, tmp_path: Path, make: Make) -> None:
    store = open_one()
    for n in range(4):
        store.put(make(n))

    def fail(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / "export", progress=fail, file_bytes=1)
    assert list((tmp_path / "export").iterdir()) == []
    assert export(store, tmp_path / "export").entries == 4


def test_what_is_there_is_skipped_and_a_broken_off_import_goes_on(
    open_one: Open, exported: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.portable.GROUP_BYTES", 1)
    store = open_one("ssd")
    store.put(make(6))
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_(store, exported, progress=stop)
    assert seen == [(2, 8), (3, 8), (4, 8)]
    assert store.stats().entries == 4
    done = import_(store, exported)
    assert (done.imported, done.present) == (4, 4)
    assert store.stats().entries == 8


def test_an_import_that_is_killed_goes_on(open_one: Open, exported: Path, tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        import store.portable
        from store import StoreConfig
        from store.ssd import SsdStore
        store.portable.GROUP_BYTES = 1
        def kill(done, total):
            if done == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        kv = SsdStore(StoreConfig(path=Path({str(tmp_path / "kv")!r})))
        store.portable.import_(kv, Path({str(exported)!r}), progress=kill)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == -signal.SIGKILL
    store = SsdStore(StoreConfig(path=tmp_path / "kv"))
    assert (store.stats().entries, store.verify().bad) == (3, ())
    done = import_(store, exported)
    assert (done.imported, done.present) == (5, 3)
    assert (store.stats().entries, store.verify().bad) == (8, ())
    store.close()


def test_a_manifest_other_than_the_demanded_one_is_refused(open_one: Open, exported: Path) -> None:
    store = open_one()
    digest = hashlib.sha256((exported / NAME).read_bytes()).hexdigest()
    rewrite(exported, lambda m: None)  # the same content, other bytes
    with pytest.raises(DamagedExportError, match=digest):
        import_(store, exported, expect=digest)
    assert store.stats().entries == 0
    assert import_(store, exported).imported == 8


def test_any_flipped_bit_is_found_before_anything_is_put(open_one: Open, exported: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    names = sorted(p.name for p in exported.iterdir() if p.name != NAME)
    for n in range(40):
        hurt = shutil.copytree(exported, tmp_path / f"hurt-{n}")
        path = hurt / rng.choice(names)
        data = bytearray(path.read_bytes())
        at = rng.randrange(8 * len(data))
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        store = open_one()
        with pytest.raises(DamagedExportError, match=path.name):
            import_(store, hurt)
        assert store.stats().entries == 0


def test_salvage_takes_what_is_sound(open_one: Open, exported: Path, make: Make, get: Get, same: Same) -> None:
    items = json.loads((exported / NAME).read_bytes())["entries"]
    hurt = items[1]
    path = exported / hurt["file"]
    data = bytearray(path.read_bytes())
    data[hurt["offset"] + hurt["length"] - 1] ^= 1
    path.write_bytes(data)
    (exported / items[-1]["file"]).unlink()
    lost = [item["key"] for item in items if item["file"] == items[-1]["file"]]
    store = open_one()
    done = import_(store, exported, salvage=True)
    assert sorted(key.hex for key, _ in done.damaged) == sorted([hurt["key"], *lost])
    assert done.imported == 8 - 1 - len(lost)
    bad = {key for key, _ in done.damaged}
    for n in range(8):
        assert same(get(store, make(n)), make(n)) == (make(n).key not in bad)


@pytest.mark.parametrize("cut", ["truncate", "extend", "remove"])
def test_a_file_of_another_length_is_refused(open_one: Open, exported: Path, cut: str) -> None:
    path = exported / "chunks-00001.kv"
    if cut == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif cut == "extend":
        with path.open("ab") as file:
            file.write(b"x")
    else:
        path.unlink()
    with pytest.raises(DamagedExportError, match=r"chunks-00001\.kv"):
        import_(open_one(), exported)


@pytest.mark.parametrize(
    "name", ["../secret.kv", "/etc/passwd", "chunks-00000.kv/..", "chunks-0.kv", "", ".", "chunks-00000.kv\n"]
)
def test_a_path_in_the_manifest_is_never_followed(open_one: Open, exported: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][0]["name"] = name
        for item in manifest["entries"]:
            if item["file"] == "chunks-00000.kv":
                item["file"] = name

    rewrite(exported, change)
    for salvage in (False, True):
        with pytest.raises(StoreFormatError, match="not like"):
            import_(open_one(), exported, salvage=salvage)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["chunks-00000.kv", NAME])
def test_only_plain_files_are_read(open_one: Open, exported: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Not even a link to the right bytes: what it points to could change between check and use."""
    (exported / name).rename(tmp_path / "aside")
    if kind == "link":
        (exported / name).symlink_to(tmp_path / "aside")
    elif kind == "pipe":
        os.mkfifo(exported / name)
    else:
        (exported / name).mkdir()
    store = open_one()
    with pytest.raises(StoreError, match="not a plain file"):
        import_(store, exported)
    assert store.stats().entries == 0


def test_a_sound_entry_under_another_key_is_refused(open_one: Open, exported: Path) -> None:
    """The manifest is consistent, its hashes are right, and it lies about whose KV it is."""

    def swap(manifest: dict[str, Any]) -> None:
        a, b = manifest["entries"][:2]
        a["key"], b["key"] = b["key"], a["key"]

    rewrite(exported, swap)
    store = open_one()
    with pytest.raises(DamagedExportError, match="is that of"):
        import_(store, exported)
    assert store.stats().entries == 0
    assert len(import_(store, exported, salvage=True).damaged) == 2


@pytest.mark.parametrize("field", ["layout", "tokens", "bytes", "header"])
def test_a_manifest_that_contradicts_a_header_is_refused(open_one: Open, exported: Path, field: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        item = manifest["entries"][0]
        if field == "layout":
            item["layout"] = "0" * 64
        else:
            item[field] -= 1
            if field != "header":
                manifest["counts"][field] -= 1

    rewrite(exported, change)
    with pytest.raises(DamagedExportError, match="header"):
        import_(open_one(), exported)


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return change


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for step in path[:-2]:
            manifest = manifest[step]
        manifest[path[-2]] = path[-1]

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("format", "a thesis"),
        put("version", 2),
        put("store_format", FORMAT_VERSION + 1),
        put("version", True),
        put("comment", "hello"),
        put("entries", {}),
        put("entries", 0, 7),
        put("entries", 0, "key", "zz"),
        put("entries", 0, "key", 5),
        put("entries", 0, "offset", -1),
        put("entries", 0, "offset", 1.0),
        put("entries", 0, "offset", True),
        put("entries", 0, "length", 1 << 61),
        put("entries", 0, "extra", 1),
        put("entries", 0, "header", 1 << 40),
        put("entries", 0, "file", "chunks-00077.kv"),
        put("counts", "tokens", 1),
        put("files", 0, "sha256", "0"),
        drop("counts"),
        drop("entries", 0, "sha256"),
        lambda m: m["entries"].append(m["entries"][0]),
        lambda m: m["files"].append(m["files"][0]),
        lambda m: m["entries"].reverse(),
        lambda m: m["entries"].pop(),
        lambda m: [m],
        lambda m: None if m.clear() else "text",
    ],
)
def test_a_manifest_of_another_form_is_refused(open_one: Open, exported: Path, change: Any) -> None:
    rewrite(exported, lambda m: result if isinstance(result := change(m), list | str) else None)
    store = open_one()
    for salvage in (False, True):
        with pytest.raises(StoreFormatError, match=NAME.replace(".", r"\.") + "|version"):
            import_(store, exported, salvage=salvage)
    assert store.stats().entries == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"nan"])
def test_a_manifest_that_is_not_json_is_refused(open_one: Open, exported: Path, data: bytes) -> None:
    (exported / NAME).write_bytes(data)
    with pytest.raises(StoreFormatError, match="manifest"):
        import_(open_one(), exported)


def test_what_is_no_export_is_named(open_one: Open, exported: Path, tmp_path: Path) -> None:
    (exported / NAME).rename(exported / (NAME + ".part"))  # killed before its end
    for folder in (exported, tmp_path / "nowhere"):
        with pytest.raises(StoreFormatError, match=folder.name):
            import_(open_one(), folder)
