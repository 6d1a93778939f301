"""``ragblend cache``: on the folder alone, beside a running server, and through one. Engines are trivial; the store is
the one on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.pins import Pins
from app.trivial import ByteTokenizer, TrivialEngine
from blend.engines import EngineConfig
from store import ChunkKV, StoreConfig, open_store
from tests.app import commands
from tests.store.conftest import Make

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["ls", "stats", "verify", "gc", "pin", "unpin", "evict", "warm", "move", "export", "import"]
STEER = ["pin", "unpin", "evict", "warm"]


def run(*args: str | Path) -> Result:
    return commands.run("cache", *args)


def data(*args: str | Path) -> Any:
    return commands.data("cache", *args)


def fails(code: int, *args: str | Path) -> str:
    return commands.fails(code, "cache", *args)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every engine is trivial, every embedder hashes, no server is taken for ours; gives the data folder."""

    async def open_engine(kind: str, config: EngineConfig) -> TrivialEngine:
        return TrivialEngine(open_store(config.store))

    for module in ("app.bench.workbench", "app.service"):
        monkeypatch.setattr(f"{module}.open_engine", open_engine)
    monkeypatch.setattr("app.service._load_tokenizer", lambda model: ByteTokenizer())
    monkeypatch.setenv("RAGBLEND_STORE__CODEC", "raw")  # the trivial engine knows its KV to the bit
    monkeypatch.setenv("RAGBLEND_EMBEDDER", "hash")
    monkeypatch.setenv("RAGBLEND_PORT", "9")
    monkeypatch.setenv("RAGBLEND_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAGBLEND_MODEL", str(ROOT / "models/demo"))
    return tmp_path / "data"


