"""Control of the stored KV over HTTP: what is listed is what is stored, and what is steered is what was meant."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.choose import Selection
from app.control import Control
from app.errors import BadRequestError
from app.files import DataFileError
from app.pins import FILE, Pins
from store.base import GcReport, VerifyReport
from store.config import StoreConfig
from store.memory import MemoryStore
from store.ssd import SsdStore
from tests.app.conftest import DOCUMENTS, Kit, OpenKit


async def post(kit: Kit, what: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = await kit.client.post(f"/cache/{what}", json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def chunks(kit: Kit, **query: Any) -> list[dict[str, Any]]:
    answer = await kit.client.get("/cache/chunks", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def pinned_ids(kit: Kit) -> set[str]:
    return {c["chunk_id"] for c in await chunks(kit, pinned=True)}


async def summary(kit: Kit) -> dict[str, Any]:
    answer = await kit.client.get("/cache/summary")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


class TestLooking:
    async def test_every_stored_chunk_is_listed_with_its_document(self, kit: Kit) -> None:
        found = await chunks(kit)
        assert len(found) == 5  # our prefix, and two chunks of each document
        assert {c["title"] for c in found} == {"Mara Venn", "Otto Brandt", None}
        mara = sorted((c for c in found if c["file_id"] == "doc-mara"), key=lambda c: c["ordinal"])
        expected = kit.service.retriever.chunks("doc-mara")
        assert [c["chunk_id"] for c in mara] == [c.id for c in expected]
        refs = kit.service.references.of(kit.service.retriever.document("doc-mara"))
        assert [c["key"] for c in mara] == [r.key.hex for r in refs]
        assert [c["tokens"] for c in mara] == [len(r.token_ids) for r in refs]
        assert all(c["collection"] == "default" and c["codec"] == "raw" for c in mara)

    async def test_the_prefix_is_listed_by_its_name_and_pinned_from_the_start(self, kit: Kit) -> None:
        assert await pinned_ids(kit) == {"prefix"}
        [prefix] = await chunks(kit, chunk_id="prefix")
        assert prefix["key"] == kit.service.keys.prefix_ref().key.hex
        assert prefix["file_id"] is None

    async def test_filters_narrow_one_another_down(self, kit: Kit) -> None:
        await kit.ingest([{"id": "elsewhere", "text": "Runa Holt was a glazier in Norhaven."}], collection="other")
        assert {c["file_id"] for c in await chunks(kit, collection="other")} == {"elsewhere"}
        assert {c["file_id"] for c in await chunks(kit, file_id="doc-otto")} == {"doc-otto"}
        one = kit.service.retriever.chunks("doc-otto")[1].id
        assert [c["chunk_id"] for c in await chunks(kit, file_id="doc-otto", chunk_id=one)] == [one]
        assert len(await chunks(kit, file_id=["doc-otto", "doc-mara"])) == 4
        assert await chunks(kit, codec="fp8") == []
        answer = await kit.client.get("/cache/chunks", params={"file_id": "doc-otto", "collection": "other"})
        assert answer.status_code == 404
        assert "doc-otto" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("sort", ["key", "used", "frequency", "bytes", "tokens", "created"])
    async def test_pages_hold_everything_once_and_in_order(self, kit: Kit, sort: str) -> None:
        await kit.chat()  # some were used, some not
        whole = await chunks(kit, sort=sort, limit=100)
        paged: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        for _ in range(len(whole)):
            page = (await kit.client.get("/cache/chunks", params={"sort": sort, "limit": 2, **after})).json()
            paged += page["data"]
            assert page["total"] == len(whole)
            assert page["has_more"] is (page["next"] is not None)
            if page["next"] is None:
                break
            after = {"after": page["next"]}
        assert [c["key"] for c in paged] == [c["key"] for c in whole]
        assert len({c["key"] for c in paged}) == 5
        field = {"used": "used_at", "created": "created_at"}.get(sort, sort)
        values = [c[field] or 0 for c in paged]
        assert values == sorted(values, reverse=sort != "key")

    @pytest.mark.parametrize("after", ["x", "key:", "bytes:0x1p3:00", "key:0x0p0:zz", "used:0x0p0:" + 64 * "0", "é"])
    async def test_a_foreign_cursor_is_refused(self, kit: Kit, after: str) -> None:
        answer = await kit.client.get("/cache/chunks", params={"after": after})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "after"

    async def test_a_chunk_that_shares_the_entry_of_another_is_found_too(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await kit.ingest([DOCUMENTS[0] | {"id": "twin"}], collection="other")  # the same text: the same addresses
        assert len(await chunks(kit)) == 5
        assert {c["file_id"] for c in await chunks(kit, collection="other")} == {"twin"}
        monkeypatch.setattr("app.choose._ADDRESSED", 1)  # as if it were a very large collection
        assert await chunks(kit, collection="other") == []
        assert {c["file_id"] for c in await chunks(kit, collection="default")} == {"doc-mara", "doc-otto"}
        await post(kit, "pin", file_ids=["twin"])
        assert (await post(kit, "evict", all=True))["kept"] == 2
        assert (await post(kit, "unpin", file_ids=["doc-mara"]))["kept"] == 2
        assert (await post(kit, "unpin", file_ids=["twin"]))["changed"] == 2

    async def test_what_belongs_to_no_document_is_listed_without_one(self, kit: Kit) -> None:
        kit.service.retriever.delete_document("doc-otto")  # behind the service's back: nothing was swept
        found = await chunks(kit)
        assert len(found) == 5
        assert sum(c["chunk_id"] is None for c in found) == 2

    async def test_the_summary_adds_up(self, kit: Kit) -> None:
        found, listed = await summary(kit), await chunks(kit)
        assert found["entries"] == len(listed)
        assert found["bytes"] == sum(c["bytes"] for c in listed)
        assert found["pinned"] == 1
        assert [t["tier"] for t in found["tiers"]] == ["ram"]
        assert found["pins"] == {"all": False, "collections": [], "files": [], "chunk_ids": []}
        assert found["upkeep"] == {"running": None, "verify": None, "gc": None}
        assert found["settings"]["codec"] == "raw"


class TestPinning:
    async def test_a_document_is_pinned_and_unpinned(self, kit: Kit) -> None:
        found = await post(kit, "pin", file_ids=["doc-mara"])
        assert {k: found[k] for k in ("chunks", "entries", "changed", "kept")} == {
            "chunks": 2, "entries": 2, "changed": 2, "kept": 0,
        }  # fmt: skip
        mara = {c.id for c in kit.service.retriever.chunks("doc-mara")}
        assert await pinned_ids(kit) == {"prefix"} | mara
        assert (await summary(kit))["pins"]["files"] == [{"collection": "default", "file_id": "doc-mara"}]
        assert (await post(kit, "pin", file_ids=["doc-mara"]))["changed"] == 0
        assert (await post(kit, "unpin", file_ids=["doc-mara"]))["changed"] == 2
        assert await pinned_ids(kit) == {"prefix"}
        assert (await summary(kit))["pins"]["files"] == []

    async def test_an_update_of_a_pinned_document_is_pinned_too(self, kit: Kit) -> None:
        await post(kit, "pin", file_ids=["doc-mara"])
        before = {c["key"] for c in await chunks(kit, pinned=True)}
        await kit.ingest([DOCUMENTS[0] | {"text": "Mara Venn was a baker all her life. She grew up on a small boat."}])
        now = {c["key"] for c in await chunks(kit, pinned=True, file_id="doc-mara")}
        assert now
        assert not now & before
        assert {c["key"] for c in await chunks(kit, file_id="doc-mara")} == now

    async def test_what_joins_a_pinned_collection_is_pinned(self, kit: Kit) -> None:
        await post(kit, "pin", collections=["default"])
        await kit.ingest([{"id": "new", "text": "Runa Holt was a glazier. She lived in Norhaven with a dog."}])
        assert {c["pinned"] for c in await chunks(kit, file_id="new")} == {True}

    async def test_a_document_that_is_not_compiled_yet_can_be_pinned(self, open_kit: OpenKit) -> None:
        kit = await open_kit(precompute_on_ingest=False)
        assert (await kit.ingest())["state"] == "searchable"
        assert (await post(kit, "pin", file_ids=["doc-otto"]))["entries"] == 0
        await kit.service.precomputer.run(kit.service.retriever.documents())
        assert {c["file_id"] for c in await chunks(kit, pinned=True)} == {None, "doc-otto"}

    async def test_a_narrow_unpin_leaves_what_something_wider_pins(self, kit: Kit) -> None:
        await post(kit, "pin", collections=["default"])
        found = await post(kit, "unpin", file_ids=["doc-mara"])
        assert (found["changed"], found["kept"]) == (0, 2)
        assert len(await pinned_ids(kit)) == 5

    async def test_a_wide_unpin_forgets_what_is_within(self, kit: Kit) -> None:
        one = kit.service.retriever.chunks("doc-otto")[0].id
        await post(kit, "pin", collections=["default"])
        await post(kit, "pin", file_ids=["doc-mara"])
        await post(kit, "pin", chunk_ids=[one])
        assert (await post(kit, "unpin", collections=["default"]))["changed"] == 4
        pins = (await summary(kit))["pins"]
        assert pins == {"all": False, "collections": [], "files": [], "chunk_ids": []}

    async def test_what_was_deleted_is_not_pinned_when_its_name_comes_back(self, kit: Kit) -> None:
        kit.service.retriever.create_collection("other")
        await kit.ingest([{"id": "new", "text": "Runa Holt was a glazier in Norhaven."}], collection="other")
        await post(kit, "pin", collections=["other"])
        await post(kit, "pin", file_ids=["doc-otto"])
        kit.service.retriever.delete_collection("other")
        kit.service.retriever.delete_document("doc-otto")
        assert (await post(kit, "unpin", 404, collections=["other"]))["error"]["code"] == "collection_not_found"
        pins = (await summary(kit))["pins"]
        assert (pins["collections"], pins["files"]) == ([], [])

    async def test_all_is_all_but_the_prefix(self, kit: Kit) -> None:
        assert (await post(kit, "pin", all=True))["changed"] == 4
        assert (await post(kit, "unpin", all=True))["changed"] == 4
        assert await pinned_ids(kit) == {"prefix"}

    async def test_a_chunk_shared_by_two_collections_stays_pinned_by_the_other(self, kit: Kit) -> None:
        await kit.ingest([DOCUMENTS[0]], collection="other")  # the same document: the same chunks, the same KV
        await post(kit, "pin", collections=["other"])
        found = await post(kit, "unpin", collections=["default"])
        assert found["kept"] == 2
        assert len(await pinned_ids(kit)) == 3

    def test_a_broken_file_of_pins_is_named_and_nothing_is_pinned(self, tmp_path: Path) -> None:
        for text in ("", "[]", '{"format": 2}', '{"format": 1, "colections": []}', '{"documents": ["x"]}'):
            (tmp_path / FILE).write_text(text)
            with pytest.raises(DataFileError, match=r"pins\.json does not hold pins"):
                Pins(tmp_path).read()
            with pytest.raises(DataFileError), Pins(tmp_path).changing():
                pass
            assert (tmp_path / FILE).read_text() == text  # what somebody may want to mend is not overwritten

    async def test_a_broken_file_of_pins_does_not_stop_precompute(self, open_kit: OpenKit, tmp_path: Path) -> None:
        kit = await open_kit()
        (tmp_path / FILE).write_text("{")
        assert (await kit.ingest())["state"] == "precomputed"
        answer = await kit.client.get("/cache/summary")
        assert answer.status_code == 500
        assert str(tmp_path) not in answer.text

    def test_pins_of_two_at_once_are_all_kept(self, tmp_path: Path) -> None:
        def pin(number: int) -> None:
            with Pins(tmp_path).changing() as pinned:
                pinned.chunks.add(f"chk_{number}")

        threads = [threading.Thread(target=pin, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Pins(tmp_path).read().chunks == {f"chk_{n}" for n in range(16)}
        assert json.loads((tmp_path / FILE).read_text())["chunks"] == sorted(f"chk_{n}" for n in range(16))


class TestEvicting:
    async def test_an_evicted_document_is_a_miss_that_says_so(self, kit: Kit) -> None:
        found = await post(kit, "evict", file_ids=["doc-mara"])
        assert (found["changed"], found["kept"]) == (2, 0)
        assert await chunks(kit, file_id="doc-mara") == []
        answer = (await kit.chat()).json()
        reasons = {c["miss_reason"] for c in answer["rag"]["cache"]["chunks"] if c["missing"]}
        assert reasons == {"evicted"}

    async def test_pinned_entries_stay(self, kit: Kit) -> None:
        one = kit.service.retriever.chunks("doc-mara")[0].id
        await post(kit, "pin", chunk_ids=[one])
        found = await post(kit, "evict", all=True)
        assert (found["entries"], found["changed"], found["kept"]) == (4, 3, 1)
        assert {c["chunk_id"] for c in await chunks(kit)} == {"prefix", one}

    async def test_it_is_compiled_again_by_the_next_precompute(self, kit: Kit) -> None:
        await post(kit, "evict", collections=["default"])
        report = await kit.service.precomputer.run(kit.service.retriever.documents())
        assert report.done == 4
        assert len(await chunks(kit)) == 5


class TestMoving:
    async def test_keys_of_the_selection_go_to_the_process_that_blends(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved: list[tuple[str, set[str]]] = []

        async def warm(keys: list[Any]) -> int:
            moved.append(("warm", {k.hex for k in keys}))
            return len(keys) - 1

        async def cool(keys: list[Any]) -> int:
            moved.append(("cool", {k.hex for k in keys}))
            return 0

        monkeypatch.setattr(kit.engine, "warm", warm)
        monkeypatch.setattr(kit.engine, "cool", cool)
        mara = {c["key"] for c in await chunks(kit, file_id="doc-mara")}
        assert (await post(kit, "warm", file_ids=["doc-mara"]))["changed"] == 1
        assert (await post(kit, "move", tier="ram", file_ids=["doc-mara"]))["entries"] == 2
        assert (await post(kit, "move", tier="ssd", all=True))["changed"] == 0
        assert [what for what, _ in moved] == ["warm", "warm", "cool"]
        assert moved[0][1] == moved[1][1] == mara
        assert len(moved[2][1]) == 4

    async def test_kv_of_another_model_is_neither_moved_nor_pinned(self, kit: Kit) -> None:
        control, layout = kit.service.control, kit.service.engine.info.layout.digest.hex()
        assert len(control.choose(Selection(everything=True), layout=layout).entries) == 4
        assert control.choose(Selection(everything=True), layout="0" * 64).entries == ()
        assert control.pin(Selection(documents=("doc-mara",)), layout="0" * 64).changed == 0


class TestRefusals:
    @pytest.mark.parametrize("what", ["pin", "unpin", "evict", "warm", "move"])
    async def test_an_empty_selection_is_not_everything(self, kit: Kit, what: str) -> None:
        body = {"tier": "ram"} if what == "move" else {}
        error = (await post(kit, what, 400, **body))["error"]
        assert "nothing is selected" in error["message"]
        error = (await post(kit, what, 400, all=True, file_ids=["doc-mara"], **body))["error"]
        assert error["param"] == "all"
        assert len(await chunks(kit)) == 5

    @pytest.mark.parametrize(
        ("given", "code"),
        [
            ({"collections": ["atlantis"]}, "collection_not_found"),
            ({"file_ids": ["doc-mara", "doc-nobody"]}, "file_not_found"),
            ({"chunk_ids": ["chk_nothing"]}, "file_not_found"),
            ({"chunk_ids": ["chk_nothing", "prefix"], "collections": ["default"]}, "file_not_found"),
        ],
    )
    async def test_what_is_not_there_is_named_and_nothing_is_done(
        self, kit: Kit, given: dict[str, Any], code: str
    ) -> None:
        for what in ("pin", "unpin", "evict", "warm"):
            error = (await post(kit, what, 404, **given))["error"]
            assert error["code"] == code
            assert any(word in error["message"] for word in ("atlantis", "doc-nobody", "chk_nothing"))
        assert len(await chunks(kit)) == 5
        assert await pinned_ids(kit) == {"prefix"}

    async def test_unknown_fields_are_a_warning_or_refused(self, kit: Kit, open_kit: OpenKit) -> None:
        answer = await kit.client.post("/cache/pin", json={"file_ids": ["doc-mara"], "document": "x"})
        assert "document" in answer.headers["x-ragblend-warning"]
        strict = await open_kit(strict=True)
        error = (await post(strict, "gc", 400, ful=True))["error"]
        assert error["code"] == "unknown_parameter"
        assert (await post(strict, "move", 400, tier="tape", all=True))["error"]["param"] == "tier"

    async def test_only_json_is_read(self, kit: Kit) -> None:
        for what in ("pin", "unpin", "evict", "warm", "move", "verify", "gc"):
            answer = await kit.client.post(f"/cache/{what}", content=b"{}", headers={"content-type": "text/plain"})
            assert answer.status_code == 415

    def test_the_library_refuses_the_same(self, tmp_path: Path) -> None:
        control = Control(MemoryStore(), None, bytes(32), Pins(tmp_path))
        with pytest.raises(BadRequestError, match="sort"):
            control.listing(sort="colour")  # type: ignore[arg-type]
        with pytest.raises(BadRequestError, match="nothing is selected"):
            control.evict(Selection())
        assert control.listing().rows == ()


class TestUpkeep:
    async def test_verify_finds_what_is_damaged_and_repairs_it(self, kit: Kit) -> None:
        found = await post(kit, "verify")
        assert {k: found[k] for k in ("state", "checked", "bad", "repaired")} == {
            "state": "completed", "checked": 5, "bad": [], "repaired": 0,
        }  # fmt: skip
        victim = await _damage(kit)
        assert (await post(kit, "verify"))["bad"] == [victim]
        assert (await post(kit, "verify", repair=True))["repaired"] == 1
        assert (await post(kit, "verify"))["checked"] == 4
        last = (await summary(kit))["upkeep"]["verify"]
        assert last["checked"] == 4
        assert last["seconds"] >= 0

    async def test_gc_reports_what_it_did(self, open_kit: OpenKit) -> None:
        kit = await open_kit(store=MemoryStore(StoreConfig(ttl_s=0.001)))
        await kit.ingest()
        await asyncio.sleep(0.01)
        found = await post(kit, "gc", full=True)
        assert set(found) == {"object", "state", "freed_bytes", "moved_bytes", "expired", "evicted"}
        assert found["expired"] == 4  # the prefix is pinned
        assert (await summary(kit))["upkeep"]["gc"]["expired"] == 4

    async def test_one_at_a_time_and_it_goes_on_when_nobody_waits(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go = threading.Event()

        def slow(*, repair: bool = False) -> VerifyReport:
            assert go.wait(30)
            return VerifyReport(7, (), 0)

        monkeypatch.setattr(kit.engine.store, "verify", slow)
        monkeypatch.setattr(kit.engine.store, "gc", lambda *, full=False: GcReport(1, 2, 3, 4))
        answer = await kit.client.post("/cache/verify?wait=false", json={})
        assert answer.status_code == 202
        assert answer.json()["state"] == "running"
        assert (await summary(kit))["upkeep"]["running"]["kind"] == "verify"
        for what in ("verify", "gc"):
            answer = await kit.client.post(f"/cache/{what}", json={})
            assert answer.status_code == 429
            assert "verify is running" in answer.json()["error"]["message"]
        go.set()
        for _ in range(500):
            if (await summary(kit))["upkeep"]["running"] is None:
                break
            await asyncio.sleep(0.01)
        assert (await summary(kit))["upkeep"]["verify"]["checked"] == 7
        assert (await post(kit, "gc"))["evicted"] == 4

    async def test_a_stopping_service_does_not_wait_for_a_long_verification(
        self, open_kit: OpenKit, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        kit = await open_kit(store=SsdStore(StoreConfig(path=tmp_path / "kv")))
        await kit.ingest()
        store: Any = kit.engine.store
        batches = store.batches

        def endless() -> Any:
            while True:
                yield from batches()

        store.batches = endless
        assert (await kit.client.post("/cache/verify?wait=false", json={})).status_code == 202
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        await kit.service.close()
        assert time.perf_counter() - begin < 5
        assert kit.service.upkeep.view()["verify"]["error"] == "StoreError"
        assert "verify failed" in caplog.text


async def _damage(kit: Kit) -> str:
    """Flip a bit of a stored plane, behind the store's back; the entry's key."""
    refs = kit.service.references.of(kit.service.retriever.document("doc-mara"))
    key = refs[0].key
    store: Any = kit.engine.store
    plane = store._held[key].planes[0]
    plane.setflags(write=True)
    plane[3] ^= 1
    return key.hex
