"""The compile context ``neighbours``: chunks compiled behind those most like them, and behind nothing that is gone."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import pytest

from app.errors import SettingsError, StartError
from app.precompute import PrecomputeReport, precompute
from app.sweep import sweep
from blend.types import CompileJob, CompileResult
from store import StoreConfig, open_store
from store.errors import StoreIOError
from store.memory import MemoryStore
from store.types import KVKey

from .conftest import Kit, OpenKit

TOPICS = ("painter farm", "sailor parrot", "doctor violin", "teacher garden")
SETTINGS: dict[str, Any] = {"compile": {"context": "neighbours", "neighbours": 2}}


def document(n: int, word: str = "", paragraphs: int = 2) -> dict[str, Any]:
    """Two chunks of one of four topics, each with the mark of its document (``d7``) and ``word``."""
    topic = TOPICS[n % len(TOPICS)]
    text = "\n\n".join(f"Here d{n} part{p} {word} tells of the {topic} again." for p in range(paragraphs))
    return {"id": f"doc{n}", "title": "Notes", "text": text}


class Behind:
    """Watches an engine: what each key's KV was computed behind, as text."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.text, self.jobs = kit, dict[KVKey, str](), list[CompileJob]()
        self._compile = kit.engine.compile
        kit.engine.compile = self.compile  # type: ignore[method-assign]

    async def compile(self, job: CompileJob) -> CompileResult:
        self.jobs.append(job)
        before = job.context
        for key, chunk in zip(job.keys, job.chunks, strict=True):
            self.text[key] = self.kit.engine.tokenizer.decode(before)
            before += chunk
        return await self._compile(job)

    def stored(self) -> dict[KVKey, str]:
        return {e.key: self.text[e.key] for e in self.kit.engine.store.entries()}


@pytest.fixture
async def kit(open_kit: OpenKit) -> Kit:
    """Ten documents, precomputed behind two neighbours each."""
    return await open_kit(**SETTINGS)


@pytest.fixture
async def behind(kit: Kit) -> Behind:
    watching = Behind(kit)
    assert (await kit.ingest([document(n) for n in range(10)]))["state"] == "precomputed"
    return watching


def having(kit: Kit, *marks: str, collection: str = "default") -> set[str]:
    """Ids of the chunks that have a neighbour with one of these marks, of documents without them."""
    found = set()
    for d in kit.service.retriever.documents(collection):
        hood = kit.service.retriever.neighbourhood(d.id, collection)
        for own, near in zip(hood.chunks, hood.neighbours, strict=True):
            if any(m in n.text for n in near for m in marks) and not any(m in own.text for m in marks):
                found.add(own.id)
    return found


def addresses(kit: Kit, collection: str | None = None) -> dict[str, KVKey]:
    refs = [r for d in kit.service.retriever.documents(collection) for r in kit.service.references.of(d)]
    return {r.name: r.key for r in refs}


async def test_each_chunk_is_compiled_behind_the_prefix_and_its_neighbours_the_nearest_last(
    kit: Kit, behind: Behind
) -> None:
    prefix = kit.engine.tokenizer.decode(kit.service.layout.prefix)
    for d in kit.service.retriever.documents():
        hood = kit.service.retriever.neighbourhood(d.id)
        for own, near, ref in zip(hood.chunks, hood.neighbours, kit.service.references.of(d), strict=True):
            assert len(near) == 2
            assert behind.text[ref.key] == prefix + "".join(n.text + "\n\n" for n in near[::-1])
            assert own.text not in behind.text[ref.key]
    assert kit.engine.store.stats().entries == 21


async def test_a_question_finds_what_was_compiled(kit: Kit, behind: Behind) -> None:
    for n in range(10):
        body = (await kit.chat(messages=[{"role": "user", "content": f"What does d{n} tell?"}])).json()
        assert body["rag"]["cache"]["missing"] == 0
        assert body["rag"]["cache"]["reused"] > 0
        assert {r["chunk_id"] for r in body["rag"]["results"]} <= set(addresses(kit))
    report = await precompute(kit.service)
    assert (report.done, report.skipped, report.cascaded, report.removed) == (0, 20, 0, 0)