@pytest.fixture
def stored(folder: Path, tmp_path: Path) -> Path:
    """Two documents of one chunk each, ingested and precomputed; gives the data folder."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "oak.txt").write_text("Linrik keeps a donkey. He plays the bagpipe.")
    (texts / "elm.md").write_text("# Elm\n\nFenora painted the harbour in winter.")
    result = CliRunner().invoke(app, ["ingest", str(texts)])
    assert result.exit_code == 0, result.output
    return folder


def entries(**wanted: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = data("ls")["entries"]
    return [e for e in found if all(e[k] == v for k, v in wanted.items())]


def document(title: str) -> str:
    [entry] = entries(title=title)
    return str(entry["file_id"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: ragblend cache {command}" in " ".join(result.stdout.split())
    assert "--json" in result.stdout


class TestOnTheFolder:
    def test_looking_at_nothing_makes_nothing(self, folder: Path) -> None:
        assert data("ls") == {"entries": [], "total": 0, "bytes": 0}
        assert data("stats")["entries"] == 0
        assert data("verify")["checked"] == 0
        assert data("gc")["freed_bytes"] == 0
        assert "nothing is stored" in fails(1, "pin", "--all")
        assert not folder.exists()

    def test_entries_are_listed_by_the_documents_they_stand_in(self, stored: Path) -> None:
        found = data("ls")
        assert found["total"] == 3
        assert {e["title"] for e in found["entries"]} == {"oak", "Elm", None}
        assert [e["chunk_id"] for e in found["entries"] if e["title"] is None] == ["prefix"]
        assert set(found["entries"][0]) >= {"key", "tokens", "bytes", "codec", "pinned", "file_id", "collection"}
        table = run("ls", "--sort", "bytes").stdout
        assert "| oak | 0 chk_" in table
        assert "(our prefix)" in table
        assert data("ls", "--limit", "1", "--sort", "tokens")["entries"][0]["tokens"] == max(
            e["tokens"] for e in found["entries"]
        )

    def test_filters_and_what_is_wrong_with_them(self, stored: Path) -> None:
        assert [e["title"] for e in data("ls", "--document", document("oak"))["entries"]] == ["oak"]
        assert data("ls", "--pinned")["total"] == 1
        assert data("ls", "--not-pinned", "--collection", "default")["total"] == 2
        assert data("ls", "--codec", "fp8")["total"] == 0
        assert "colour" in fails(2, "ls", "--sort", "colour")
        assert "atlantis" in fails(1, "ls", "--collection", "atlantis")
        assert "doc_none" in fails(1, "ls", "--document", "doc_none")

    def test_a_pin_is_kept_and_stops_an_eviction(self, stored: Path) -> None:
        oak = document("oak")
        assert data("pin", "--document", oak) | {"bytes": 0} == {
            "chunks": 1, "entries": 1, "bytes": 0, "changed": 1, "kept": 0,
        }  # fmt: skip
        assert Pins(stored).read().documents == {("default", oak)}
        result = run("evict", "--all")
        assert "1 of 2 stored entries evicted" in result.stdout
        assert "1 entries are pinned" in result.stderr
        assert {e["title"] for e in entries()} == {"oak", None}
        assert data("unpin", "--all")["changed"] == 1
        assert data("evict", "--document", oak)["changed"] == 1
        assert data("stats")["counters"]  # it was counted, by a process that has ended since

    def test_what_is_evicted_comes_back_by_precompute_and_stays_pinned(self, stored: Path) -> None:
        data("pin", "--collection", "default")
        data("unpin", "--chunk", "prefix")
        assert data("evict", "--chunk", "prefix")["changed"] == 1
        assert CliRunner().invoke(app, ["precompute", "--all"]).exit_code == 0
        assert {(e["title"], e["pinned"]) for e in entries()} == {("oak", True), ("Elm", True), (None, True)}

    @pytest.mark.parametrize("command", STEER)
    def test_nothing_selected_is_an_error_not_everything(self, stored: Path, command: str) -> None:
        assert "nothing is selected" in fails(1, command)
        assert "exclude each other" in fails(1, command, "--all", "--collection", "default")
        assert "chk_none" in fails(1, command, "--chunk", "chk_none")
        assert data("ls")["total"] == 3

    def test_warming_without_a_server_says_what_it_warms(self, stored: Path) -> None:
        found = data("warm", "--all")
        assert (found["entries"], found["changed"], found["tier"]) == (2, 2, "page cache")
        assert "in the page cache now" in run("warm", "--all").stdout
        assert "no server is running" in fails(1, "move", "--tier", "ram", "--all")
        assert "tape" in fails(2, "move", "--tier", "tape", "--all")

    def test_damage_is_found_and_repaired(self, stored: Path) -> None:
        assert data("verify") == {"checked": 3, "bad": [], "repaired": 0}
        _flip_a_bit(stored)
        result = run("verify", "--json")
        assert result.exit_code == 1
        bad = json.loads(result.stdout)["bad"]
        assert bad
        assert "--repair" in run("verify").stderr
        assert data("verify", "--repair")["repaired"] == len(bad)
        assert data("verify")["bad"] == []

    @pytest.mark.parametrize("lost", [False, True])
    def test_an_index_that_is_garbage_is_made_anew_from_the_segments(self, folder: Path, lost: bool) -> None:
        chunks = _put_large(folder)
        index = folder / "kv" / "data.mdb"
        index.unlink() if lost else index.write_bytes(b"garbage!" * 5000)
        for command in ("verify", "ls", "stats"):  # they name the remedy, and change nothing
            assert "ragblend cache verify --repair" in fails(1, command)
        assert index.exists() != lost
        result = run("verify", "--repair", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"checked": 3, "bad": [], "repaired": 0}
        kept = folder / "kv" / "data.mdb.damaged-1"
        assert ("kept as data.mdb.damaged-1" in result.stderr) == kept.exists() == (not lost)
        assert {e["key"] for e in data("ls")["entries"]} == {chunk.key.hex for chunk in chunks}
        assert data("verify") == {"checked": 3, "bad": [], "repaired": 0}

    def test_an_index_damaged_inside_is_made_anew(self, folder: Path) -> None:
        chunks = _put_large(folder)
        index = folder / "kv" / "data.mdb"
        size = index.stat().st_size
        with index.open("r+b") as file:  # all but the two pages by which LMDB knows its own
            file.seek(2 * 4096)
            file.write(random.Random(1).randbytes(size - 2 * 4096))
        assert "ragblend cache verify --repair" in fails(1, "verify")
        result = run("verify", "--repair")
        assert result.exit_code == 0, result.output
        assert "kept as data.mdb.damaged-1" in result.stderr
        assert {e["key"] for e in data("ls")["entries"]} == {chunk.key.hex for chunk in chunks}

    def test_an_index_of_another_format_is_left_alone(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its segments would be, too, to this version: garbage."""
        _put_large(folder)
        before = (folder / "kv" / "data.mdb").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr("store.ssd.database.FORMAT_VERSION", 999)
            assert "format" in fails(1, "verify", "--repair")
        assert (folder / "kv" / "data.mdb").read_bytes() == before
        assert data("verify") == {"checked": 3, "bad": [], "repaired": 0}

    def test_collection_runs_and_says_what_it_did(self, stored: Path) -> None:
        data("evict", "--document", document("oak"))
        assert set(data("gc", "--full")) == {"freed_bytes", "moved_bytes", "expired", "evicted"}
        assert "given back" in run("gc").stdout
        assert data("verify")["checked"] == 2

    def test_stats_show_the_tier_on_disk(self, stored: Path) -> None:
        found = data("stats")
        assert found["entries"] == found["tiers"][-1]["entries"] == 3
        assert found["tiers"][-1]["tier"] == "ssd"
        assert found["pinned"] == 1
        assert "3 entries, 1 pinned" in run("stats").stdout


