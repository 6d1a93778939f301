"""Keys and compile jobs of documents, whatever their chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blend.keys import KeyMaker
from store.types import KVLayout

LAYOUT = KVLayout("m" * 64, 2, 2, 32, "float32", "r" * 32)
PREFIX = (1, 2, 3)
CHUNKS = st.lists(st.lists(st.integers(4, 9), min_size=1, max_size=12).map(tuple), max_size=14)
CONTEXTS = st.sampled_from(["prefix", "document", "neighbours"])


def maker(context: str = "document", budget: int = 20, tenant: bytes = b"t" * 32) -> KeyMaker:
    return KeyMaker(LAYOUT, "tok", tenant, PREFIX, context, budget)  # type: ignore[arg-type]


def behind(chunks: Sequence[tuple[int, ...]], *, most: int = 3) -> list[Sequence[tuple[int, ...]]]:
    """Neighbours of a document made up from the document itself: the chunks after each, in the order they come."""
    return [chunks[i + 1 : i + 1 + most] for i in range(len(chunks))]


def names(chunks: Sequence[tuple[int, ...]]) -> list[str]:
    return [f"c{i}" for i in range(len(chunks))]


@given(CHUNKS, CONTEXTS, st.integers(1, 40))
def test_every_chunk_is_compiled_exactly_once(chunks: list[tuple[int, ...]], context: str, budget: int) -> None:
    keys = maker(context, budget)
    refs = keys.document(names(chunks), chunks, behind(chunks))
    assert [r.token_ids for r in refs] == chunks
    compiled = [key for job in keys.jobs(refs) for key in job.keys]
    assert compiled == [r.key for r in refs]


@given(CHUNKS, CONTEXTS, st.integers(1, 40))
def test_a_key_names_the_context_its_job_computes_it_behind(
    chunks: list[tuple[int, ...]], context: str, budget: int
) -> None:
    """Independent of the job's shape: what stands before a chunk in its pass is what its key hashes."""
    keys = maker(context, budget)
    for job in keys.jobs(keys.document(names(chunks), chunks, behind(chunks))):
        before = job.context
        assert before[: len(PREFIX)] == PREFIX
        for key, chunk in zip(job.keys, job.chunks, strict=True):
            assert key == keys._key(before, chunk)
            before += chunk


@given(CHUNKS, st.integers(1, 40))
def test_document_tokens_of_a_pass_stay_within_the_budget(chunks: list[tuple[int, ...]], budget: int) -> None:
    """Unless a single chunk is larger than that; then it stands behind at most half a budget."""
    keys = maker("document", budget)
    for job in keys.jobs(keys.document(names(chunks), chunks)):
        used = job.tokens - len(PREFIX)
        assert used <= budget or (len(job.chunks) == 1 and len(job.context) - len(PREFIX) <= budget // 2)


@given(CHUNKS, CONTEXTS, st.integers(1, 40), st.data())
def test_only_wanted_chunks_are_needed_and_their_keys_do_not_change(
    chunks: list[tuple[int, ...]], context: str, budget: int, data: st.DataObject
) -> None:
    keys = maker(context, budget)
    refs = keys.document(names(chunks), chunks, behind(chunks))
    wanted = data.draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)))
    by_key = {}
    for job in keys.jobs(refs, wanted):
        before = job.context
        for key, chunk in zip(job.keys, job.chunks, strict=True):
            assert key == keys._key(before, chunk)
            before += chunk
            by_key[key] = chunk
    assert {r.key for r, w in zip(refs, wanted, strict=True) if w} <= set(by_key) <= {r.key for r in refs}
    if not any(wanted):
        assert by_key == {}


@given(CHUNKS, CONTEXTS)
def test_keys_are_deterministic_and_distinct(chunks: list[tuple[int, ...]], context: str) -> None:
    keys = maker(context)
    once, again = (keys.document(names(chunks), chunks, behind(chunks)) for _ in range(2))
    assert once == again
    assert len({r.source for r in once}) == len(chunks)


def test_an_edit_changes_the_keys_behind_it_and_none_before() -> None:
    chunks = [(4, 5), (6, 7), (8, 9), (4, 4)]
    edited = [chunks[0], (6, 8), *chunks[2:]]
    keys = maker(budget=100)
    before, after = (keys.document(names(chunks), c) for c in (chunks, edited))
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True, False, False, False]
    alone = maker("prefix")
    before, after = (alone.document(names(chunks), c) for c in (chunks, edited))
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True, False, True, True]


def test_equal_chunks_behind_the_prefix_are_stored_once() -> None:
    refs = maker("prefix").document(["a", "b"], [(4, 5), (4, 5)])
    assert refs[0].key == refs[1].key
    assert refs[0].source != refs[1].source


