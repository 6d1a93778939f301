"""Scores and chunks: windows, ranks and budgets within a chunk, against the plain way to say it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from blend.select.chunks import allot_chunks, chunk_rows, pooled, ranks
from blend.types import Prompt, Segment

sizes_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def prompt(sizes: list[int]) -> Prompt:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    segments = [Segment("chunk", end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return Prompt((1,) * (ends[-1] + 1), (*segments, Segment("question", ends[-1], ends[-1] + 1)))


@given(sizes_strategy)
def test_every_row_knows_its_chunk_and_its_place(sizes: list[int]) -> None:
    segment, place = chunk_rows(prompt(sizes))
    assert list(zip(segment.tolist(), place.tolist(), strict=True)) == [
        (i, at) for i, size in enumerate(sizes) for at in range(size)
    ]


@given(sizes_strategy, st.integers(0, 12), st.integers(0, 1000))
def test_a_window_ends_with_its_chunk(sizes: list[int], width: int, seed: int) -> None:
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed))
    got = pooled(scores, prompt(sizes), width)
    at = 0
    for size in sizes:
        for row in range(at, at + size):
            window = scores[max(at, row - width) : min(at + size, row + width + 1)]
            assert got[row] == window.max()
        at += size


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, 2.0, float("nan"), -float("inf")]))))
def test_ranks_count_the_better_rows_of_the_group(rows: list[tuple[int, float]]) -> None:
    value = [float("inf") if s != s else s for _, s in rows]
    group, scores = torch.tensor([g for g, _ in rows], dtype=torch.int64), torch.tensor([s for _, s in rows])
    expected = [
        sum(h == g and (value[j] > value[i] or (value[j] == value[i] and j < i)) for j, (h, _) in enumerate(rows))
        for i, (g, _) in enumerate(rows)
    ]
    assert ranks(scores, group).tolist() == expected


chunks_strategy = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 0.1, 1.0, 7.0, 1e6])), min_size=1)


@given(chunks_strategy, st.integers(0, 400))
def test_chunks_get_the_budget_and_never_more_than_they_hold(chunks: list[tuple[int, float]], budget: int) -> None:
    room = torch.tensor([r for r, _ in chunks])
    rows = allot_chunks(budget, torch.tensor([m for _, m in chunks]), room)
    assert int(rows.sum()) == min(budget, int(room.sum()))
    assert bool((rows >= 0).all() and (rows <= room).all())


@given(chunks_strategy, st.integers(0, 400))
def test_no_chunk_is_left_out_and_more_mass_is_never_fewer_rows(chunks: list[tuple[int, float]], budget: int) -> None:
    room = torch.tensor([r for r, _ in chunks])
    mass = torch.tensor([m for _, m in chunks])
    rows = allot_chunks(budget, mass, room)
    total = max(1, int(room.sum()))
    for i in range(len(chunks)):
        assert int(rows[i]) >= int(0.25 * min(budget, total) * int(room[i]) / total - 1e-6)
        for j in range(len(chunks)):
            if room[i] == room[j] and mass[i] > mass[j]:
                assert rows[i] >= rows[j] - 1  # a rounded row may fall either way


def test_chunks_get_rows_in_proportion_to_their_mass() -> None:
    room = torch.tensor([100, 100, 100])
    assert allot_chunks(36, torch.tensor([0.0, 1.0, 2.0]), room).tolist() == [3, 12, 21]  # 36/12 + 27 x mass/3
    assert allot_chunks(40, torch.zeros(3), room).tolist() == [14, 13, 13]
    assert allot_chunks(40, torch.tensor([0.0, 0.0, 9.0]), torch.tensor([100, 100, 5])).tolist() == [18, 17, 5]
