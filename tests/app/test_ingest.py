"""Ingest: one bad file loses nothing, a full store loses nothing, a restart loses nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
from typing import Any

import pytest

from app import precompute as precompute_module
from app.jobs import Item
from app.precompute import PrecomputeReport, precompute
from blend.types import CompileJob, CompileResult
from retriever.errors import UnknownCollectionError
from store.errors import StoreFullError
from store.memory import MemoryStore
from store.types import ChunkKV

from .conftest import DOCUMENTS, Kit, OpenKit


class FullStore(MemoryStore):
    """A store on a device that is full after ``room`` entries."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def put(self, chunk: ChunkKV) -> int:
        if len(list(self.entries())) >= self.room:
            raise StoreFullError("no space left on the device")
        return super().put(chunk)


async def job_until(kit: Kit, job_id: str, *states: str) -> dict[str, Any]:
    for _ in range(500):
        job: dict[str, Any] = (await kit.client.get(f"/jobs/{job_id}")).json()
        if job["state"] in states:
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(f"the job stays {job['state']}")


async def test_a_job_is_accepted_at_once_and_ends_precomputed(empty_kit: Kit) -> None:
    answer = await empty_kit.client.post("/ingest", json={"documents": DOCUMENTS})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    job = await job_until(empty_kit, job["id"], "precomputed", "failed")
    assert job["last_error"] is None
    assert job["counts"] == {"total": 2, "completed": 2, "failed": 0}
    assert [(d["document_id"], d["status"], d["chunks"]) for d in job["documents"]] == [
        ("doc-mara", "precomputed", 2),
        ("doc-otto", "precomputed", 2),
    ]
    assert job["finished_at"] >= job["created_at"]
    assert empty_kit.engine.store.stats().entries == 5
    assert (await empty_kit.client.get("/jobs")).json()["data"][0] == job


async def test_without_precompute_a_job_ends_searchable(open_kit: OpenKit) -> None:
    kit = await open_kit(precompute_on_ingest=False)
    assert (await kit.ingest())["state"] == "searchable"
    assert kit.engine.store.stats().entries == 0


async def test_one_bad_file_does_not_lose_the_others(empty_kit: Kit) -> None:
    files = [
        ("files", ("good.txt", b"Mara Venn was a painter.")),
        ("files", ("empty.txt", b"")),
        ("files", ("blank.md", b" \n\n ")),
        ("files", ("broken.pdf", b"%PDF-1.7 nonsense")),
        ("files", ("program.exe", b"MZ\x00\x01")),
        ("files", ("broken.json", b'{"text": ')),
        ("files", ("../../etc/passwd.txt", b"Otto Brandt was a sailor.")),
        ("files", ("straße 東京 😀.md", "# Über\n\nGrüße aus Tokio.".encode())),
        ("files", ("three.json", json.dumps([{"text": "One."}, {"text": "Two."}, {"text": "Three."}]).encode())),
    ]
    answer = await empty_kit.client.post("/ingest?wait=true", files=files)
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["state"] == "precomputed"
    by_name: dict[str, list[str]] = {}
    for d in job["documents"]:
        by_name.setdefault(d["filename"], []).append(d["error"]["code"] if d["error"] else d["status"])
    assert by_name == {
        "good.txt": ["precomputed"],
        "empty.txt": ["invalid_file"],
        "blank.md": ["invalid_file"],
        "broken.pdf": ["invalid_file"],
        "program.exe": ["unsupported_file"],
        "broken.json": ["invalid_file"],
        "passwd.txt": ["precomputed"],
        "straße 東京 😀.md": ["precomputed"],
        "three.json": ["precomputed"] * 3,
    }
    assert job["counts"] == {"total": 11, "completed": 6, "failed": 5}
    assert job["last_error"]["message"].startswith("5 of 11 failed")
    assert len(empty_kit.service.retriever.documents("default")) == 6


async def test_a_job_of_bad_files_only_is_failed(empty_kit: Kit) -> None:
    for files, code in (({"file": ("a.txt", b"")}, "invalid_file"), ({"file": ("a.xyz", b"x")}, "unsupported_file")):
        job = (await empty_kit.client.post("/ingest?wait=true", files=files)).json()
        assert (job["state"], job["last_error"]["code"]) == ("failed", code)
        assert job["last_error"]["message"]