async def test_a_chunk_without_neighbours_yet_is_slower_and_not_wrong(open_kit: OpenKit) -> None:
    kit = await open_kit(**SETTINGS, precompute_on_ingest=False)
    await kit.ingest([document(0), document(1)])
    body = (await kit.chat()).json()
    assert body["choices"][0]["message"]["content"].startswith("Here d")
    assert body["rag"]["cache"]["mode"] == "full"
    assert (await precompute(kit.service)).done == 4
    assert (await kit.chat()).json()["rag"]["cache"]["missing"] == 0


async def test_after_deletion_no_stored_entry_was_compiled_behind_the_deleted_text(kit: Kit, behind: Behind) -> None:
    concerned, before = having(kit, "d3"), addresses(kit)
    assert 0 < len(concerned) < 10
    assert any("d3" in text for text in behind.stored().values())
    kit.service.retriever.delete_document("doc3")
    assert await kit.service.precomputer.sweep() == len(concerned) + 2  # and the document's own two chunks
    assert not any("d3" in text for text in behind.stored().values())
    stored = {e.key for e in kit.engine.store.entries()}
    unconcerned = {name: key for name, key in before.items() if name in addresses(kit) and name not in concerned}
    assert set(unconcerned.values()) <= stored, "nobody else lost anything"

    behind.jobs.clear()
    report = await precompute(kit.service)
    assert {name for name, key in addresses(kit).items() if key not in before.values()} == concerned
    assert (report.cascaded, report.done, report.failed) == (len(concerned), len(concerned), 0)
    assert len(behind.jobs) == len(concerned), "and nothing else was computed"
    assert set(addresses(kit).values()) < {e.key for e in kit.engine.store.entries()}
    assert not any("d3" in text for text in behind.stored().values())


async def test_an_edit_compiles_its_own_chunks_and_those_that_had_them_as_neighbours(kit: Kit, behind: Behind) -> None:
    concerned, before = having(kit, "d3"), addresses(kit)
    behind.jobs.clear()
    job = await kit.ingest([document(3, word="newly")])
    assert (job["state"], job["cascaded"]) == ("precomputed", len(concerned))
    assert len(behind.jobs) == len(concerned) + 2
    assert not any("part0  tells" in t and "d3 part0  " in t for t in behind.stored().values())
    after = addresses(kit)
    assert {name for name in before if after.get(name) != before[name]} == concerned | (set(before) - set(after))
    assert set(after.values()) < {e.key for e in kit.engine.store.entries()}
    assert kit.engine.store.stats().entries == 21, "the old ones are gone"


async def test_a_cascade_compiles_no_chunk_that_did_not_lose_a_neighbour(kit: Kit, behind: Behind) -> None:
    """Not even one that is missing for another reason, in a document that is being looked at anyway."""
    mixed = "\n\n".join(f"Here mixed part{p} tells of the {TOPICS[p]} again." for p in (0, 1))
    await kit.ingest([{"id": "mixed", "title": "Notes", "text": mixed}])
    [first, second] = kit.service.retriever.neighbourhood("mixed").neighbours
    edited = first[0].document_id
    assert edited not in {c.document_id for c in second}
    lost = addresses(kit)[kit.service.retriever.chunks("mixed")[1].id]
    kit.engine.store.delete(lost, evicted=True)
    assert (await kit.ingest([document(int(edited[3:]), word="newly")]))["cascaded"] > 0
    assert not kit.engine.store.contains(lost)
    assert (await precompute(kit.service)).done == 1