@pytest.mark.parametrize(
    "other",
    [
        maker(tenant=b"u" * 32),
        replace(maker(), tokenizer="other"),
        replace(maker(), prefix=(1, 2, 4)),
        *(replace(maker(), layout=replace(LAYOUT, **change)) for change in (
            {"model": "n" * 64}, {"rope": "s" * 32}, {"dtype": "bfloat16"}, {"layers": 3}
        )),
    ],
)  # fmt: skip
def test_whatever_identifies_the_kv_is_in_the_key(other: KeyMaker) -> None:
    chunks = [(4, 5), (6, 7)]
    ours, theirs = (k.document(names(chunks), chunks) for k in (maker(), other))
    assert not {r.key for r in ours} & {r.key for r in theirs}
    assert maker().prefix_ref().key != other.prefix_ref().key


def test_the_prefix_is_compiled_at_the_beginning_behind_nothing() -> None:
    job = maker().prefix_job()
    assert (job.context, job.chunks, job.keys) == ((), (PREFIX,), (maker().prefix_ref().key,))


@given(CHUNKS, st.integers(1, 40), st.data())
def test_each_chunk_gets_a_pass_of_its_own_behind_its_neighbours(
    chunks: list[tuple[int, ...]], budget: int, data: st.DataObject
) -> None:
    near = data.draw(st.lists(CHUNKS, min_size=len(chunks), max_size=len(chunks)))
    wanted = data.draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)))
    keys = maker("neighbours", budget)
    refs = keys.document(names(chunks), chunks, near)
    jobs = keys.jobs(refs, wanted)
    assert [job.keys for job in jobs] == [(r.key,) for r, w in zip(refs, wanted, strict=True) if w]
    for job, (chunk, own) in zip(
        jobs, ((c, n) for c, n, w in zip(chunks, near, wanted, strict=True) if w), strict=True
    ):
        assert job.chunks == (chunk,)
        assert job.context[: len(PREFIX)] == PREFIX
        assert job.keys[0] == keys._key(job.context, chunk)
        kept = next(n for n in range(len(own) + 1) if job.context == PREFIX + tuple(t for c in own[n:] for t in c))
        used = sum(len(c) for c in own[kept:]) + len(chunk)
        assert used <= budget or kept == len(own), "a neighbour stays only if all from it on fit"
        assert kept == 0 or used + len(own[kept - 1]) > budget, "the farthest is left out first, and only if it must"


def test_a_neighbour_that_changes_comes_goes_or_moves_gives_a_new_key() -> None:
    chunk, near = (4, 5), [(6, 7), (8,), (9, 4)]
    changes: list[list[tuple[int, ...]]] = [
        near, [], near[1:], near[::-1], [*near, (5,)], [(6, 6), *near[1:]], [near[0], near[0], *near[1:]]
    ]  # fmt: skip
    found = [maker("neighbours").document(["a"], [chunk], [other])[0] for other in changes]
    assert len({r.key for r in found}) == len(changes)
    assert len({r.source for r in found}) == 1, "the chunk stays the same one, so a miss can say why"


def test_a_chunk_without_neighbours_is_compiled_behind_the_prefix_alone() -> None:
    chunks = [(4, 5), (6, 7)]
    alone, lonely = maker("prefix"), maker("neighbours")
    assert alone.document(names(chunks), chunks) == lonely.document(names(chunks), chunks, [[], []])
    [job] = lonely.jobs(lonely.document(["a"], chunks[:1], [[]]))
    assert job.context == PREFIX


def test_a_chunk_as_large_as_the_budget_has_no_room_for_neighbours() -> None:
    keys = maker("neighbours", budget=4)
    [full] = keys.document(["a"], [(4, 5, 6, 7)], [[(8,)]])
    assert full.behind == ()
    [small] = keys.document(["a"], [(4, 5, 6)], [[(9, 9), (8,)]])
    assert small.behind == ((8,),)


@pytest.mark.parametrize(("near", "said"), [(None, "none given"), ([[]], "1 given"), ([[], [], []], "3 given")])
def test_a_missing_list_of_neighbours_is_an_error_and_never_no_neighbours(near: list[list[int]], said: str) -> None:
    chunks = [(4, 5), (6, 7)]
    with pytest.raises(ValueError, match=said):
        maker("neighbours").document(names(chunks), chunks, near)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", ["prefix", "document"])
def test_neighbours_are_read_in_their_own_context_only(context: str) -> None:
    chunks = [(4, 5), (6, 7)]
    keys = maker(context)
    assert keys.document(names(chunks), chunks) == keys.document(names(chunks), chunks, behind(chunks))


def test_a_chunk_names_the_one_that_it_is_compiled_right_behind() -> None:
    chunks = [(1, 2), (3,), (4, 5, 6)]
    refs = maker(context="document").document(names(chunks), chunks)
    assert [r.after for r in refs] == [None, refs[0].key, refs[1].key]
    assert [r.after for r in maker(context="prefix").document(names(chunks), chunks)] == [None] * 3
    tight = maker(context="document", budget=1).document(names(chunks), chunks)
    assert [r.after for r in tight] == [None] * 3  # no room for a context