class TestCarrying:
    def test_an_export_is_imported_elsewhere(self, stored: Path, tmp_path: Path) -> None:
        report = data("export", tmp_path / "out")
        assert (report["entries"], report["left_out"]) == (3, 0)
        before = {e["key"]: e["tokens"] for e in entries()}
        there = tmp_path / "there"
        expect = ["--data-dir", there, "--expect-sha256", report["manifest"]]
        assert data("import", tmp_path / "out", *expect)["imported"] == 3
        assert data("import", tmp_path / "out", *expect)["present"] == 3
        found = data("ls", "--data-dir", there)["entries"]
        assert {e["key"]: e["tokens"] for e in found} == before
        assert data("verify", "--data-dir", there)["bad"] == []

    def test_a_selection_is_exported_alone(self, stored: Path, tmp_path: Path) -> None:
        assert data("export", tmp_path / "out", "--document", document("oak"))["entries"] == 1

    def test_another_export_than_the_expected_one_is_refused(self, stored: Path, tmp_path: Path) -> None:
        data("export", tmp_path / "out")
        there = ["--data-dir", tmp_path / "there"]
        assert "0" * 64 in fails(1, "import", tmp_path / "out", "--expect-sha256", "0" * 64, *there)
        assert data("stats", *there)["entries"] == 0

    def test_damaged_entries_are_named_and_make_the_import_fail(self, folder: Path, tmp_path: Path) -> None:
        _put_large(folder)
        run("export", tmp_path / "out")
        [file] = (tmp_path / "out").glob("chunks-*.kv")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        there = ["--data-dir", tmp_path / "there"]
        assert file.name in fails(1, "import", tmp_path / "out", *there)
        result = run("import", tmp_path / "out", "--salvage", "--json", *there)
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert (report["imported"], len(report["damaged"])) == (2, 1)
        assert report["damaged"][0]["key"] in result.stderr

    def test_an_export_prints_its_manifest_s_hash(self, folder: Path, tmp_path: Path) -> None:
        _put_large(folder)
        result = run("export", tmp_path / "out")
        digest = hashlib.sha256((tmp_path / "out" / "manifest.json").read_bytes()).hexdigest()
        assert f"manifest sha256 {digest}" in result.stdout

    def test_an_export_into_a_full_folder_is_refused(self, stored: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        assert "is not empty" in fails(1, "export", tmp_path / "out")
        assert (tmp_path / "out" / "mine").read_text() == "x"

    def test_of_nothing_nothing_is_exported(self, folder: Path, tmp_path: Path) -> None:
        assert "nothing is stored" in fails(1, "export", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
class TestBesideAServer:
    @pytest.fixture
    def url(self, stored: Path, unused_tcp_port: int) -> Iterator[str]:
        command = [sys.executable, str(ROOT / "tests/app/trivial_server.py"), str(unused_tcp_port)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield f"http://127.0.0.1:{unused_tcp_port}"
            server.communicate(timeout=60)  # its stdin ends
        assert server.returncode == 0

    def test_what_goes_through_it_reaches_its_memory(self, url: str) -> None:
        found = data("warm", "--all", "--url", url)
        assert (found["entries"], found["changed"], found["tier"]) == (2, 2, "ram")
        ram = data("stats", "--url", url)["tiers"][0]
        assert ram["tier"] == "ram"
        assert ram["entries"] >= 2
        assert "taken out of the server's memory" in run("move", "--tier", "ssd", "--all", "--url", url).stdout
        assert data("stats", "--url", url)["tiers"][0]["entries"] <= ram["entries"] - 2
        assert data("ls")["total"] == 3
        oak = document("oak")
        assert data("pin", "--document", oak, "--url", url)["changed"] == 1
        assert entries(title="oak", pinned=True)
        assert data("evict", "--all", "--url", url)["kept"] == 1
        assert "atlantis" in fails(1, "unpin", "--collection", "atlantis", "--url", url)

    def test_what_happens_on_the_folder_it_sees_at_once(self, url: str) -> None:
        ask = ["ask", "Who keeps a donkey?", "--mode", "reuse", "--url", url, "--json"]
        assert data("verify") == {"checked": 3, "bad": [], "repaired": 0}
        data("warm", "--all", "--url", url)
        assert data("gc", "--full")["evicted"] == 0
        assert json.loads(CliRunner().invoke(app, ask).stdout)["rag"]["cache"]["missing"] == 0
        assert data("evict", "--document", document("oak"))["changed"] == 1  # on the folder: none is found on its port
        chunks = json.loads(CliRunner().invoke(app, ask).stdout)["rag"]["cache"]["chunks"]
        assert "evicted" in {c["miss_reason"] for c in chunks}


def _put_large(folder: Path) -> list[ChunkKV]:
    """Three chunks too large to lie in the index itself."""
    (folder / "kv").parent.mkdir(parents=True)
    chunks = [Make(tokens=300)(n) for n in range(3)]
    store = open_store(StoreConfig(path=folder / "kv"))
    store.put_many(chunks)
    store.close()
    return chunks


def _flip_a_bit(folder: Path) -> None:
    """Of a token's K, wherever the store has put it; the float32 of the byte "k" is one."""
    import struct

    one, other = struct.pack("<f", ord("k")), struct.pack("<f", ord("K"))
    for path in (folder / "kv").rglob("*"):
        if path.is_file() and path.name != "lock.mdb" and one in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(one, other))
            return
    raise AssertionError("no stored plane was found")
