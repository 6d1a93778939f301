"""select_rows keeps its promises on ties, forced rows and odd sizes; runs cut at every gap."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.select_rows import rows_covering, runs, select_rows

NAN, INF = float("nan"), float("inf")
scores_strategy = st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5, NAN, INF, -INF]), max_size=40)


def naive(scores: list[float], budget: int, forced: set[int], eligible: set[int]) -> list[int]:
    """Pick one row at a time: the best score, among equals the first."""
    chosen = set(forced)
    while len(chosen) < budget:
        best = None
        for row in sorted(eligible - chosen):
            score = INF if scores[row] != scores[row] else scores[row]
            if best is None or score > best[0]:
                best = (score, row)
        if best is None:
            break
        chosen.add(best[1])
    return sorted(chosen)


@given(scores_strategy, st.integers(0, 50), st.data())
def test_it_equals_picking_one_by_one(scores: list[float], budget: int, data: st.DataObject) -> None:
    rows = range(len(scores))
    forced = data.draw(st.lists(st.sampled_from(rows), max_size=9)) if scores else []
    eligible = data.draw(st.sets(st.sampled_from(rows))) if scores else set()
    tensor = torch.tensor(scores, dtype=torch.float32)
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[sorted(eligible)] = True
    want = naive(scores, budget, set(forced), eligible)
    forced_rows = torch.tensor(forced, dtype=torch.int64)
    got = select_rows(tensor, budget, forced=forced_rows, eligible=mask)
    assert got.dtype == torch.int64 and got.tolist() == want
    as_rows = torch.tensor(sorted(eligible), dtype=torch.int64)
    assert select_rows(tensor, budget, forced=forced_rows, eligible=as_rows).tolist() == want
    assert select_rows(tensor, budget).tolist() == naive(scores, budget, set(), set(range(len(scores))))


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0, -1.0]), max_size=30), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data()
)
def test_covering_counts_the_fewest_rows(scores: list[float], part: float, data: st.DataObject) -> None:
    """Small whole numbers: the sums are exact, so is the count."""
    rows = range(len(scores))
    forced = data.draw(st.sets(st.sampled_from(rows))) if scores else set()
    eligible = data.draw(st.sets(st.sampled_from(rows))) if scores else set()
    mass = [max(s, 0.0) for s in scores]
    best = sorted((mass[r] for r in eligible - forced), reverse=True)
    held = sum(mass[r] for r in forced)
    total = held + sum(best)
    want = next(n for n in range(len(best) + 1) if held + sum(best[:n]) >= part * total)
    forced_rows, open_rows = (torch.tensor(sorted(x), dtype=torch.int64) for x in (forced, eligible))
    assert rows_covering(torch.tensor(scores), part, forced=forced_rows, eligible=open_rows) == want


def test_covering_needs_every_row_when_nothing_is_known() -> None:
    for bad in (NAN, INF):
        assert rows_covering(torch.tensor([1.0, bad, 3.0]), 0.1) == 3
        assert rows_covering(torch.tensor([1.0, bad, 3.0]), 0.1, eligible=torch.tensor([0, 2])) == 1
    for part in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match="part must be within"):
            rows_covering(torch.ones(3), part)
    with pytest.raises(ValueError, match="scores must be"):
        rows_covering(torch.ones(3, 1), 0.5)


def test_equal_scores_prefer_the_lower_row_at_any_size() -> None:
    for total in (1, 63, 129, 5000):
        assert select_rows(torch.ones(total), 7).tolist() == list(range(min(7, total)))


def test_forced_rows_count_toward_the_budget_and_survive_it() -> None:
    scores = torch.arange(10.0)
    assert select_rows(scores, 3, forced=torch.tensor([1, 0, 1])).tolist() == [0, 1, 9]
    assert select_rows(scores, 1, forced=torch.tensor([4, 2])).tolist() == [2, 4]
    mask = torch.zeros(10, dtype=torch.bool)
    mask[5] = True
    assert select_rows(scores, 0, forced=mask).tolist() == [5]
    assert mask.sum() == 1  # the caller's mask is not written


def test_nothing_to_choose_from() -> None:
    assert select_rows(torch.empty(0), 3).tolist() == []
    assert select_rows(torch.ones(4), 0).tolist() == []
    assert select_rows(torch.ones(4), 3, eligible=torch.empty(0).long()).tolist() == []


def test_strided_scores_are_read_right() -> None:
    scores = torch.tensor([1.0, 9.0, 3.0, 9.0, 2.0, 9.0])[::2]
    assert select_rows(scores, 1).tolist() == [1]


@pytest.mark.parametrize(
    ("scores", "budget", "forced", "shown"),
    [
        (torch.zeros(2, 2), 1, None, r"\(2, 2\)"),
        (torch.zeros(3), -1, None, "-1"),
        (torch.zeros(3), 1, torch.tensor([3]), r"3\.\.3"),
        (torch.zeros(3), 1, torch.tensor([-1]), r"-1\.\.-1"),
        (torch.zeros(3), 1, torch.zeros(4, dtype=torch.bool), r"\(4,\)"),
        (torch.zeros(3), 1, torch.zeros(2), "float32"),
    ],
)
def test_a_bad_shape_row_or_budget_is_shown(
    scores: torch.Tensor, budget: int, forced: torch.Tensor | None, shown: str
) -> None:
    with pytest.raises(ValueError, match=shown):
        select_rows(scores, budget, forced=forced)


@given(st.sets(st.integers(0, 60)))
def test_runs_cover_exactly_the_rows_and_never_touch(rows: set[int]) -> None:
    got = runs(torch.tensor(sorted(rows), dtype=torch.int64))
    assert [row for start, stop in got for row in range(start, stop)] == sorted(rows)
    assert all(stop < start for (_, stop), (start, _) in pairwise(got))


def test_runs_refuse_unsorted_rows() -> None:
    assert runs(torch.tensor([4, 5, 6, 9])) == [(4, 7), (9, 10)]
    for bad in ([2, 1], [1, 1]):
        with pytest.raises(ValueError, match="1 of 2"):
            runs(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        runs(torch.tensor([[1, 2]]))