async def test_new_documents_recompile_nobody(kit: Kit, behind: Behind) -> None:
    before = addresses(kit)
    behind.jobs.clear()
    job = await kit.ingest([document(n) for n in range(10, 14)])
    assert (job["cascaded"], len(behind.jobs)) == (0, 8)
    assert {name: addresses(kit)[name] for name in before} == before
    await kit.ingest([document(3) | {"metadata": {"read": True}}])
    assert len(behind.jobs) == 8, "other metadata, same text"


async def test_refreshing_gives_everybody_the_nearest_of_today(kit: Kit, behind: Behind) -> None:
    await kit.ingest([document(n, paragraphs=1) for n in range(10, 30)])
    before, old = addresses(kit), {e.key for e in kit.engine.store.entries()}
    report = await precompute(kit.service, refresh_neighbours=True)
    moved = {name for name, key in addresses(kit).items() if before[name] != key}
    assert 0 < len(moved) == report.done == report.removed
    assert report.cascaded == 0
    now = {e.key for e in kit.engine.store.entries()}
    assert now - old == {addresses(kit)[name] for name in moved}
    assert old - now == {before[name] for name in moved}
    again = await precompute(kit.service, refresh_neighbours=True)
    assert (again.done, again.removed) == (0, 0)


async def test_there_is_nothing_to_refresh_in_another_compile_context(open_kit: OpenKit) -> None:
    kit = await open_kit()
    with pytest.raises(SettingsError, match=r"compile.context is document.* set it to neighbours"):
        await precompute(kit.service, refresh_neighbours=True)


async def test_another_number_of_neighbours_takes_effect_with_the_next_precompute(open_kit: OpenKit) -> None:
    store = MemoryStore()
    kit = await open_kit(store=store, **SETTINGS)
    await kit.ingest([document(n) for n in range(6)])
    kit.service.precomputer._neighbours = 4
    assert (await kit.chat()).json()["rag"]["cache"]["missing"] == 0, "until then what is stored is served"
    report = await precompute(kit.service)
    assert (report.done, report.removed, report.cascaded) == (12, 12, 0)
    assert {len(r.behind) for d in kit.service.retriever.documents() for r in kit.service.references.of(d)} == {4}


async def test_addresses_follow_the_neighbours_at_once(kit: Kit, behind: Behind) -> None:
    """Nothing that was cached about a document survives a change of its chunks' neighbours."""
    documents = {d.id: d for d in kit.service.retriever.documents()}
    concerned, before = having(kit, "d3"), addresses(kit)
    kit.service.retriever.delete_document("doc3")
    old = {
        name: r for d in documents.values() if d.id != "doc3" for r in kit.service.references.of(d) for name in [r.name]
    }
    assert {name for name, r in old.items() if r.key != before[name]} == concerned
    assert all(old[name].behind == () for name in concerned)
    kit.service.retriever.assign_neighbours("default", 2)
    new = {r.name: r for d in documents.values() if d.id != "doc3" for r in kit.service.references.of(d)}
    assert all(len(new[name].behind) == 2 and new[name].key not in before.values() for name in concerned)


async def test_neighbours_never_cross_a_collection(kit: Kit, behind: Behind) -> None:
    await kit.ingest([document(n, word="secret") for n in range(10, 16)], collection="other")
    default, other = set(addresses(kit, "default").values()), set(addresses(kit, "other").values())
    assert len(default) == 20
    assert len(other) == 12
    assert not any("secret" in behind.text[key] for key in default)
    assert all("secret" in behind.text[key] and "d1" in behind.text[key] for key in other)


async def test_a_document_in_two_collections_loses_kv_in_the_one_it_is_deleted_from(kit: Kit, behind: Behind) -> None:
    await kit.ingest([document(n) for n in (0, 1, 2, 3, 12)], collection="other")
    elsewhere = addresses(kit, "other")
    assert set(elsewhere) & set(addresses(kit, "default"))
    kit.service.retriever.delete_document("doc3", "default")
    await kit.service.precomputer.sweep()
    assert {name: kit.engine.store.contains(key) for name, key in elsewhere.items()} == dict.fromkeys(elsewhere, True)
    kit.service.retriever.delete_collection("other")
    await kit.service.precomputer.sweep()
    assert not any("d12" in text or "d3" in text for text in behind.stored().values())