async def test_the_same_bytes_are_the_same_document(kit: Kit) -> None:
    before = kit.engine.store.stats()
    job = await kit.ingest()
    assert [d["unchanged"] for d in job["documents"]] == [True, True]
    assert job["state"] == "precomputed"
    assert kit.engine.store.stats() == before
    files = [("files", ("a.txt", b"Same bytes here.")), ("files", ("a.txt", b"Same bytes here."))]
    first, second = (await kit.client.post("/ingest?wait=true", files=files)).json()["documents"]
    assert first["document_id"] == second["document_id"]
    assert len(kit.service.retriever.documents()) == 3


async def test_an_edited_document_replaces_its_old_self_and_keeps_what_did_not_change(kit: Kit) -> None:
    edited = DOCUMENTS[0] | {"text": DOCUMENTS[0]["text"].replace("Eastford", "Northgate")}
    before = {e.key for e in kit.engine.store.entries()}
    job = await kit.ingest([edited])
    assert job["documents"][0]["unchanged"] is False
    after = {e.key for e in kit.engine.store.entries()}
    assert len(after - before) == len(before - after) == 1  # the second chunk is new, and its old KV is gone
    texts = [c.text for c in kit.service.retriever.chunks("doc-mara")]
    assert "Northgate" in texts[1]
    body = (await kit.chat(rag={"filters": {"type": "eq", "key": "document_id", "value": "doc-mara"}})).json()
    assert "Northgate" in body["rag"]["results"][1]["text"]
    assert body["rag"]["cache"]["missing"] == 0


async def test_ready_made_chunks_stay_as_they_are(empty_kit: Kit) -> None:
    chunks = ["First, and far longer than a chunk would be here: " + "x " * 100, "second"]
    job = await empty_kit.ingest([{"id": "own", "title": "Own", "chunks": chunks}], collection="own")
    assert job["documents"][0]["chunks"] == 2
    assert [c.text for c in empty_kit.service.retriever.chunks("own")] == chunks


