"""Where a chunk lies changes when its answer comes, never what it is; on every engine, through its own process."""

from __future__ import annotations

from collections.abc import Sequence

from blend.prompt import ChunkRef
from store import KVKey
from tests.blend.served import Answer, Served
from tests.blend.tiny import sentence

TEXTS = [sentence(4000 + i, 20) for i in range(3)]


def keys_of(refs: Sequence[ChunkRef]) -> list[KVKey]:
    return [ref.key for ref in refs]


def tiers(answer: Answer) -> list[str | None]:
    """Of the chunks, without the canonical prefix."""
    return [chunk.tier for chunk in answer.stats.chunks[1:]]


def test_a_chunk_answers_the_same_from_memory_and_from_disk(engine: Served) -> None:
    refs = engine.document(*TEXTS, name="tiers")
    prompt, keys = engine.prompt(refs), keys_of(refs)
    engine.loop.run(engine.engine.cool(keys))
    below = engine.ask(prompt, "reuse")
    assert engine.loop.run(engine.engine.warm(keys)) == 3
    above = engine.ask(prompt, "reuse")
    assert (tiers(below), tiers(above)) == (["ssd"] * 3, ["ram"] * 3)
    assert above.distance(below) <= engine.tolerance
    assert above.stats.missing == below.stats.missing == 0


def test_what_is_deleted_is_not_served_from_memory(engine: Served) -> None:
    """With vLLM the copy is in the worker's memory, and the delete comes from this process."""
    refs = engine.document(*TEXTS, name="gone")
    prompt, keys = engine.prompt(refs), keys_of(refs)
    assert engine.loop.run(engine.engine.warm(keys)) == 3
    assert engine.engine.store.delete(keys[1])
    answer = engine.ask(prompt, "reuse")
    assert tiers(answer) == ["ram", None, "ram"]
    assert answer.stats.chunks[2].missing == len(refs[1].token_ids)
    assert answer.stats.chunks[2].miss_reason == "never_precomputed"
    engine.document(*TEXTS, name="gone")  # put again, it is served again
    assert engine.ask(prompt, "reuse").stats.missing == 0


def test_the_engine_says_what_each_tier_holds(engine: Served) -> None:
    refs = engine.document(*TEXTS, name="held")
    engine.loop.run(engine.engine.cool(keys_of(refs)))
    before = {t.tier: t for t in engine.loop.run(engine.engine.store_stats()).tiers}
    engine.loop.run(engine.engine.warm(keys_of(refs)))
    after = {t.tier: t for t in engine.loop.run(engine.engine.store_stats()).tiers}
    assert set(after) == {"ram", "ssd"}
    assert after["ram"].entries == before["ram"].entries + 3
    assert after["ssd"].entries == before["ssd"].entries == engine.engine.store.stats().entries
    assert after["ram"].limit_bytes == 64 << 20