async def test_a_crash_between_the_deletion_and_the_sweep_loses_neither(open_kit: OpenKit, tmp_path: Path) -> None:
    kit = await open_kit(store=open_store(StoreConfig(path=tmp_path / "kv")), **SETTINGS)
    watching = Behind(kit)
    await kit.ingest([document(n) for n in range(6)])
    concerned, text = having(kit, "d3"), dict(watching.text)
    kit.service.retriever.delete_document("doc3")
    await kit.service.close()

    again = await open_kit(store=open_store(StoreConfig(path=tmp_path / "kv")), **SETTINGS)
    watching = Behind(again)
    watching.text |= text
    assert any("d3" in behind for behind in watching.stored().values()), "this test shows nothing"
    report = await precompute(again.service)
    assert (report.removed, report.cascaded) == (len(concerned) + 2, len(concerned))
    assert not any("d3" in behind for behind in watching.stored().values())


async def test_what_cannot_be_deleted_now_is_deleted_later(kit: Kit, behind: Behind, monkeypatch: Any) -> None:
    kit.service.retriever.delete_document("doc3")

    def failing(*_: object, **__: object) -> bool:
        raise StoreIOError("no")

    with monkeypatch.context() as patch:
        patch.setattr(kit.engine.store, "delete_many", failing)
        assert await kit.service.precomputer.sweep() == 0
    assert any("d3" in text for text in behind.stored().values())
    assert await kit.service.precomputer.sweep() > 0
    assert not any("d3" in text for text in behind.stored().values())


@pytest.mark.parametrize("change", ["delete", "edit"])
async def test_a_change_during_a_pass_leaves_nothing_of_the_old_text(
    open_kit: OpenKit, monkeypatch: Any, change: str
) -> None:
    """The worst order: jobs made, text deleted, swept, and only then the passes store what they computed."""
    kit = await open_kit(**SETTINGS, precompute_on_ingest=False)
    await kit.ingest([document(n) for n in range(6)])
    behind, started, gate = Behind(kit), asyncio.Event(), asyncio.Event()
    watched = kit.engine.compile

    async def slow(job: CompileJob) -> CompileResult:
        if "d3" in kit.engine.tokenizer.decode(job.context):
            started.set()
            await gate.wait()
        return await watched(job)

    monkeypatch.setattr(kit.engine, "compile", slow)
    running = asyncio.create_task(precompute(kit.service))
    await started.wait()
    if change == "delete":
        kit.service.retriever.delete_document("doc3")
    else:
        await kit.ingest([document(3, word="newly")])
    await kit.service.precomputer.sweep()
    assert sweep(kit.service.retriever, kit.service.references, kit.engine.store) == 0, "all is swept"
    gate.set()
    report = await running
    assert report.removed > 0
    old = "d3 part0  tells"
    assert any(old in text for text in behind.text.values()), "this test shows nothing"
    assert not any(old in text for text in behind.stored().values())
    await precompute(kit.service)
    assert set(addresses(kit).values()) < {e.key for e in kit.engine.store.entries()}