async def test_form_fields_name_collection_title_and_metadata(empty_kit: Kit) -> None:
    data = {"collection": "notes", "title": "Größe", "metadata": '{"year": 1984}'}
    answer = await empty_kit.client.post("/ingest?wait=true", files={"file": ("a.txt", b"Some text.")}, data=data)
    assert answer.json()["collection"] == "notes"
    [info] = empty_kit.service.retriever.documents("notes")
    assert (info.title, dict(info.metadata)) == ("Größe", {"year": 1984})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": ["text"]}, "documents[0]"),
        ({"documents": [{"title": "x"}]}, "documents[0].text"),
        ({"documents": [{"text": "x", "chunks": ["y"]}]}, "documents[0].text"),
        ({"documents": [{"text": 1}]}, "documents[0].text"),
        ({"documents": [{"text": "x", "metadata": {"a": [1]}}]}, None),
        ({"documents": [{"text": "x"}], "collection": "a/b"}, "collection"),
        ({"documents": [{"text": "x"}], "collection": ""}, "collection"),
    ],
)
async def test_a_bad_ingest_request_is_refused_whole(empty_kit: Kit, body: dict[str, Any], param: str | None) -> None:
    answer = await empty_kit.client.post("/ingest", json=body)
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param
    assert (await empty_kit.client.get("/jobs")).json()["data"] == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"no boundary", "multipart/form-data"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (
            b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nonly a field\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
    ],
)
async def test_a_broken_form_is_a_400(empty_kit: Kit, content: bytes, kind: str) -> None:
    answer = await empty_kit.client.post("/ingest", content=content, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


async def test_file_sizes_and_numbers_are_limited(open_kit: OpenKit) -> None:
    kit = await open_kit(limits={"file_mib": 0.001, "upload_mib": 0.1, "multipart_parts": 3})
    large = await kit.client.post("/ingest", files={"file": ("a.txt", b"x" * 2000)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert (await kit.client.post("/ingest", files={"file": ("a.txt", b"x" * 200000)})).status_code == 413
    many = [("files", (f"{i}.txt", b"x")) for i in range(4)]
    assert (await kit.client.post("/ingest", files=many)).status_code == 400


async def test_a_full_store_leaves_the_document_searchable(open_kit: OpenKit) -> None:
    kit = await open_kit(store=FullStore(room=2))
    job = await kit.ingest()
    assert job["state"] == "searchable"
    assert job["last_error"]["code"] == "server_error"
    assert "full" in job["last_error"]["message"]
    assert {d["status"] for d in job["documents"]} == {"searchable"}
    body = (await kit.chat(rag={"blend": {"mode": "blend"}})).json()
    assert body["choices"][0]["message"]["content"] == "Mara Venn was a painter."
    assert 0 < body["rag"]["cache"]["missing"] < body["rag"]["cache"]["tokens"]
    kit.engine.store.room = 100  # type: ignore[attr-defined]
    assert (await kit.ingest())["state"] == "precomputed"


async def test_a_broken_engine_leaves_the_document_searchable(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(job: CompileJob) -> CompileResult:
        raise RuntimeError("secret")

    monkeypatch.setattr(kit.engine, "compile", broken)
    job = await kit.ingest([{"text": "New text."}])
    assert job["state"] == "searchable"
    assert "secret" not in json.dumps(job)
    assert (await kit.ingest())["state"] == "precomputed"  # nothing to compile


async def test_a_full_device_refuses_the_upload_and_serves_on(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kit.service.jobs is not None

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kit.service.jobs.records, "put_bytes", full)
        for body in ({"json": {"documents": DOCUMENTS}}, {"files": {"file": ("a.txt", b"x")}}):
            answer = await kit.client.post("/ingest", **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
    assert kit.service.jobs.running == 0
    assert (await kit.chat()).status_code == 200
    assert (await kit.ingest())["state"] == "precomputed"


async def test_a_job_whose_record_cannot_be_written_still_ends(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kit.service.jobs is not None
    job = await kit.service.jobs.submit("default", [(Item(0, "text", "a.txt"), b"Written anyway.")])

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(kit.service.jobs.records, "save", full)
    await kit.service.jobs.wait(job)
    assert job.state == "precomputed"


async def test_the_queue_is_bounded(open_kit: OpenKit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = await open_kit(limits={"jobs": 2})
    gate = asyncio.Event()
    compile_ = kit.engine.compile

    async def slow(job: CompileJob) -> CompileResult:
        await gate.wait()
        return await compile_(job)

    monkeypatch.setattr(kit.engine, "compile", slow)
    answers = [await kit.client.post("/ingest", json={"documents": [{"text": f"Text {i}."}]}) for i in range(4)]
    assert [a.status_code for a in answers] == [202, 202, 429, 429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60
    for answer in answers[:2]:
        await job_until(kit, answer.json()["id"], "precomputing", "searchable")
    gate.set()
    for answer in answers[:2]:
        await job_until(kit, answer.json()["id"], "precomputed")
    assert (await kit.client.post("/ingest", json={"documents": [{"text": "Later."}]})).status_code == 202


async def test_a_document_can_be_asked_about_while_it_is_precomputed(open_kit: OpenKit, monkeypatch: Any) -> None:
    kit = await open_kit()
    gate = asyncio.Event()

    async def slow(job: CompileJob) -> CompileResult:
        await gate.wait()
        return CompileResult(0, 0, 0, 0.0)

    monkeypatch.setattr(kit.engine, "compile", slow)
    job = (await kit.client.post("/ingest", json={"documents": DOCUMENTS})).json()
    job = await job_until(kit, job["id"], "precomputing")
    assert (await kit.chat()).json()["choices"][0]["message"]["content"] == "Mara Venn was a painter."
    gate.set()


@pytest.mark.parametrize("cut", ["ingest", "precompute"])
async def test_a_job_cut_short_goes_on_after_a_restart(open_kit: OpenKit, monkeypatch: Any, cut: str) -> None:
    kit = await open_kit()
    never = asyncio.Event()

    async def stuck(*_: object, **__: object) -> Any:
        await never.wait()

    if cut == "ingest":
        monkeypatch.setattr(kit.service.jobs, "_steps", (stuck, stuck))
    monkeypatch.setattr(kit.engine, "compile", stuck)
    job = (await kit.client.post("/ingest", json={"documents": DOCUMENTS})).json()
    await job_until(kit, job["id"], "queued" if cut == "ingest" else "precomputing")
    monkeypatch.setattr(precompute_module, "FINISH_S", 0.05)
    await kit.service.close()

    again = await open_kit()
    job = await job_until(again, job["id"], "precomputed", "failed")
    assert job["state"] == "precomputed"
    assert [d["document_id"] for d in job["documents"]] == ["doc-mara", "doc-otto"]
    assert again.engine.store.stats().entries == 5
    assert not list((again.service.settings.data_dir / "uploads").glob("*"))


async def test_precompute_is_resumable_and_skips_what_is_there(open_kit: OpenKit) -> None:
    kit = await open_kit(precompute_on_ingest=False)
    await kit.ingest()
    seen: list[tuple[int, int]] = []

    def progress(report: PrecomputeReport, total: int) -> None:
        seen.append((report.chunks, total))

    report = await precompute(kit.service, progress=progress)
    assert (report.done, report.skipped, report.failed, report.stopped) == (4, 0, 0, None)
    assert report.bytes > 0
    assert report.tokens > 0
    assert seen[-1] == (4, 4)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    again = await precompute(kit.service)
    assert (again.done, again.skipped, again.bytes) == (0, 4, 0)
    lost = next(e for e in kit.engine.store.entries() if e.tokens == 51)
    kit.engine.store.delete(lost.key)
    assert ((await precompute(kit.service)).done, kit.engine.store.stats().entries) == (1, 5)
    anew = await precompute(kit.service, only_missing=False)
    assert (anew.done, anew.skipped) == (4, 0)


async def test_precompute_keeps_to_its_limit_and_collection(open_kit: OpenKit) -> None:
    kit = await open_kit(precompute_on_ingest=False)
    await kit.ingest()
    await kit.ingest([{"text": "Other."}], collection="other")
    report = await precompute(kit.service, max_gib=1e-9)
    assert report.done == 0
    assert report.stopped is not None
    assert "limit" in report.stopped
    assert (await precompute(kit.service, collection="other")).done == 1
    with pytest.raises(UnknownCollectionError):
        await precompute(kit.service, collection="nowhere")


async def test_an_interrupted_precompute_finishes_its_pass(open_kit: OpenKit, monkeypatch: Any) -> None:
    kit = await open_kit(precompute_on_ingest=False)
    await kit.ingest()
    compile_, started = kit.engine.compile, asyncio.Event()

    async def slow(job: CompileJob) -> CompileResult:
        started.set()
        await asyncio.sleep(0.05)
        return await compile_(job)

    monkeypatch.setattr(kit.engine, "compile", slow)
    running = asyncio.create_task(precompute(kit.service))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert kit.engine.store.stats().entries == 1
    assert (await precompute(kit.service)).done == 4


async def test_precompute_waits_for_chat(open_kit: OpenKit) -> None:
    kit = await open_kit(precompute_on_ingest=False)
    await kit.ingest()
    with kit.service.traffic.enter():
        running = asyncio.create_task(precompute(kit.service))
        await asyncio.sleep(0.05)
        assert kit.engine.store.stats().entries == 0
    assert (await running).done == 4


async def test_closing_twice_is_closing_once(open_kit: OpenKit) -> None:
    kit = await open_kit()
    await kit.service.close()
    await kit.service.close()
    answer = await kit.client.post("/ingest", json={"documents": [{"text": "x"}]})
    assert answer.status_code == 503


async def test_the_formats_are_listed(empty_kit: Kit) -> None:
    formats = (await empty_kit.client.get("/ingest/formats")).json()["data"]
    assert {".txt", ".md", ".html", ".json", ".pdf"} <= {f["extension"] for f in formats}