async def test_a_cancelled_pass_leaves_nothing_of_the_old_text_either(open_kit: OpenKit, monkeypatch: Any) -> None:
    kit = await open_kit(**SETTINGS, precompute_on_ingest=False)
    await kit.ingest([document(n) for n in range(6)])
    behind, started = Behind(kit), asyncio.Event()
    watched = kit.engine.compile

    async def slow(job: CompileJob) -> CompileResult:
        if "d3" in kit.engine.tokenizer.decode(job.context):
            started.set()
            await asyncio.sleep(0.2)
        return await watched(job)

    monkeypatch.setattr(kit.engine, "compile", slow)
    running = asyncio.create_task(precompute(kit.service))
    await started.wait()
    kit.service.retriever.delete_document("doc3")
    await kit.service.precomputer.sweep()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert any("d3" in text for text in behind.text.values()), "this test shows nothing"
    assert not any("d3" in text for text in behind.stored().values())


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_done_no_entry_rests_on_text_that_is_gone(open_kit: OpenKit, seed: int) -> None:
    """Thirty random changes; after each, what is stored was computed from texts that are in its collection."""
    rng = random.Random(seed)
    kit = await open_kit(**SETTINGS)
    behind = Behind(kit)
    most = 0
    versions = {"default": dict[int, str](), "other": dict[int, str]()}
    for step in range(30):
        collection, n = rng.choice(sorted(versions)), rng.randrange(8)
        held = versions[collection]
        if rng.random() < 0.3 and n in held:
            kit.service.retriever.delete_document(f"doc{n}", collection)
            del held[n]
            await kit.service.precomputer.sweep()
        else:
            held[n] = f"v{step}v" if rng.random() < 0.7 else held.get(n, "v")
            job = await kit.ingest([document(n, word=f"{collection}-{held[n]}")], collection=collection)
            assert job["state"] == "precomputed"
            assert set(addresses(kit, collection).values()) <= set(behind.stored())
        marks = {name: {f"d{n} part{p} {name}-{word} " for n, word in texts.items() for p in (0, 1)}
                 for name, texts in versions.items()}  # fmt: skip
        for text in behind.stored().values():
            passages = re.findall("Here .*? again", text)
            homes = [name for name in versions if all(any(m in p for m in marks[name]) for p in passages)]
            assert homes or not passages, (step, text)
            most = max(most, len(passages))
    assert most == 2, "nothing was compiled behind anything"
    assert kit.service.retriever.check() == []


async def test_the_request_s_own_documents_are_never_compiled_and_never_a_neighbour(kit: Kit, behind: Behind) -> None:
    behind.jobs.clear()
    await kit.chat(rag={"vector_store_ids": ["default"], "documents": [{"id": "x", "title": "x", "text": "Evil d3."}]})
    assert behind.jobs == []
    assert (await precompute(kit.service)).done == 0
    assert not any("Evil" in text for text in behind.stored().values())


async def test_progress_counts_the_chunks_that_are_meant(kit: Kit, behind: Behind) -> None:
    concerned = having(kit, "d3")
    seen: list[tuple[int, int]] = []

    def tell(report: PrecomputeReport, total: int) -> None:
        seen.append((report.chunks, total))

    kit.service.retriever.delete_document("doc3")
    [one] = [d for d in kit.service.retriever.documents() if d.id == "doc9"]
    await kit.service.precomputer.run([one], progress=tell)
    outside = {name for name in concerned if name not in {c.id for c in kit.service.retriever.chunks("doc9")}}
    assert seen[-1] == (2 + len(outside),) * 2


@pytest.mark.parametrize(
    ("compile", "said"),
    [
        ({"neighbours": 0}, "compile.neighbours: .*greater than or equal to 1"),
        ({"neighbours": 17}, "compile.neighbours: .*less than or equal to 16"),
        ({"context": "neighbour"}, "compile.context: .*'neighbours'"),
        ({"context": "neighbours", "neighbour": 3}, "did you mean compile.neighbours"),
    ],
)
async def test_a_wrong_setting_says_what_to_write(open_kit: OpenKit, compile: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        await open_kit(compile=compile)


async def test_a_budget_that_cannot_hold_the_neighbours_is_refused_at_the_start(open_kit: OpenKit) -> None:
    chunk = 62  # 60 bytes and a blank line
    with pytest.raises(StartError, match=rf"neighbours 3 needs {4 * chunk} tokens; compile.budget 247 .*247"):
        await open_kit(compile={"context": "neighbours", "budget": 4 * chunk - 1})
    await open_kit(compile={"context": "neighbours", "budget": 4 * chunk})
    await open_kit(compile={"context": "document", "budget": 4 * chunk - 1})
